r"""RMS, the width-neutral ruler for neural networks, for JAX: measure, normalise, clip, regularise and check widths.

The RMS norm is the size of a typical element: $\|x\|_{RMS} = \|x\|_2 / \sqrt n = \sqrt{\tfrac1n \sum_i |x_i|^2}$. Of
independent coordinates with mean 0 and variance 1 it is about 1 at every width, and up to a constant it is the only
rotation-invariant norm of which that is true. So one number means the same in a narrow layer and in a wide one.

>>> import jax.numpy as jnp, optax, rmsjax
>>> grads = {"bias": jnp.zeros(4), "kernel": jnp.full((8, 4), 3.0)}
>>> print(rmsjax.rms(grads["kernel"]), rmsjax.tree_rms(grads))
3.0 2.828427

## What is where

- **Arrays**: `rms` is the number, `rms_normalize` divides by it. The layers are `rmsjax.nnx.RMSNorm` and
  `rmsjax.linen.RMSNorm`; they take the place of Flax's.
- **Trees** of arrays, such as parameters or gradients: `tree_rms` gives norms as a tree, `rms_by_path` as a dict for a
  logger, `rms_report` as a table to read; both show layers that are stacked in one array one by one. `rms_penalty` is
  a regulariser.
- **optax**: clips and optimizers that keep training steady, see the table below. All keep what they saw in their state,
  and `rms_states` finds it there.
- **Widths**: `coord_check` trains a model at several widths (or depths) and names what depends on it;
  `compare_widths` measures models as they are. Both give a `WidthRecord`, which `rmsjax.plot` draws. `lr_sweep` trains
  at many learning rates, and says how far the best one moves from width to width, in a `SweepRecord`.
- **Inside a model**: `activation_rms` and `gradient_rms` measure every activation of an unchanged Flax model;
  `rmsjax.probe` does it for any function. `rms_operator_norm` tells how much a kernel can stretch the norm.
- **Why this norm**: `rmsjax.geometry` has the theorems as functions, `rmsjax.testing` as assertions for your own code.

## Which transformation to take

| if you want | take |
|---|---|
| the clip that you have, with an optax bound | `clip_by_global_norm(1.0)` |
| a bound that carries over from one width and number of parameters to another | `clip_by_rms(1e-2)` |
| no bound to find, and broken batches that do no harm | `clip_by_history()`, with a warm-up |
| no tensor to change by more than a share of its size in a step | `clip_by_relative_rms(0.1)` |
| AdamW without loss spikes, and nothing to tune | `stable_adamw(1e-3)` in place of `optax.adamw` |
| weights that keep their size, without weight decay | `hyperball(optax.adam(1e-3), 1e-2)`, around any optimizer |
| all tensors to take steps of one size, as after Muon | `normalize_by_rms(0.2)` |
| to see the norms and change nothing | `record_rms()` |

Against a broken batch, put a clip before the optimizer, whose averages would remember it. What is not finite no clip
hides: `optax.apply_if_finite` around all leaves such steps out.

## Scope: which elements share a norm

All functions of trees, and all transformations of updates, take a `scope`, but `clip_by_global_norm`, which has one
norm of all elements, and `rms_operator_norm_by_path`, which has one for each kernel:

- `"global"`: all elements of all leaves together, one number;
- `"block"`: each leaf by itself;
- an axis or a tuple of them: each leaf over these axes, `(1, 2)` for one norm per layer of a stacked leaf `[L, m, n]`;
- a function of path and leaf, which chooses one of these for each leaf, or a label; leaves with one label go together.

>>> tx = optax.chain(rmsjax.record_rms("block"), rmsjax.clip_by_rms(1.0, "global"), optax.sgd(0.1))
>>> updates, state = tx.update(grads, tx.init(grads))
>>> recorded, clip = rmsjax.rms_states(state).values()
>>> print(recorded.rms["kernel"], clip.rms, clip.num_clipped)
3.0 2.828427 1

The default is what each is mostly used for. A gradient has one norm, and a clip one factor: `tree_rms` and
`clip_by_rms` are "global". Tensors are logged, compared with their parameters, set to a size and regularised one by
one: the others are "block".

## What holds everywhere

- Right for every finite input whose numbers are normal, also where squares overflow or underflow; sums in float32 at
  least. Norms are float32 (float64 for float64), arrays and updates keep their dtype. Subnormal numbers count as 0
  where XLA flushes them, as on CPU.
- Zero is a legal value, with finite derivatives of every order. NaN and inf stay visible.
- All works under `jit`, `vmap`, `grad`, `scan`, `shard_map`, and on sharded arrays. Under `jit` a norm is that of the
  whole array; under `shard_map` and `pmap` name the axes that it is split over in `axis_name`.
- Thresholds and targets may be traced, and so be set by `optax.inject_hyperparams`.
- A wrong argument is an error that names function and argument, what was expected, what came, and what to do.

## What is stable

Public is what `dir()` of `rmsjax` and of its modules shows. Until 1.0 a minor version (0.2, 0.3) may change a public
name, an argument, a field of a state or a default, and the list of changes says how to go on; a patch (0.1.1) never
does. Numbers may change in their last digits with any version, and so may text that is for people: tables, messages,
pictures. What a record saved, later versions load. Names with an underscore, and modules that are not listed,
may change at any time.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from rmsjax._by_path import rms_by_path as rms_by_path
from rmsjax._norm import rms as rms
from rmsjax._norm import rms_normalize as rms_normalize
from rmsjax._tree import Scope as _Scope
from rmsjax._tree import tree_rms as tree_rms

Scope: TypeAlias = _Scope
"""Which elements of a tree share a norm; the guide above says what each kind means."""

__version__ = "0.1.0"

# Where each name is defined, in the order of the documentation. All but arrays and trees load on first use, since they
# import flax, optax or matplotlib, and most programs use only some of them.
_HOMES = {
    "_norm": ("rms", "rms_normalize"),
    "_tree": ("tree_rms", "Scope"),
    "_by_path": ("rms_by_path",),
    "report": ("rms_report", "RMSReport", "RMSRow"),
    "penalties": ("rms_penalty",),
    "_clips": (
        *("clip_by_rms", "clip_by_global_norm", "clip_by_relative_rms", "clip_by_history"),
        *("ClipByRMSState", "ClipByRelativeRMSState", "ClipByHistoryState"),
    ),
    "_transforms": ("normalize_by_rms", "record_rms", "rms_states", "NormalizeByRMSState", "RecordRMSState"),
    "_stable_adam": ("stable_adamw", "scale_by_stable_adam", "ScaleByStableAdamState"),
    "_hyperball": ("hyperball", "HyperballState"),
    "_coord_check": ("coord_check", "compare_widths", "WidthRecord"),
    "_lr_sweep": ("lr_sweep", "SweepRecord"),
    "probe": ("activation_rms", "gradient_rms"),
    "_operator_norm": ("rms_operator_norm", "rms_operator_norm_by_path"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("nnx", "linen", "probe", "plot", "geometry", "testing")

# Without matplotlib, of the extra "demo", `from rmsjax import *` would stop at plot.
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]  # type checkers have the imports below
    *_HOME_OF,
    *(name for name in _MODULES if name != "plot" or find_spec("matplotlib")),
]

if TYPE_CHECKING:
    from rmsjax import geometry as geometry
    from rmsjax import linen as linen
    from rmsjax import nnx as nnx
    from rmsjax import plot as plot
    from rmsjax import probe as probe
    from rmsjax import testing as testing
    from rmsjax._clips import ClipByHistoryState as ClipByHistoryState
    from rmsjax._clips import ClipByRelativeRMSState as ClipByRelativeRMSState
    from rmsjax._clips import ClipByRMSState as ClipByRMSState
    from rmsjax._clips import clip_by_global_norm as clip_by_global_norm
    from rmsjax._clips import clip_by_history as clip_by_history
    from rmsjax._clips import clip_by_relative_rms as clip_by_relative_rms
    from rmsjax._clips import clip_by_rms as clip_by_rms
    from rmsjax._coord_check import WidthRecord as WidthRecord
    from rmsjax._coord_check import compare_widths as compare_widths
    from rmsjax._coord_check import coord_check as coord_check
    from rmsjax._hyperball import HyperballState as HyperballState
    from rmsjax._hyperball import hyperball as hyperball
    from rmsjax._lr_sweep import SweepRecord as SweepRecord
    from rmsjax._lr_sweep import lr_sweep as lr_sweep
    from rmsjax._operator_norm import rms_operator_norm as rms_operator_norm
    from rmsjax._operator_norm import rms_operator_norm_by_path as rms_operator_norm_by_path
    from rmsjax._stable_adam import ScaleByStableAdamState as ScaleByStableAdamState
    from rmsjax._stable_adam import scale_by_stable_adam as scale_by_stable_adam
    from rmsjax._stable_adam import stable_adamw as stable_adamw
    from rmsjax._transforms import NormalizeByRMSState as NormalizeByRMSState
    from rmsjax._transforms import RecordRMSState as RecordRMSState
    from rmsjax._transforms import normalize_by_rms as normalize_by_rms
    from rmsjax._transforms import record_rms as record_rms
    from rmsjax._transforms import rms_states as rms_states
    from rmsjax.penalties import rms_penalty as rms_penalty
    from rmsjax.probe import activation_rms as activation_rms
    from rmsjax.probe import gradient_rms as gradient_rms
    from rmsjax.report import RMSReport as RMSReport
    from rmsjax.report import RMSRow as RMSRow
    from rmsjax.report import rms_report as rms_report
else:  # a type checker that saw this function would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"rmsjax.{name}")
        if name in _HOME_OF:
            return getattr(import_module(f"rmsjax.{_HOME_OF[name]}"), name)
        raise AttributeError(f"module 'rmsjax' has no attribute {name!r}")

    if "pdoc" in sys.modules:
        import_module("rmsjax._documentation").prepare(globals(), __all__)


def __dir__() -> list[str]:
    return sorted(__all__)
