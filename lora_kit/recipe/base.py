"""What every section of a recipe shares: the base class, number types, and how checks refuse."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
PathText = Annotated[str, Field(min_length=1)]
Method = Literal["lora", "rslora", "dora", "loha", "lokr", "oft", "boft", "diff", "full"]
Precision = Literal["fp32", "bf16", "fp16"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
EMBEDDING_FILES = (".safetensors", ".pt", ".bin")
"""What a learned token's file may end in."""


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, no silent conversions (`true` is not 1)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Problem(NamedTuple):
    """One thing wrong with a recipe."""

    path: tuple[str | int, ...]
    """Keys and list indices from the recipe's root (or from the section that checks itself)."""
    message: str
    """What was got, what is allowed, and the fix."""


def refuse(section: str, problems: Iterable[Problem]) -> None:
    """Raise one ValidationError with all problems; nothing if there are none.

    For use in pydantic validators, where the enclosing sections put their own keys before each path.
    """
    details = [
        # The message is a template to pydantic: given as a value, its own braces stay as they are.
        InitErrorDetails(type=PydanticCustomError("check", "{said}", {"said": message}), loc=path, input=None)
        for path, message in problems
    ]
    if details:
        raise ValidationError.from_exception_data(section, details)


def shown(value: object) -> str:
    """The value as it would stand in a recipe, cut to a line's length; for messages."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}…"


def idle(section: Section, keys: Iterable[str], why: str) -> Iterator[Problem]:
    """A problem for each of the fields that has another value than its default, where that would do nothing."""
    for key in keys:
        value = getattr(section, key)
        if value != type(section).model_fields[key].default:
            yield Problem((key,), f"`{key}: {value}` {why}")
