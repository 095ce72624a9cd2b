"""Presets as lists of rules, and the recipe's `targets:` as one flat list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lora_kit.recipe import PresetRules, TargetRule
from lora_kit.recipe.methods import MethodSection
from lora_kit.targeting.plan import PlanRule

_TRANSFORMERS = "unet.**.attentions.*.{proj_in,proj_out,transformer_blocks.**}"
"""Everything within diffusers' Transformer2DModel; sd-scripts searches by that class."""
_CONVOLUTIONS = "unet.**.{resnets,downsamplers,upsamplers}.*.**"
"""Everything within ResnetBlock2D, Downsample2D and Upsample2D."""

_UNET_RULES: dict[str, tuple[dict[str, str], ...]] = {
    "attention": ({"match": "unet.**.to_{q,k,v,out.0}"},),
    "kohya": ({"match": _TRANSFORMERS},),
    "kohya-conv": ({"match": _TRANSFORMERS}, {"match": _CONVOLUTIONS}),
    "all-linear": ({"match": "unet.**", "kind": "linear"},),
    "all": ({"match": "unet.**"},),
}
_TEXT_ENCODER_RULE = {"match": "text_encoder.**.layers.*.{self_attn.{q,k,v,out}_proj,mlp.fc{1,2},fc{1,2}}"}
"""`**` before `layers` covers the module tree of every transformers version, with `text_model` or without.
The last alternative is LDMBert's, whose layers have no `mlp`."""


def preset_rules(preset: PresetRules) -> list[TargetRule]:
    """The rules that a preset stands for, without the user's own `rules` that follow it.

    `kohya` picks what sd-scripts trains by default (192 modules of a Stable Diffusion v1 UNet), `kohya-conv`
    what it trains with a convolution rank (278).
    """
    patterns = [*_UNET_RULES[preset.preset], *([_TEXT_ENCODER_RULE] if preset.text_encoder else [])]
    shared: dict[str, Any] = {key: getattr(preset, key) for key in MethodSection.model_fields}
    return [TargetRule.model_validate(pattern | shared) for pattern in patterns]


def flat_rules(targets: PresetRules | Sequence[PresetRules | TargetRule]) -> list[PlanRule]:
    """Every rule in order, each with its path in the recipe; presets are spelt out."""
    if isinstance(targets, PresetRules):
        return list(_placed("targets", targets))
    return [rule for index, item in enumerate(targets) for rule in _placed(f"targets.{index}", item)]


def _placed(path: str, item: PresetRules | TargetRule) -> Iterator[PlanRule]:
    if isinstance(item, TargetRule):
        yield PlanRule(path, None, item)
        return
    for rule in preset_rules(item):
        yield PlanRule(path, item.preset, rule)
    for index, rule in enumerate(item.rules):
        yield PlanRule(f"{path}.rules.{index}", None, rule)
