"""The `targets:` section: rules and presets that pick layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from lora_kit.recipe.base import Problem, Section, idle, refuse
from lora_kit.recipe.methods import MethodSection

PresetName = Literal["attention", "kohya", "kohya-conv", "all-linear", "all"]


class TargetRule(MethodSection):
    """One rule. Rules are read in order and the last one that matches a module decides."""

    match: str
    """Glob over dotted module names that start with the component (`unet`, `text_encoder`): `*` is any text
    within one name, `**` any number of names, `{a,b}` alternatives. `re:` starts a regular expression that
    must match the whole name."""
    kind: Literal["linear", "conv", "any"] = "any"
    """Which layers the glob may pick. Default: both."""
    exclude: bool = False
    """Take the matched modules out again."""

    @field_validator("match")
    @classmethod
    def _readable(cls, match: str) -> str:
        refuse("TargetRule", _match_problems(match))
        return match

    @model_validator(mode="after")
    def _nothing_idle(self) -> TargetRule:
        if self.exclude:
            why = "does nothing in a rule with `exclude: true`; remove it."
            refuse("TargetRule", idle(self, MethodSection.model_fields, why))
        return self


class PresetRules(MethodSection):
    """A named list of rules, optionally with the text encoder and followed by rules of your own."""

    preset: PresetName
    """`attention`: q, k, v, out of the UNet. `kohya`: sd-scripts' default. `kohya-conv`: its convolutions as
    well. `all-linear`, `all`: every linear (and convolution) of the UNet."""
    text_encoder: bool = False
    """Also the text encoder's q, k, v, out, fc1, fc2 (sd-scripts' default there)."""
    rules: list[TargetRule] = Field(default=[])
    """Rules that follow the preset's."""


def _tag(value: object) -> str | None:
    """Which of the two a mapping is, by the key only it has."""
    if isinstance(value, PresetRules):
        return "<preset>"
    if isinstance(value, TargetRule):
        return "<rule>"
    if not isinstance(value, dict):
        return None
    keys = cast("dict[str, Any]", value)
    if "preset" in keys:
        return "<preset>"
    return "<rule>" if "match" in keys else None


def _form(value: object) -> str | None:
    """A list, one preset alone, or nothing."""
    if value == "none":
        return "<none>"
    return "<list>" if isinstance(value, list) else _tag(value)


def _listed(value: object) -> object:
    """A single rule stands for a list of one."""
    return [value] if _form(value) == "<rule>" else value


_NEITHER = (
    "needs the key `preset` (attention, kohya, kohya-conv, all-linear, all) or the key `match` "
    "(a glob over module names)."
)
TargetItem: TypeAlias = Annotated[
    Annotated[PresetRules, Tag("<preset>")] | Annotated[TargetRule, Tag("<rule>")],
    Discriminator(_tag, custom_error_type="targets", custom_error_message=_NEITHER),
]
"""An item of a list under `targets:`; the mapping's own key says which."""
Targets: TypeAlias = Annotated[
    Annotated[PresetRules, Tag("<preset>")]
    | Annotated[list[TargetItem], Field(min_length=1), Tag("<list>")]
    | Annotated[Literal["none"], Tag("<none>")],
    Discriminator(_form, custom_error_type="targets", custom_error_message=_NEITHER),
    BeforeValidator(_listed),
]
"""All of `targets:`: one preset, one rule, a list of both, or `none`."""
SECTION_OF_TAG: dict[str, type[Section]] = {"<preset>": PresetRules, "<rule>": TargetRule}
"""The tags that pydantic puts into error paths, and what they stand for."""


def listed(
    targets: PresetRules | Sequence[PresetRules | TargetRule] | Literal["none"],
) -> list[PresetRules | TargetRule]:
    """The presets and rules of a `targets:` section, in order."""
    if targets == "none":
        return []
    return [targets] if isinstance(targets, PresetRules) else list(targets)


def _match_problems(match: str) -> Iterator[Problem]:
    if not match.strip():
        yield Problem((), "is empty; write a glob such as `unet.**.to_q`.")
    if match.startswith("re:"):
        try:
            re.compile(match[3:])
        except re.error as error:
            yield Problem((), f"`{match}` is not a regular expression: {error}.")
