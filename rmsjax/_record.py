"""Records of experiments: data classes of arrays and texts, which are kept in one file."""

from __future__ import annotations

import dataclasses
import math
import zipfile
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
        """The record that `save` wrote; what an earlier version did not write has its default.

        Raises:
            ValueError: a file that holds something else.
        """
        fields = dataclasses.fields(cls)
        needed = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
        with open(path, "rb") as file:
            is_archive = zipfile.is_zipfile(file)
        names: list[str] = []
        if is_archive:
            with np.load(path, allow_pickle=False) as arrays:
                names = list(arrays)
                if needed <= {*names}:
                    found = {field.name: arrays[field.name] for field in fields if field.name in names}
                    return cls(**{name: _texts(x) if x.dtype.kind == "U" else x for name, x in found.items()})
        holds = f"one with {', '.join(names)}" if names else "another file"
        raise ValueError(f"{cls.__name__}: path must be a file that {cls.__name__}.save wrote, got {holds}: {path!s}")


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
