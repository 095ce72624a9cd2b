"""Which timesteps an optimizer step trains, as `objective.timesteps` says."""

from __future__ import annotations

from torch import Tensor

from lora_kit.data import Batch
from lora_kit.diffusion import strata_of_step, uniforms_for_samples
from lora_kit.diffusion.timesteps import band, cubic, logit_normal, mode, places_in_strata, timesteps_at
from lora_kit.recipe import TimestepSection


def drawn_timesteps(section: TimestepSection, count: int, seed: int, step: int, batch: Batch) -> Tensor | None:
    """The timesteps of a micro-batch, int64 [b], of a schedule of `count`; None: those that `draw_for_samples` draws,
    uniform over all, as a section that says nothing has them."""
    if section == TimestepSection():
        return None
    positions: list[int] = batch.positions.tolist()
    uniform = uniforms_for_samples(seed, step, positions)
    if section.stratified:
        uniform = places_in_strata(uniform, strata_of_step(seed, step, batch.step_samples), positions)
    last = count - 1 if section.max is None else section.max
    return timesteps_at(quantiles(section, uniform, last), section.min, last)


def quantiles(section: TimestepSection, u: Tensor, last: int) -> Tensor:
    """The section's distribution: u, uniform over 0..1, to places in 0..1 on the way from `min` to `last`."""
    match section.distribution:
        case "logit_normal":
            return logit_normal(u, section.logit_mean, section.logit_std)
        case "mode":
            return mode(u, section.mode_scale)
        case "cubic":
            return cubic(u)
        case "later":
            return band(u, 1 - section.bias_portion, 1.0, section.bias_factor)
        case "earlier":
            return band(u, 0.0, section.bias_portion, section.bias_factor)
        case "band":
            assert section.bias_band is not None
            width = last - section.min + 1
            start, stop = section.bias_band[0] - section.min, section.bias_band[1] + 1 - section.min
            return band(u, start / width, stop / width, section.bias_factor)
        case "uniform":
            return u
