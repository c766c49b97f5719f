"""The same in PyTorch, on the same device and as many threads, where it is installed: calls by name, else none."""

import sys
from functools import partial

import jax

try:
    import torch
    import torch._functorch.config
except ImportError:
    torch = None


def _tensor(x):
    return torch.from_dlpack(x).clone()


def forward_and_backward(x, scale, ct):
    """RMSNorm, its outputs in new memory."""
    if torch is None:
        return {}
    x, ct = _tensor(x).requires_grad_(), _tensor(ct)
    scale = _tensor(scale).to(x.dtype).requires_grad_()

    def call():
        x.grad = scale.grad = None
        y = torch.nn.functional.rms_norm(x, scale.shape, scale, eps=1e-6)
        y.backward(ct)
        return y, x.grad, scale.grad

    return {"torch": call}


def norm(tree):
    """The 2-norm of all leaves."""
    return {"torch": partial(torch.nn.utils.get_total_norm, _tensors(tree))} if torch else {}


def clip(tree, max_norm, falling):
    """A clip by global norm in place, as torch does it; the bound falls from call to call."""
    if torch is None:
        return {}
    grads = _tensors(tree)
    params = [torch.nn.Parameter(torch.empty_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    kept = [float(max_norm)]

    def call():
        torch.nn.utils.clip_grad_norm_(params, kept[0])
        kept[0] *= falling

    return {"torch": call}


def passes(x, scale, ct):
    """RMSNorm forward and backward by themselves, in the type of x: eager, and compiled where that works."""
    if torch is None:
        return {}, {}
    x, ct = _tensor(x).requires_grad_(), _tensor(ct)
    scale = _tensor(scale).to(x.dtype).requires_grad_()
    forward, backward = {}, {}

    def normalize(x, scale):
        return torch.nn.functional.rms_norm(x, scale.shape, scale, eps=1e-6)

    def add(name, fn):
        y = fn(x, scale)
        pull = partial(torch.autograd.grad, y, (x, scale), ct, retain_graph=True)
        pull()
        forward[name], backward[name] = torch.no_grad()(partial(fn, x.detach(), scale.detach())), pull

    add("torch", normalize)
    torch._functorch.config.donated_buffer = False  # else a compiled graph could be used but once
    try:
        add("torch.compile", torch.compile(normalize, dynamic=False))
    except Exception as error:  # what it needs, like a C compiler, may be missing, and it fails in ways of its own
        print(f"torch.compile is left out: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
    return forward, backward


def clipped_adamw(tree, max_norm):
    """A step of AdamW after a clip by global norm, fused where there is a GPU."""
    if torch is None:
        return {}
    params = [torch.nn.Parameter(tensor) for tensor in _tensors(tree)]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=params[0].is_cuda or None)

    def call():
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()

    return {"torch": call}


def wait():
    """Until the device has done all that PyTorch asked of it."""
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def _tensors(tree):
    return [_tensor(leaf) for leaf in jax.tree.leaves(tree)]
