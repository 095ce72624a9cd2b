"""Which learning rate each trained module gets."""

from __future__ import annotations

from collections.abc import Mapping

from lora_kit.errors import RecipeError
from lora_kit.recipe import OptimizerSection
from lora_kit.targeting.block_scales import module_scales
from lora_kit.targeting.plan import TargetPlan

TEXT_ENCODER_SHARE = 0.5  # of the UNet's rate, sd-scripts users' habit: the text encoder overfits first


def module_rates(plan: TargetPlan, section: OptimizerSection) -> dict[str, float]:
    """Target module → its peak rate: the component's × the rule's `lr_scale` × `block_lr`'s last match.

    The up matrices' rate is `lr_ratio` times that. Raises RecipeError for a glob of `block_lr` that cannot be read, or
    matches nothing that is trained.
    """
    names = [target.module.name for target in plan.targets]
    try:
        factors = module_scales(names, 1.0, [f"{glob}={factor!r}" for glob, factor in section.block_lr.items()])
    except RecipeError as error:
        raise RecipeError(f"optimizer.block_lr: {error}") from error
    by_component: Mapping[str, float] = {"text_encoder": rate_of_text_encoder(section)}
    return {
        target.module.name: by_component.get(target.module.component, section.lr)
        * target.lr_scale
        * factors[target.module.name]
        for target in plan.targets
    }


def rate_of_text_encoder(section: OptimizerSection) -> float:
    """`text_encoder_lr`, or its share of `lr`."""
    return section.text_encoder_lr or section.lr * TEXT_ENCODER_SHARE
