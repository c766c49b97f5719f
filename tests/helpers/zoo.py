"""Right configurations and planted mistakes: what `coord_check` is scored on.

Every configuration is muP relative to the width BASE (Yang et al., arXiv 2203.03466, table 8), in three models: a
residual MLP on a teacher's labels, a transformer on the bytes of a text, a convolutional network on small images. A
mistake is that with some powers of the width put in: on the initial values of parameters (`init`), on their learning
rates (`rate`), or on a multiplier of the model (`scale`). So what is wrong, and where, is known.

Part of it is held out: it was written before the rule that judges was, or after that had been fixed, and is not looked
at to choose the rule.
"""

import dataclasses
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rmsjax
from tests.helpers.parametrisations import BASE, BYTES, HEADS, Scores, zen_of_python

WIDTHS = (64, 128, 256, 512)
CLASSES = 8


def factor(width, power):
    return (width / BASE) ** power


# ----------------------------------------------------------------------------------------------------------------- data


def vectors(examples=64, inputs=16):
    """Random vectors, and the labels that a random network gives them."""
    rng = np.random.default_rng(0)
    x, *kernels = (rng.normal(size=s) for s in ((examples, inputs), (inputs, 32), (32, CLASSES)))
    return x.astype(np.float32), np.argmax(np.tanh(x @ kernels[0]) @ kernels[1], -1).astype(np.int32)


