"""The same in PyTorch, eager and on as many threads, where it is installed: calls by name, none where it is not."""

from functools import partial

import jax

try:
    import torch
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


def _tensors(tree):
    return [_tensor(leaf) for leaf in jax.tree.leaves(tree)]
