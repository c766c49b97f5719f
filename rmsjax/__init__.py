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
    from rmsjax import geometry as geometry
    from rmsjax import linen as linen
    from rmsjax import nnx as nnx
    from rmsjax import penalties as penalties
    from rmsjax import plot as plot
    from rmsjax import probe as probe
    from rmsjax import report as report
    from rmsjax import testing as testing
    from rmsjax import transforms as transforms
    from rmsjax._coord_check import WidthRecord as WidthRecord
    from rmsjax._coord_check import compare_widths as compare_widths
    from rmsjax._coord_check import coord_check as coord_check
    from rmsjax._operator_norm import rms_operator_norm as rms_operator_norm
    from rmsjax._operator_norm import rms_operator_norm_by_path as rms_operator_norm_by_path
    from rmsjax.penalties import rms_penalty as rms_penalty
    from rmsjax.probe import activation_rms as activation_rms
    from rmsjax.probe import gradient_rms as gradient_rms
    from rmsjax.report import RMSReport as RMSReport
    from rmsjax.report import rms_report as rms_report
    from rmsjax.transforms import ClipByRelativeRMSState as ClipByRelativeRMSState
    from rmsjax.transforms import ClipByRMSState as ClipByRMSState
    from rmsjax.transforms import NormalizeByRMSState as NormalizeByRMSState
    from rmsjax.transforms import RecordRMSState as RecordRMSState
    from rmsjax.transforms import ScaleByStableAdamState as ScaleByStableAdamState
    from rmsjax.transforms import clip_by_relative_rms as clip_by_relative_rms
    from rmsjax.transforms import clip_by_rms as clip_by_rms
    from rmsjax.transforms import normalize_by_rms as normalize_by_rms
    from rmsjax.transforms import record_rms as record_rms
    from rmsjax.transforms import rms_states as rms_states
    from rmsjax.transforms import scale_by_stable_adam as scale_by_stable_adam
    from rmsjax.transforms import stable_adamw as stable_adamw

__version__ = "0.1.0"

# These load on first use, since they import flax, optax or matplotlib, and most programs use only some of them.
_SUBMODULES = ("geometry", "linen", "nnx", "penalties", "plot", "probe", "report", "testing", "transforms")
_HOMES = {
    "ClipByRMSState": "transforms",
    "ClipByRelativeRMSState": "transforms",
    "NormalizeByRMSState": "transforms",
    "RMSReport": "report",
    "RecordRMSState": "transforms",
    "ScaleByStableAdamState": "transforms",
    "WidthRecord": "_coord_check",
    "activation_rms": "probe",
    "clip_by_relative_rms": "transforms",
    "clip_by_rms": "transforms",
    "compare_widths": "_coord_check",
    "coord_check": "_coord_check",
    "gradient_rms": "probe",
    "normalize_by_rms": "transforms",
    "record_rms": "transforms",
    "rms_operator_norm": "_operator_norm",
    "rms_operator_norm_by_path": "_operator_norm",
    "rms_penalty": "penalties",
    "rms_report": "report",
    "rms_states": "transforms",
    "scale_by_stable_adam": "transforms",
    "stable_adamw": "transforms",
}


def __getattr__(name: str) -> _Any:
    if name in _SUBMODULES:
        return _import_module(f"rmsjax.{name}")
    if name in _HOMES:
        return getattr(_import_module(f"rmsjax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rmsjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES, *_HOMES])