def images(examples=16, side=4):
    """Smooth random images of three channels, and the quadrant that is the brightest in the first or second."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(examples, 4, 4, 3))
    x = np.kron(coarse, np.ones((1, side // 4, side // 4, 1))) + 0.3 * rng.normal(size=(examples, side, side, 3))
    quadrants = coarse.reshape(examples, 2, 2, 2, 2, 3).mean((2, 4)).reshape(examples, 4, 3)
    return x.astype(np.float32), np.argmax(quadrants[..., :2].reshape(examples, CLASSES), -1).astype(np.int32)


# --------------------------------------------------------------------------------------------------------------- models


class Scaled(nnx.Module):
    """A linear map of what it is given times a multiplier, or, with `after`, the multiple of what it gives.

    With `after` the map has no bias, which would be multiplied as well, and want a learning rate of its own.
    """

    def __init__(self, linear, multiplier, *, after=False):
        self.linear, self.multiplier, self.after = linear, multiplier, after

    def __call__(self, x):
        return self.multiplier * self.linear(x) if self.after else self.linear(self.multiplier * x)


def readout(width, outputs, rngs, *, zero=True, after=False, scale=0.0, power=-1.0):
    """Initial values and learning rate do not depend on the width, and the multiplier is 1/width: all as in table 8."""
    init = nnx.initializers.zeros if zero else nnx.initializers.normal(BASE**-0.5)
    linear = nnx.Linear(width, outputs, use_bias=not after, kernel_init=init, rngs=rngs)
    return Scaled(linear, factor(width, power + scale), after=after)


def norm_of(kind, width, rngs):
    kinds = {"rms": rmsjax.nnx.RMSNorm, "layer": nnx.LayerNorm, None: lambda *args, **kwargs: lambda x: x}
    return kinds[kind](width, rngs=rngs)


class MLPBlock(nnx.Module):
    def __init__(self, width, rngs, *, norm=None, activation=jax.nn.relu, ntk=None):
        self.norm = norm_of(norm, width, rngs)
        self.activation = activation
        linear = partial(nnx.Linear, width, width, use_bias=ntk != "after", rngs=rngs)
        self.up, self.down = linear(), linear()
        if ntk:
            self.up, self.down = (
                Scaled(layer, factor(width, -0.5), after=ntk == "after") for layer in (self.up, self.down)
            )

    def __call__(self, x):
        return self.down(self.activation(self.up(self.norm(x))))


class MLP(nnx.Module):
    def __init__(self, width, rngs, *, blocks=2, scale=None, norm=None, activation=jax.nn.relu, ntk=None, **last):
        self.embed = nnx.Linear(16, width, rngs=rngs)
        for i in range(blocks):
            setattr(self, f"block{i}", MLPBlock(width, rngs, norm=norm, activation=activation, ntk=ntk))
        self.blocks = blocks
        self.norm = norm_of(norm, width, rngs)
        self.readout = readout(width, CLASSES, rngs, scale=(scale or {}).get("readout", 0), **last)

    def __call__(self, x):
        x = self.embed(x)
        for i in range(self.blocks):
            x = x + getattr(self, f"block{i}")(x)
        return self.readout(self.norm(x))


class ScannedMLP(nnx.Module):
    """Its blocks are one, whose parameters are stacked."""

    def __init__(self, width, rngs, *, blocks=2, scale=None, **last):
        self.embed = nnx.Linear(16, width, rngs=rngs)
        stacked = nnx.split_rngs(splits=blocks)(nnx.vmap(lambda rngs: MLPBlock(width, rngs, norm="rms")))
        self.blocks = stacked(rngs)
        self.readout = readout(width, CLASSES, rngs, scale=(scale or {}).get("readout", 0), **last)

    def __call__(self, x):
        scan = nnx.scan(lambda x, block: x + block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.readout(scan(self.embed(x), self.blocks))


class LinenMLP(nn.Module):
    width: int
    power: float = -1.0  # of the width, in the multiplier of the readout

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="embed")(x)
        for i in range(2):
            y = jax.nn.relu(nn.Dense(self.width, name=f"up{i}")(x))
            x = x + nn.Dense(self.width, name=f"down{i}")(y)
        last = nn.Dense(CLASSES, kernel_init=nn.initializers.zeros, name="readout")
        return last(factor(self.width, self.power) * x)


class Transformer(nnx.Module):
    def __init__(self, width, rngs, *, length=8, blocks=1, scale=None, tied=False, attention="own", zero=True, **last):
        scale = scale or {}
        normal = nnx.initializers.normal(1.0)
        self.embed = nnx.Embed(BYTES, width, embedding_init=normal, rngs=rngs)
        self.position = nnx.Embed(length, width, embedding_init=normal, rngs=rngs)
        self.blocks = blocks
        for i in range(blocks):
            kind = {"own": Attention, "flax": FlaxAttention}[attention]
            own = {name: last.pop(name) for name in ("random_query",) if name in last}
            setattr(self, f"attention{i}", kind(width, rngs, scale=scale.get("scores", 0), **own))
            setattr(self, f"mlp{i}", MLPBlock(width, rngs, norm="rms", activation=jax.nn.gelu))
        self.norm = rmsjax.nnx.RMSNorm(width, rngs=rngs)
        self.multiplier = factor(width, -1 + scale.get("readout", 0))
        if not tied:
            self.readout = readout(width, BYTES, rngs, scale=scale.get("readout", 0), zero=zero, **last)
        self.tied = tied

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[-1]))[None]
        for i in range(self.blocks):
            x = x + getattr(self, f"attention{i}")(x)
            x = x + getattr(self, f"mlp{i}")(x)
        x = self.norm(x)
        return BASE**-0.5 * self.multiplier * self.embed.attend(x) if self.tied else self.readout(x)


def earlier(length):
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


class Attention(nnx.Module):
    def __init__(self, width, rngs, *, scale=0.0, random_query=False):
        self.norm = rmsjax.nnx.RMSNorm(width, rngs=rngs)
        for name in ("query", "key", "value", "out"):
            zero = name == "query" and not random_query
            init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
            setattr(self, name, nnx.Linear(width, width, use_bias=False, kernel_init=init, rngs=rngs))
        self.scores = Scores((BASE // HEADS) ** -0.5 * factor(width, -1 + scale))

    def __call__(self, x):
        y = self.norm(x)
        query, key, value = (self._heads(layer(y)) for layer in (self.query, self.key, self.value))
        weights = jax.nn.softmax(self.scores(query, key), where=earlier(x.shape[1]))
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape))

    def _heads(self, x):
        return x.reshape(*x.shape[:-1], HEADS, -1)


class FlaxAttention(nnx.Module):
    """Flax's own, whose kernels have the axes of heads, and whose scores are over the root of the head's size."""

    def __init__(self, width, rngs, *, scale=0.0):
        self.norm = rmsjax.nnx.RMSNorm(width, rngs=rngs)
        multiplier = factor(width, -0.5 + scale)

        def attention(query, key, value, **kwargs):
            return nnx.dot_product_attention(multiplier * query, key, value, **kwargs)

        self.attention = nnx.MultiHeadAttention(
            HEADS, width, decode=False, use_bias=False, attention_fn=attention, rngs=rngs
        )

    def __call__(self, x):
        return self.attention(self.norm(x), mask=earlier(x.shape[1]))


class ConvNet(nnx.Module):
    def __init__(self, width, rngs, *, blocks=2, scale=None, norm="group", **last):
        self.stem = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.blocks = blocks
        for i in range(blocks):
            setattr(self, f"block{i}", ConvBlock(width, rngs, norm=norm))
        self.readout = readout(width, CLASSES, rngs, scale=(scale or {}).get("readout", 0), **last)

    def __call__(self, x):
        x = self.stem(x)
        for i in range(self.blocks):
            x = x + getattr(self, f"block{i}")(x)
        return self.readout(jnp.mean(x, (1, 2)))


class ConvBlock(nnx.Module):
    def __init__(self, width, rngs, *, norm):
        self.norm = nnx.GroupNorm(width, num_groups=4, rngs=rngs) if norm else None
        self.first = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.second = nnx.Conv(width, width, (1, 1), rngs=rngs)

    def __call__(self, x):
        x = x if self.norm is None else self.norm(x)
        return self.second(jax.nn.relu(self.first(x)))


MODELS = {"mlp": MLP, "scan": ScannedMLP, "linen": LinenMLP, "transformer": Transformer, "conv": ConvNet}
BATCHES = {"transformer": zen_of_python, "conv": images}


# ----------------------------------------------------------------------------------------------------------- optimizers

_FINITE = ("readout/linear/bias", "readout/bias")  # parameters whose size does not depend on the width
_OTHERS = ("embed", "position", "stem", "readout")  # layers whose kernels are no hidden ones


def path_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def is_hidden(path):
    return path.endswith("kernel") and not path.startswith(_OTHERS)


def right_rate(optimizer, path):
    """The power of the width that the learning rate of a parameter has in muP."""
    if optimizer in ("sgd", "momentum"):
        return 0.0 if is_hidden(path) or path in _FINITE else 1.0
    by_muon = optimizer == "muon" and not path.endswith(("first/kernel", "second/kernel"))  # those have four axes
    return -1.0 if is_hidden(path) and not by_muon else 0.0


def power_of(offsets, path):
    return sum(power for pattern, power in offsets.items() if fnmatch(path, pattern))


def optimizer_of(config, width):
    def scaled(path, update):
        name = path_of(path)
        return update * factor(width, config.base_rate(name) + power_of(config.rate, name))

    def hidden_matrices(params):
        muon = optax.contrib.MuonDimensionNumbers

        def chosen(path, leaf):
            return muon() if is_hidden(path_of(path)) and leaf.ndim == 2 else None

        return jax.tree.map_with_path(chosen, params)

    adam = partial(optax.scale_by_adam, eps=config.eps)
    direction = {
        "sgd": optax.identity,
        "momentum": partial(optax.trace, 0.9),
        "adam": adam,
        "adamw": lambda: optax.chain(adam(), optax.add_decayed_weights(0.01)),
        "muon": lambda: optax.chain(
            optax.contrib.muon(1.0, muon_weight_dimension_numbers=hidden_matrices), optax.scale(-1.0)
        ),
    }[config.optimizer]()
    by_layer = optax.stateless(lambda updates, params: jax.tree.map_with_path(scaled, updates))
    return optax.chain(direction, by_layer, optax.scale(-config.learning_rate))


# ------------------------------------------------------------------------------------------------------- configurations


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration.

    model, optimizer: see above.
    options: of the model.
    init, rate, scale: from patterns of parameters, or names of multipliers, to powers of the width that are wrong.
    cause: patterns of the parameters or activations that may be named; none if the configuration is right.
    """

    name: str
    half: str
    model: str
    optimizer: str
    cause: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    init: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rate: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    speed: float = 1.0  # of learning
    eps: float = 1e-8
    power: Callable[[str], float] | None = None  # of the width in learning rates, if it is another than in table 8

    @property
    def learning_rate(self):
        usual = {"sgd": 0.1, "momentum": 0.05, "adam": 2e-3, "adamw": 2e-3, "muon": 2e-2}
        return self.speed * usual[self.optimizer]

    def base_rate(self, path):
        return right_rate(self.optimizer, path) if self.power is None else self.power(path)

    def is_cause(self, name):
        return any(fnmatch(name, pattern) for pattern in self.cause)

    def make_model(self, width, rngs):
        if self.model == "linen":
            return LinenMLP(width, **self.options)
        model = MODELS[self.model](width, rngs, scale=self.scale, **self.options)
        params = nnx.state(model, nnx.Param)

        def planted(path, value):
            return value * factor(width, power_of(self.init, path_of(path)))

        nnx.update(model, jax.tree.map_with_path(planted, params))
        return model

    def check(self, **kwargs):
        """What `coord_check` says of it."""
        batch = BATCHES.get(self.model, vectors)()
        widths = (32, 64, 128) if self.model == "conv" else WIDTHS
        return rmsjax.coord_check(
            self.make_model, batch, make_optimizer=partial(optimizer_of, self), progress=False,
            loss=optax.softmax_cross_entropy_with_integer_labels, **{"widths": widths} | kwargs,
        )  # fmt: skip


