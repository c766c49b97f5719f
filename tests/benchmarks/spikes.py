"""What broken batches do to training: a small transformer on real text, with each clip and without one.

The text is that of the topics which Python's help() knows, byte by byte. In a share of the steps, drawn by the seed,
the batch is broken: in every other one of them the gradient is 10,000 times what it should be, in the rest the batch is
noise. Each arm trains on the same batches from the same start, once as they are and once with the broken ones, and all
seeds and both cases of an arm are one program.
"""

import argparse
import math
from functools import partial
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import stdtrit

import rmsjax
from tests.benchmarks.timing import versions

COLUMNS = ("arm", "loss, no broken batch", "loss, broken batches", "beyond the clean run", "steps lost", "spike score")
CLEAN = "no clip"  # the arm whose run without broken batches is the measure of the others
WINDOW = 50  # of the running mean and standard deviation of the spike score


def arms(args):
    """The optimizers, by name."""
    schedule, slow = (
        optax.warmup_cosine_decay_schedule(0.0, peak, args.steps // 20, args.steps, 0.1 * peak)
        for peak in (args.learning_rate, args.hyperball_rate)
    )
    adamw = optax.adamw(schedule, b2=0.99, weight_decay=0.01)
    ball = rmsjax.hyperball(adamw, slow, kernels)
    return {
        CLEAN: adamw,
        "optax.clip_by_global_norm(1)": optax.chain(optax.clip_by_global_norm(1.0), adamw),
        "clip_by_global_norm(1)": optax.chain(rmsjax.clip_by_global_norm(1.0), adamw),
        "clip_by_history()": optax.chain(rmsjax.clip_by_history(), adamw),
        "clip_by_history, global": optax.chain(rmsjax.clip_by_history(scope="global"), adamw),
        "hyperball": ball,
        "clip_by_history, hyperball": optax.chain(rmsjax.clip_by_history(), ball),
    }


def kernels(params):
    """What hyperball holds: matrices but for those whose rows are each a vector of its own."""
    held = {name: name not in ("embed", "position") for name in params}
    return {name: jax.tree.map(lambda leaf, h=held[name]: h and leaf.ndim == 2, params[name]) for name in params}


# --------------------------------------------------------------------------------------------------------------- model


def text():
    """(tokens for training, tokens for the test, how many there are): the bytes that occur, numbered."""
    data = np.frombuffer("".join(topics.topics[name] for name in sorted(topics.topics)).encode(), np.uint8)
    known, tokens = np.unique(data, return_inverse=True)
    cut = len(tokens) * 9 // 10
    return tokens[:cut].astype(np.int32), tokens[cut:].astype(np.int32), len(known)


def init(key, vocabulary, args):
    """Parameters of a decoder: kernels with variance 1 over their inputs, scales of one."""
    keys = iter(jax.random.split(key, 4 * args.depth + 3))
    width = args.width

    def kernel(fan_in, fan_out):
        return jax.random.normal(next(keys), (fan_in, fan_out)) / math.sqrt(fan_in)

    blocks = [
        {
            "norm1": jnp.ones(width),
            "qkv": kernel(width, 3 * width),
            "out": kernel(width, width),
            "norm2": jnp.ones(width),
            "up": kernel(width, 4 * width),
            "down": kernel(4 * width, width),
        }
        for _ in range(args.depth)
    ]
    embed = jax.random.normal(next(keys), (vocabulary, width))
    position = 0.1 * jax.random.normal(next(keys), (args.context, width))
    return {
        "embed": embed,
        "position": position,
        "blocks": blocks,
        "norm": jnp.ones(width),
        "head": kernel(width, vocabulary),
    }


def loss_of(params, tokens, heads):
    """The mean cross-entropy of the next byte, over windows of tokens (batch, context + 1)."""
    x = params["embed"][tokens[:, :-1]] + params["position"]
    batch, length, width = x.shape
    for block in params["blocks"]:
        qkv = rmsjax.rms_normalize(x, block["norm1"]) @ block["qkv"]
        query, key, value = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, width // heads), 2, 0)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + mixed.reshape(x.shape) @ block["out"]
        x = x + jax.nn.gelu(rmsjax.rms_normalize(x, block["norm2"]) @ block["up"]) @ block["down"]
    logits = rmsjax.rms_normalize(x, params["norm"]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


# ------------------------------------------------------------------------------------------------------------ training


def broken_steps(key, args):
    """For each step 0, or what is broken in it: 1 the size of the gradient, 2 the batch."""
    chosen = jax.random.permutation(key, args.steps)[: round(args.share * args.steps)]
    return jnp.zeros(args.steps, jnp.int32).at[chosen].set(1 + jnp.arange(chosen.size) % 2)


def train(tx, args, seed, broken):
    """(the loss at each step, that on the test at each `every` steps, what was broken) for a seed."""
    training, test, vocabulary = text()
    windows = np.linspace(0, len(test) - args.context - 1, args.test_windows).astype(int)
    test = jnp.asarray(test[windows[:, None] + np.arange(args.context + 1)])
    training = jnp.asarray(training)
    at_start, order, breaks = jax.random.split(jax.random.key(seed), 3)
    params = init(at_start, vocabulary, args)
    kinds = broken_steps(breaks, args) * broken
    loss = partial(loss_of, heads=args.heads)

    def step(carry, inputs):
        (params, state), (k, kind) = carry, inputs
        places, noise = jax.random.split(jax.random.fold_in(order, k))
        starts = jax.random.randint(places, (args.batch, 1), 0, training.size - args.context)
        batch = training[starts + jnp.arange(args.context + 1)]
        batch = jnp.where(kind == 2, jax.random.randint(noise, batch.shape, 0, vocabulary), batch)
        value, grads = jax.value_and_grad(loss)(params, batch)
        grads = jax.tree.map(lambda g: g * jnp.where(kind == 1, 1e4, 1.0), grads)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    def stretch(carry, inputs):
        carry, values = jax.lax.scan(step, carry, inputs)
        return carry, (values, loss(carry[0], test))

    inputs = jax.tree.map(lambda x: x.reshape(-1, args.every), (jnp.arange(args.steps), kinds))
    _, (values, tested) = jax.lax.scan(stretch, (params, tx.init(params)), inputs)
    return values.ravel(), tested, kinds


def all_seeds(tx, args):
    """The same for all seeds, first without broken batches and then with them: arrays (2, seeds, ...)."""
    seeds, broken = jnp.arange(args.seeds), jnp.arange(2)
    one = partial(train, tx, args)
    found = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(seeds, broken)
    return jax.tree.map(np.asarray, found)


# --------------------------------------------------------------------------------------------------------------- table


def spike_score(values, kinds):
    """The share of losses above the mean of those before by more than three standard deviations, for each seed.

    The losses on broken batches are left out: they are high whatever the optimizer does.
    """

    def score(values):
        before = np.lib.stride_tricks.sliding_window_view(values[:-1], WINDOW)
        return np.mean(values[WINDOW:] > before.mean(-1) + 3 * before.std(-1))

    return np.array([score(v[k != 2]) for v, k in zip(values, kinds, strict=True)])


def steps_lost(tested, clean, every):
    """How many steps earlier the clean run had the test loss with which a run ends, for each seed."""
    reached = [
        int(np.argmax(curve <= end)) if curve.min() <= end else len(curve) - 1
        for curve, end in zip(clean, tested[:, -1], strict=True)
    ]
    return (clean.shape[1] - 1 - np.array(reached)) * every


def with_interval(values, form="{:.3f}"):
    """The mean over seeds, and half of its 95 % interval."""
    half = stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0
    return f"{form.format(np.mean(values))} ±{form.format(half).lstrip('+')}"


def row(name, results, clean, args):
    """A line of the table; clean: the test losses of the run that nothing disturbed."""
    values, tested, kinds = results
    beyond = 100 * (tested[1, :, -1] / clean[:, -1] - 1)
    return [
        name,
        with_interval(tested[0, :, -1]),
        with_interval(tested[1, :, -1]),
        with_interval(beyond, "{:+.1f}") + " %",
        with_interval(steps_lost(tested[1], clean, args.every), "{:.0f}"),
        with_interval(100 * spike_score(values[1], kinds[1]), "{:.1f}") + " %",
    ]


def parsed(argv):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks spikes", description=__doc__)
    add = partial(parser.add_argument, metavar="N")
    add("--seeds", type=int, default=5)
    add("--steps", type=int, default=2000)
    add("--share", type=float, default=0.01, help="of steps with a broken batch")
    add("--width", type=int, default=32)
    add("--depth", type=int, default=2)
    add("--heads", type=int, default=4)
    add("--context", type=int, default=32)
    add("--batch", type=int, default=16)
    add("--every", type=int, default=20, help="steps between two tests")
    add("--test-windows", type=int, default=128)
    add("--learning-rate", type=float, default=1.2e-2, help="the peak, of AdamW")
    add("--hyperball-rate", type=float, default=2e-2, help="the peak, of the matrices under hyperball")
    add("--arms", nargs="*", default=[], help="those whose name has one of these words")
    return parser.parse_args(argv)


def main(argv):
    args = parsed(argv)
    print(f"{jax.default_backend()}, {versions()}\n")
    for line in (COLUMNS, ["---"] * len(COLUMNS)):
        print(f"| {' | '.join(line)} |", flush=True)
    clean = None
    for name, tx in arms(args).items():
        if name == CLEAN or not args.arms or any(word in name for word in args.arms):
            results = all_seeds(tx, args)
            clean = results[1][0] if clean is None else clean
            print(f"| {' | '.join(row(name, results, clean, args))} |", flush=True)
