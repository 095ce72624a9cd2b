"""A room's public names, imported when they are first used (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def imported_on_first_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that imports each of its public names from its home at the first use.

    Args:
        package: the package's own `__name__`.
        homes: the module each public name lives in, relative to the package: `{"fuse": "fusing"}`.

    Returns:
        A function of a name, which raises AttributeError for one without a home, as a module does.
    """

    def attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return attribute
