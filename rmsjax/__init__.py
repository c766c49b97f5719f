"""RMS, the width-neutral ruler for neural networks, for JAX: measure, normalise and clip by one norm."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from rmsjax._norm import rms as rms
from rmsjax._norm import rms_normalize as rms_normalize
from rmsjax._tree import Scope as Scope
from rmsjax._tree import rms_by_path as rms_by_path
from rmsjax._tree import tree_rms as tree_rms

if _TYPE_CHECKING:
    from rmsjax import linen as linen
    from rmsjax import nnx as nnx
    from rmsjax import transforms as transforms
    from rmsjax.transforms import ClipByRMSState as ClipByRMSState
    from rmsjax.transforms import clip_by_rms as clip_by_rms

__version__ = "0.1.0"

# These load on first use, since they import flax, optax or matplotlib, and most programs use only some of them.
_SUBMODULES = ("linen", "nnx", "transforms")
_HOMES = {
    "ClipByRMSState": "transforms",
    "clip_by_rms": "transforms",
}


def __getattr__(name: str) -> _Any:
    if name in _SUBMODULES:
        return _import_module(f"rmsjax.{name}")
    if name in _HOMES:
        return getattr(_import_module(f"rmsjax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rmsjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES, *_HOMES])
