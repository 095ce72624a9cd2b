"""Errors a user can cause or must see. Each message says what, what was got, what is allowed, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraKitError(Exception):
    """Root of the family. The command line prints the message alone and exits with `exit_status`."""

    exit_status = 2


class RecipeError(LoraKitError):
    """The recipe, an override or a command's argument is wrong."""


class ModelError(LoraKitError):
    """A base model cannot be found, recognised or loaded."""


class TargetError(LoraKitError):
    """A rule picks nothing, is shadowed, or a layer cannot take what the rule asks for."""


class DataError(LoraKitError):
    """A data source, a picture or a caption is missing or unreadable."""


class AdapterFileError(LoraKitError):
    """An adapter file is damaged, in an unknown layout, or does not fit the model."""


class TrainingError(LoraKitError):
    """The run cannot go on: a non-finite loss, a checkpoint that does not fit."""

    exit_status = 1


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of `names` that look most like `name`, best first; for "did you mean"."""
    return difflib.get_close_matches(name, list(names), n=count, cutoff=0.5)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """ " Did you mean a, b?" with a leading space, or nothing."""
    found = nearest(name, names)
    return f" Did you mean {', '.join(found)}?" if found else ""
