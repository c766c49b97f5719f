"""What pdoc needs in order to show the public names as they are; only imported where pdoc runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib import import_module
from typing import Any, get_type_hints


def prepare(package: dict[str, Any], names: Iterable[str]) -> None:
    """Load these names into the dict of the package, where pdoc looks for them: it asks no `__getattr__`.

    The constructor of a NamedTuple has the annotations of its fields as strings, and pdoc would resolve them in the
    namespace of `collections.namedtuple`: they are resolved here, in that of their module.
    """
    for name in names:
        package[name] = value = getattr(import_module(package["__name__"]), name)
        for member in vars(value).values() if inspect.ismodule(value) else [value]:
            if inspect.isclass(member) and hasattr(member, "_fields"):
                member.__new__.__annotations__ = get_type_hints(member)
