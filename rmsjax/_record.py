"""Records of experiments: data classes of arrays and texts, which are kept in one file."""

from __future__ import annotations

import dataclasses
import math
from os import PathLike
from typing import Any, Self

import numpy as np
from scipy.special import stdtrit  # jax brings scipy, as it does numpy


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Record:
    """What can be saved and loaded. Fields are arrays, texts or tuples of texts."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write the record to one .npz file, at exactly this path."""
        arrays: dict[str, Any] = {
            field.name: _as_array(getattr(self, field.name)) for field in dataclasses.fields(self)
        }
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """The record that `save` wrote; what an earlier version did not write has its default."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {field.name: file[field.name] for field in dataclasses.fields(cls) if field.name in file}
        return cls(**{name: _texts(values) if values.dtype.kind == "U" else values for name, values in arrays.items()})


def _as_array(value: Any) -> np.ndarray:
    return np.asarray(value, dtype=np.str_ if isinstance(value, tuple) else None)  # also where there are none


def _texts(values: np.ndarray) -> Any:
    """A text, or a tuple of them."""
    return tuple(values.tolist()) if values.ndim else values.item()


def half_interval(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % interval of Student's t around the mean over the first axis; inf of a single value."""
    count = len(values)
    if count == 1:
        return np.full(values.shape[1:], np.inf)
    return stdtrit(count - 1, 0.975) * np.std(values, axis=0, ddof=1) / math.sqrt(count)
