"""Optimizer and learning rate, each from its own section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_kit.recipe import OptimizerSection, ScheduleSection
from lora_kit.targeting import TargetPlan

TEXT_ENCODER_SHARE = 0.5  # of the UNet's rate, sd-scripts users' habit: the text encoder overfits first


def parameter_groups(
    plan: TargetPlan, trainable: Mapping[str, Sequence[nn.Parameter]], section: OptimizerSection
) -> list[dict[str, Any]]:
    """One optimizer group per learning rate; `trainable` maps a target module's name to its parameters.

    Each group keeps its peak rate as `peak_lr`; `set_learning_rate` scales from there.
    """
    text_encoder_lr = rate_of_text_encoder(section)
    groups: dict[float, dict[str, Any]] = {}
    for item in plan.targets:
        component = item.module.name.split(".", 1)[0]
        rate = (text_encoder_lr if component == "text_encoder" else section.lr) * item.lr_scale
        group = groups.setdefault(rate, {"params": [], "lr": rate, "peak_lr": rate})
        group["params"].extend(trainable[item.module.name])
    return list(groups.values())


def rate_of_text_encoder(section: OptimizerSection) -> float:
    """`text_encoder_lr`, or its share of `lr`."""
    return section.text_encoder_lr or section.lr * TEXT_ENCODER_SHARE


def build_optimizer(groups: list[dict[str, Any]], section: OptimizerSection) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), torch's fused one or bitsandbytes' with 8-bit moments."""
    options: dict[str, Any] = {"betas": section.betas, "weight_decay": section.weight_decay, "eps": section.eps}
    if section.name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def learning_rate_factor(section: ScheduleSection, step: int, max_steps: int) -> float:
    """Share of the peak rate at optimizer step `step` (0-based) of `max_steps`: a pure function, so that a
    resumed run needs no schedule state."""
    if step < section.warmup_steps:
        return (step + 1) / (section.warmup_steps + 1)
    if section.name == "constant":
        return min(1.0, (max_steps - step) / (section.decay_steps + 1))
    progress = (step - section.warmup_steps) / max(1, max_steps - section.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group to `factor` × its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