def _ntk_rate(path):
    return -0.5 if is_hidden(path) else 0.0


def _ntk_sgd_rate(path):
    return 1.0 if is_hidden(path) else right_rate("sgd", path)


def _no_multiplier(path):
    """Adam's learning rates where the readout has no multiplier: its kernel is one with the power -1."""
    return -1.0 if path.endswith("kernel") and not path.startswith("embed") else 0.0


KERNELS = ("*block*/kernel",)
T, H = "tuned", "held-out"
RANDOM, AFTER = {"zero": False}, {"after": True}
READOUT = ("*readout*",)

RIGHT = [
    Config("Adam", T, "mlp", "adam"),
    Config("Adam, random readout", H, "mlp", "adam", options=RANDOM),
    Config("Adam, fast", T, "mlp", "adam", speed=4.0),
    Config("Adam, slow", H, "mlp", "adam", speed=0.25),
    Config("Adam, multiplier after the readout", T, "mlp", "adam", options=AFTER),
    Config("Adam, random readout, multiplier after it", H, "mlp", "adam", options=RANDOM | AFTER),
    Config("SGD", T, "mlp", "sgd"),
    Config("momentum", H, "mlp", "momentum"),
    Config("Muon", T, "mlp", "muon"),
    Config("Muon, random readout", H, "mlp", "muon", options=RANDOM),
    Config("AdamW, RMSNorm", T, "mlp", "adamw", options={"norm": "rms"}),
    Config("Adam, LayerNorm, gelu", H, "mlp", "adam", options={"norm": "layer", "activation": jax.nn.gelu}),
    Config("Adam, scanned blocks", T, "scan", "adam"),
    Config("Adam, Linen", H, "linen", "adam"),
    Config("Adam, multipliers before the hidden kernels", T, "mlp", "adam", options={"ntk": "before"},
           init={"block*/kernel": 0.5}, power=_ntk_rate),
    Config("Adam, multipliers after the hidden kernels", H, "mlp", "adam", options={"ntk": "after"},
           init={"block*/kernel": 0.5}, power=_ntk_rate),
    Config("Adam, tanh", T, "mlp", "adam", options={"activation": jnp.tanh}),
    Config("Adam, no multiplier, random readout", H, "mlp", "adam", options=RANDOM | {"power": 0.0},
           init={"readout/linear/kernel": -1.0}, power=_no_multiplier),
    Config("Adam", T, "transformer", "adam"),
    Config("Adam, random readout", H, "transformer", "adam", options=RANDOM),
    Config("Adam, random query", T, "transformer", "adam", options={"random_query": True}),
    Config("Adam, random query and readout, fast", H, "transformer", "adam",
           options=RANDOM | {"random_query": True}, speed=4.0),
    Config("Adam, tied", T, "transformer", "adam", options={"tied": True}),
    Config("AdamW, tied, two blocks", H, "transformer", "adamw", options={"tied": True, "blocks": 2}),
    Config("Muon", T, "transformer", "muon"),
    Config("AdamW, two blocks", H, "transformer", "adamw", options={"blocks": 2}),
    Config("Adam, Flax's attention", T, "transformer", "adam", options={"attention": "flax"}),
    Config("SGD", T, "transformer", "sgd"),
    Config("Adam", T, "conv", "adam"),
    Config("Adam, random readout", H, "conv", "adam", options=RANDOM),
    Config("SGD", T, "conv", "sgd"),
    Config("AdamW, no norm", H, "conv", "adamw", options={"norm": None}),
    Config("Muon, Adam's rates for kernels of four axes", T, "conv", "muon"),
    Config("momentum", H, "conv", "momentum"),
    # Written down when the rule had been fixed: optimizers with models, and options, that were not together above.
    Config("SGD, scanned blocks", H, "scan", "sgd"),
    Config("momentum, scanned blocks", H, "scan", "momentum"),
    Config("AdamW, scanned blocks, random readout", H, "scan", "adamw", options=RANDOM),
    Config("SGD, Linen", H, "linen", "sgd"),
    Config("momentum, Linen", H, "linen", "momentum"),
    Config("AdamW, Linen", H, "linen", "adamw"),
    Config("Muon, Linen", H, "linen", "muon"),
    Config("SGD, random readout", H, "mlp", "sgd", options=RANDOM),
    Config("SGD, LayerNorm", H, "mlp", "sgd", options={"norm": "layer"}),
    Config("momentum, RMSNorm", H, "mlp", "momentum", options={"norm": "rms"}),
    Config("Muon, RMSNorm, gelu", H, "mlp", "muon", options={"norm": "rms", "activation": jax.nn.gelu}),
    Config("AdamW, random readout, multiplier after it", H, "mlp", "adamw", options=RANDOM | AFTER),
    Config("Adam, LayerNorm, tanh", H, "mlp", "adam", options={"norm": "layer", "activation": jnp.tanh}),
    Config("Adam, three blocks, silu", H, "mlp", "adam", options={"blocks": 3, "activation": jax.nn.silu}),
    Config("AdamW, fast", H, "mlp", "adamw", speed=4.0),
    Config("momentum", T, "transformer", "momentum"),
    Config("Muon, random readout", H, "transformer", "muon", options=RANDOM),
    Config("Muon, tied", H, "transformer", "muon", options={"tied": True}),
    Config("AdamW, Flax's attention", H, "transformer", "adamw", options={"attention": "flax"}),
    Config("Adam, random query, two blocks", H, "transformer", "adam", options={"random_query": True, "blocks": 2}),
    Config("Adam, fast", H, "transformer", "adam", speed=4.0),
    Config("Adam, no norm, fast", H, "conv", "adam", options={"norm": None}, speed=4.0),
    Config("Muon, random readout", H, "conv", "muon", options=RANDOM),
    Config("SGD, random readout", H, "conv", "sgd", options=RANDOM),
    # Written down before there was a rule for steps that follow the gradient. Those that are tuned, here and among the
    # transformers above, were held out until this rule was made of them.
    Config("SGD, random query", H, "transformer", "sgd", options={"random_query": True}),
    Config("SGD, two blocks", T, "transformer", "sgd", options={"blocks": 2}),
    Config("SGD, tied", T, "transformer", "sgd", options={"tied": True}),
    Config("SGD, Flax's attention", H, "transformer", "sgd", options={"attention": "flax"}),
    Config("SGD, fast", H, "transformer", "sgd", speed=4.0),
    Config("momentum, random readout", T, "transformer", "momentum", options=RANDOM),
    Config("momentum, random query, two blocks", H, "transformer", "momentum",
           options={"random_query": True, "blocks": 2}),
    Config("SGD, multipliers before the hidden kernels", H, "mlp", "sgd", options={"ntk": "before"},
           init={"block*/kernel": 0.5}, power=_ntk_sgd_rate),
    Config("momentum, multipliers after the hidden kernels", H, "mlp", "momentum", options={"ntk": "after"},
           init={"block*/kernel": 0.5}, power=_ntk_sgd_rate),
    # Written down after it.
    Config("momentum, two blocks", H, "transformer", "momentum", options={"blocks": 2}),
    Config("SGD, random readout", H, "transformer", "sgd", options=RANDOM),
    Config("momentum, tied", H, "transformer", "momentum", options={"tied": True}),
    Config("momentum, Flax's attention, two blocks", H, "transformer", "momentum",
           options={"attention": "flax", "blocks": 2}),
    Config("SGD, random query and readout", H, "transformer", "sgd", options=RANDOM | {"random_query": True}),
    Config("momentum, random query, fast", H, "transformer", "momentum", options={"random_query": True}, speed=4.0),
]  # fmt: skip

