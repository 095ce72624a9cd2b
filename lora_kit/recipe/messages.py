"""What is wrong with a recipe, in words: pydantic's errors become problems, and problems one RecipeError."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeGuard, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lora_kit.errors import RecipeError, did_you_mean
from lora_kit.recipe.base import Problem, Section, shown
from lora_kit.recipe.rules import SECTION_OF_TAG
from lora_kit.recipe.sections import Recipe
from lora_kit.recipe.validation import HELD_OUT_TAGS

_TAGS = {**SECTION_OF_TAG, **HELD_OUT_TAGS}
_NUMBER = re.compile(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?")
_ALLOWED = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping (`key: value`)",
    "model_type": "must be a mapping (`key: value`)",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "multiple_of": "must be a multiple of {multiple_of:g}",
    "too_short": "must have at least {min_length} item(s)",
    "too_long": "must have at most {max_length} item(s)",
}
_MISSING: dict[tuple[str, ...], str] = {
    ("data",): "the pictures to train on, such as `data: {sources: [{path: my_pictures}]}`",
    ("data", "sources"): "the pictures to train on, such as `sources: [{path: my_pictures}]`",
}


def problems_in(error: ValidationError) -> list[Problem]:
    """Each of pydantic's errors, with its path in the recipe's own keys."""
    return [_problem(details) for details in error.errors(include_url=False)]


def recipe_error(name: str, problems: Sequence[Problem]) -> RecipeError:
    """One error that lists all problems of the recipe `name`, a line each."""
    lines = dict.fromkeys(_line(problem) for problem in problems)
    count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
    return RecipeError("\n".join([f"{count} in {name}:", *lines]))


def _line(problem: Problem) -> str:
    path = ".".join(map(str, problem.path))
    return f"  {path}: {problem.message}" if path else f"  {problem.message}"


def _problem(details: ErrorDetails) -> Problem:
    path = tuple(part for part in details["loc"] if not _is_tag(part))
    return Problem(path, _message(details, path))


def _message(details: ErrorDetails, path: tuple[str | int, ...]) -> str:
    kind, context, got = details["type"], details.get("ctx", {}), details["input"]
    if kind == "check":
        return details["msg"]
    if kind == "missing":
        hint = _MISSING.get(tuple(map(str, path)))
        return f"needed, but not given: {hint}." if hint else "needed, but not given."
    if kind == "extra_forbidden":
        return _unknown_key(details["loc"])
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"got {shown(got)}; allowed: {', '.join(allowed)}.{did_you_mean(str(got), allowed)}"
    if kind in _ALLOWED:
        return f"got {shown(got)}; {_ALLOWED[kind].format(**context)}.{_fix(kind, got)}"
    return f"got {shown(got)}; {details['msg']}"


def _unknown_key(loc: tuple[int | str, ...]) -> str:
    section = _section_at(loc[:-1])
    keys = list(section.model_fields)
    return f"unknown key.{did_you_mean(str(loc[-1]), keys)} Allowed here: {', '.join(keys)}."


def _section_at(loc: tuple[int | str, ...]) -> type[Section]:
    """The section that an error path leads to."""
    section: type[Section] = Recipe
    for part in loc:
        if isinstance(part, str) and part in _TAGS:
            section = _TAGS[part]
        elif isinstance(part, str) and part in section.model_fields:
            found = _sections_in(section.model_fields[part].annotation)
            section = found[0] if found else section
    return section


def _sections_in(annotation: Any) -> list[type[Section]]:
    """The section types a field's annotation is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _is_tag(part: object) -> TypeGuard[str]:
    """Whether pydantic, not the recipe, put this into an error path (see rules.py)."""
    return isinstance(part, str) and part.startswith("<") and part.endswith(">")


def _fix(kind: str, got: object) -> str:
    """What to write instead, where the value says what was meant."""
    if kind == "bool_type" and isinstance(got, str) and got.lower() in ("yes", "on", "y", "no", "off", "n"):
        return f" Write {'true' if got.lower() in ('yes', 'on', 'y') else 'false'}."
    if kind == "int_type" and isinstance(got, float) and got.is_integer():
        return f" Write {got:.0f}."
    if kind in ("int_type", "float_type") and isinstance(got, str) and _NUMBER.fullmatch(got):
        return f" Write {got} without quotes."
    if kind == "string_type" and isinstance(got, bool | int | float):
        return f' Write it in quotes: "{shown(got)}".'
    if kind in ("list_type", "tuple_type") and isinstance(got, str | int | float | bool):
        return f" Write [{shown(got)}]."
    return ""