MISTAKES = [
    # MLP: learning rates
    Config("hidden rates not divided", T, "mlp", "adam", KERNELS, rate={"block*/kernel": 1.0}),
    Config("hidden rates over the root", H, "mlp", "adam", KERNELS, rate={"block*/kernel": 0.5}),
    Config("one rate, +1/2", T, "mlp", "adam", ("block1/down*",), rate={"block1/down/kernel": 0.5}),
    Config("one rate, +1", H, "mlp", "adam", ("block0/up*",), rate={"block0/up/kernel": 1.0}),
    Config("one rate, -1", T, "mlp", "adam", ("block1/up*",), rate={"block1/up/kernel": -1.0}),
    Config("one rate, -1/2", H, "mlp", "adam", ("block0/down*",), rate={"block0/down/kernel": -0.5}),
    Config("biases' rate divided", T, "mlp", "adam", ("block*/bias",), rate={"block*/bias": -1.0}),
    Config("input bias' rate divided", H, "mlp", "adam", ("embed/bias",), rate={"embed/bias": -1.0}),
    Config("input's rate divided", T, "mlp", "adam", ("embed/kernel", "embed"), rate={"embed/kernel": -1.0}),
    Config("input's rate, +1/2", H, "mlp", "adam", ("embed/kernel", "embed"), rate={"embed/kernel": 0.5}),
    Config("readout's rate divided", T, "mlp", "adam", READOUT, rate={"readout/linear/kernel": -1.0}),
    Config("readout's rate over the root", H, "mlp", "adam", READOUT, rate={"readout/linear/kernel": -0.5}),
    Config("gains' rate divided", T, "mlp", "adam", ("*scale",), {"norm": "rms"}, rate={"*scale": -1.0}),
    Config("gains' rate times the root", H, "mlp", "adam", ("*scale",), {"norm": "layer"}, rate={"*scale": 0.5}),
    Config("one learning rate", T, "mlp", "sgd", ("embed*", "*bias", *READOUT), rate={"*": -1.0, "block*/kernel": 1.0,
           "readout/linear/bias": 1.0}),
    Config("hidden rates times the root", H, "mlp", "sgd", KERNELS, rate={"block*/kernel": 0.5}),
    Config("biases' rate not multiplied", T, "mlp", "sgd", ("block*/bias",), rate={"block*/bias": -1.0}),
    Config("input's rate not multiplied", H, "mlp", "sgd", ("embed/kernel", "embed"), rate={"embed/kernel": -1.0}),
    Config("readout's rate, -1/2", T, "mlp", "sgd", READOUT, rate={"readout/linear/kernel": -0.5}),
    Config("one rate, +1", H, "mlp", "momentum", ("block1/up*",), rate={"block1/up/kernel": 1.0}),
    Config("hidden rates as Adam's", T, "mlp", "muon", KERNELS, rate={"block*/kernel": -1.0}),
    Config("hidden rates times the root", H, "mlp", "muon", KERNELS, rate={"block*/kernel": 0.5}),
    Config("biases' rate divided", T, "mlp", "muon", ("*bias",), rate={"block*/bias": -1.0, "embed/bias": -1.0}),
    Config("readout's rate times the root", H, "mlp", "muon", READOUT, rate={"readout/linear/kernel": 0.5}),
    Config("hidden rates not divided", T, "mlp", "adamw", KERNELS, rate={"block*/kernel": 1.0}),
    Config("the second block's rates, -1/2", H, "mlp", "adamw", ("block1*",), rate={"block1*kernel": -0.5}),
    Config("hidden rates not divided", T, "scan", "adam", ("blocks*kernel*",), rate={"blocks*kernel": 1.0}),
    Config("one stacked rate, -1", H, "scan", "adam", ("blocks/down*",), rate={"blocks/down/kernel": -1.0}),
    Config("one rate, +1/2", T, "linen", "adam", ("up1*",), rate={"up1/kernel": 0.5}),
    Config("standard parametrisation", H, "linen", "adam", ("up*", "down*", "readout*"), {"power": 0.0},
           rate={"up*kernel": 1.0, "down*kernel": 1.0}),
    # MLP: initial values and multipliers
    Config("input std over the root", T, "mlp", "adam", ("embed*",), init={"embed/kernel": -0.5}),
    Config("input std times the root", H, "mlp", "adam", ("embed*",), init={"embed/kernel": 0.5}),
    Config("one std constant", T, "mlp", "adam", ("block1/down*",), init={"block1/down/kernel": 0.5}),
    Config("one std over the width", H, "mlp", "adam", ("block0/up*",), init={"block0/up/kernel": -0.5}),
    Config("no multiplier", T, "mlp", "adam", READOUT, scale={"readout": 1.0}),
    Config("multiplier over the root", H, "mlp", "adam", READOUT, scale={"readout": 0.5}),
    Config("readout std too large", T, "mlp", "adam", READOUT, RANDOM, init={"readout/linear/kernel": 0.5}),
    Config("no multiplier, readout std over the root", H, "mlp", "adam", READOUT, RANDOM | {"power": 0.0},
           init={"readout/linear/kernel": -0.5}, power=_no_multiplier),
    Config("one std over the width", T, "mlp", "sgd", ("block0/down*",), init={"block0/down/kernel": -0.5}),
    Config("readout std too large", H, "mlp", "sgd", READOUT, RANDOM, init={"readout/linear/kernel": 0.5}),
    Config("one std constant", T, "mlp", "muon", ("block0/up*",), init={"block0/up/kernel": 0.5}),
    Config("input std over the root", H, "mlp", "muon", ("embed*",), init={"embed/kernel": -0.5}),
    Config("Adam's eps 1e-4", T, "mlp", "adam", (*KERNELS, "*embed*", "*bias"), eps=1e-4),
    Config("Adam's eps 1e-5", H, "mlp", "adam", (*KERNELS, "*embed*", "*bias"), eps=1e-5),
    # transformer
    Config("scores over the root", T, "transformer", "adam", ("*scores", "*query*", "*key*"), scale={"scores": 0.5}),
    Config("scores over the root, random query", H, "transformer", "adam", ("*scores", "*query*", "*key*"),
           {"random_query": True}, scale={"scores": 0.5}),
    Config("hidden rates not divided", T, "transformer", "adam", ("attention*", "mlp*"), rate={"*/kernel": 1.0,
           "readout*kernel": -1.0}),
    Config("attention's rates over the root", H, "transformer", "adam", ("attention*",),
           rate={"attention*kernel": 0.5}),
    Config("query's rate, -1", T, "transformer", "adam", ("attention0/query*",), {"random_query": True},
           rate={"attention0/query/kernel": -1.0}),
    Config("value's rate, +1", H, "transformer", "adam", ("attention0/value*",),
           rate={"attention0/value/kernel": 1.0}),
    Config("gains' rate divided", T, "transformer", "adam", ("*scale",), rate={"*scale": -1.0}),
    Config("last gain's rate divided", H, "transformer", "adam", ("norm/scale",), rate={"norm/scale": -1.0}),
    Config("embedding std over the root", T, "transformer", "adam", ("embed*",), init={"embed/embedding": -0.5}),
    Config("embedding's rate divided", H, "transformer", "adam", ("embed*",), rate={"embed/embedding": -1.0}),
    Config("position's rate times the root", T, "transformer", "adam", ("position*",),
           rate={"position/embedding": 0.5}),
    Config("position std over the root", H, "transformer", "adam", ("position*",), init={"position/embedding": -0.5}),
    Config("no multiplier", T, "transformer", "adam", READOUT, scale={"readout": 1.0}),
    Config("readout std too large", H, "transformer", "adam", READOUT, RANDOM, init={"readout/linear/kernel": 0.5}),
    Config("tied, no multiplier", T, "transformer", "adam", ("embed*", "Transformer"), {"tied": True},
           scale={"readout": 1.0}),
    Config("tied, multiplier over the root", H, "transformer", "adam", ("embed*", "Transformer"), {"tied": True},
           scale={"readout": 0.5}),
    Config("one std constant", T, "transformer", "adam", ("mlp0/down*",), init={"mlp0/down/kernel": 0.5}),
    Config("one rate, -1", H, "transformer", "adam", ("mlp0/up*",), rate={"mlp0/up/kernel": -1.0}),
    Config("hidden rates as Adam's", T, "transformer", "muon", ("attention*", "mlp*"), rate={"attention*kernel": -1.0,
           "mlp*kernel": -1.0}),
    Config("embedding's rate times the root", H, "transformer", "muon", ("embed*",), rate={"embed/embedding": 0.5}),
    Config("hidden rates times the root", T, "transformer", "sgd", ("attention*", "mlp*"),
           rate={"attention*kernel": 0.5, "mlp*kernel": 0.5}),
    Config("embedding's rate not multiplied", H, "transformer", "sgd", ("embed*",), rate={"embed/embedding": -1.0}),
    Config("hidden rates not divided, Flax's attention", T, "transformer", "adam", ("attention*", "mlp*"),
           {"attention": "flax"}, rate={"attention*kernel": 1.0, "mlp*kernel": 1.0}),
    Config("query's rate, +1, Flax's attention", H, "transformer", "adam", ("attention0/attention/query*",),
           {"attention": "flax"}, rate={"attention0/attention/query/kernel": 1.0}),
    Config("standard parametrisation", T, "transformer", "adamw", ("attention*", "mlp*", *READOUT),
           RANDOM | {"random_query": True}, init={"readout/linear/kernel": -0.5}, scale={"readout": 1.0, "scores": 0.5},
           rate={"attention*kernel": 1.0, "mlp*kernel": 1.0}),
    Config("the MLP's rates not divided", H, "transformer", "adamw", ("mlp*",), rate={"mlp*kernel": 1.0}),
    # convolution
    Config("hidden rates not divided", T, "conv", "adam", KERNELS, rate={"block*/kernel": 1.0}),
    Config("one rate, +1/2", H, "conv", "adam", ("block1/first*",), rate={"block1/first/kernel": 0.5}),
    Config("stem std over the root", T, "conv", "adam", ("stem*",), init={"stem/kernel": -0.5}),
    Config("stem's rate divided", H, "conv", "adam", ("stem*",), rate={"stem/kernel": -1.0}),
    Config("no multiplier", T, "conv", "adam", READOUT, scale={"readout": 1.0}),
    Config("readout std too large", H, "conv", "adam", READOUT, RANDOM, init={"readout/linear/kernel": 0.5}),
    Config("one std constant", T, "conv", "adam", ("block0/second*",), init={"block0/second/kernel": 0.5}),
    Config("one std over the width", H, "conv", "adam", ("block1/first*",), init={"block1/first/kernel": -0.5}),
    Config("biases' rate divided", T, "conv", "adam", ("*bias",), rate={"block*/bias": -1.0}),
    Config("gains' rate divided", H, "conv", "adam", ("*scale",), rate={"*norm/scale": -1.0}),
    Config("hidden rates times the root", T, "conv", "sgd", KERNELS, rate={"block*/kernel": 0.5}),
    Config("stem's rate not multiplied", H, "conv", "sgd", ("stem*",), rate={"stem/kernel": -1.0}),
    Config("kernels of four axes left to Adam undivided", T, "conv", "muon", KERNELS, rate={"block*/kernel": 1.0}),
    Config("one rate, -1", H, "conv", "adamw", ("block0/second*",), rate={"block0/second/kernel": -1.0}),
    # SGD and momentum: written down before there was a rule for steps that follow the gradient, the last four after it
    Config("query's rate over the root", H, "transformer", "sgd", ("attention0/query*",),
           rate={"attention0/query/kernel": -0.5}),
    Config("query's rate divided, random query", H, "transformer", "sgd", ("attention0/query*",),
           {"random_query": True}, rate={"attention0/query/kernel": -1.0}),
    Config("query's rate over the root", H, "transformer", "momentum", ("attention0/query*",),
           rate={"attention0/query/kernel": -0.5}),
    Config("key's rate divided, random query", H, "transformer", "momentum", ("attention0/key*",),
           {"random_query": True}, rate={"attention0/key/kernel": -1.0}),
    Config("query's rate, +1, random query", H, "transformer", "sgd", ("attention0/query*",),
           {"random_query": True}, rate={"attention0/query/kernel": 1.0}),
    Config("scores over the root, random query", H, "transformer", "sgd", ("*scores", "*query*", "*key*"),
           {"random_query": True}, scale={"scores": 0.5}),
    Config("value's rate divided", H, "transformer", "sgd", ("attention0/value*",),
           rate={"attention0/value/kernel": -1.0}),
    Config("the MLP's rates over the root", H, "transformer", "momentum", ("mlp*",), rate={"mlp*kernel": -0.5}),
    Config("multiplier over the root", H, "transformer", "sgd", READOUT, scale={"readout": 0.5}),
    Config("tied, no multiplier", H, "transformer", "momentum", ("embed*", "Transformer"), {"tied": True},
           scale={"readout": 1.0}),
    Config("hidden rates over the root, multipliers before the kernels", H, "mlp", "sgd", KERNELS, {"ntk": "before"},
           init={"block*/kernel": 0.5}, rate={"block*/kernel": -0.5}, power=_ntk_sgd_rate),
    Config("scores too small by the root", H, "transformer", "sgd", ("*scores", "*query*", "*key*"),
           scale={"scores": -0.5}),
    Config("a query's rate divided, two blocks", H, "transformer", "momentum", ("attention1/query*",), {"blocks": 2},
           rate={"attention1/query/kernel": -1.0}),
    Config("multiplier too small by the root", H, "transformer", "momentum", READOUT, scale={"readout": -0.5}),
    Config("tied, multiplier over the root", H, "transformer", "sgd", ("embed*", "Transformer"), {"tied": True},
           scale={"readout": 0.5}),
]  # fmt: skip
