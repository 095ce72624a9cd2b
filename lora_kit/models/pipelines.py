"""A bundle as diffusers' own pipeline, for drawing pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from torch import Tensor, nn

from lora_kit.errors import ModelError, did_you_mean
from lora_kit.models.bundle import FirstStage, ModelBundle
from lora_kit.models.pipeline_index import is_other, parts_of

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""A sampler's name → diffusers' class, and what its config has beside the base's."""
WITHOUT_ZERO_SNR = ("heun", "pndm")
WITHOUT_CLEAN_LATENTS = ("euler-a", "heun", "pndm")
"""What diffusers' classes do not know."""

# Where the base's config is silent: SD's own values. Clipping is for pixels in -1..1; latents go beyond.
_LATENT_DEFAULTS = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}

_NO_SAFETY_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def scheduler_named(name: str, config: Mapping[str, Any]) -> Any:
    """A sampler over the base's noise schedule, by one of the names in `SCHEDULERS`.

    `config` is a scheduler_config.json of any diffusers scheduler. Raises ModelError for an unknown name, and
    for one whose class cannot follow the config.
    """
    if name not in SCHEDULERS:
        raise ModelError(
            f"Unknown sampler {name!r}; known are {', '.join(SCHEDULERS)}.{did_you_mean(name, SCHEDULERS)}"
        )
    for unable, kind, asked in (
        (WITHOUT_ZERO_SNR, "zero terminal SNR", config.get("rescale_betas_zero_snr")),
        (WITHOUT_CLEAN_LATENTS, "a network that predicts clean latents", config.get("prediction_type") == "sample"),
    ):
        if asked and name in unable:
            others = ", ".join(other for other in SCHEDULERS if other not in unable)
            raise ModelError(f"Sampler {name!r} cannot draw with {kind}; use one of {others}.")
    kind, own = SCHEDULERS[name]
    scheduler: Any = getattr(diffusers, kind)
    return scheduler.from_config({**_LATENT_DEFAULTS, **config, **own})


def pipeline(bundle: ModelBundle, scheduler: str = "ddim") -> Any:
    """diffusers' own pipeline of the family around the bundle's own networks (not copies), without progress bar.

    No safety checker: it judges photographs and is no part of the base. A VAE of another precision than the UNet
    casts what it is given.
    """
    _cast_on_entry(bundle.vae)
    config = {**bundle.scheduler_config, "prediction_type": bundle.prediction_type}
    name = bundle.family.pipeline_name
    make: Any = getattr(diffusers, name)  # annotated as if its optional parts were not
    offered = {part: getattr(bundle, part) for part in ("unet", "vae", "text_encoder", "tokenizer")}
    offered["scheduler"] = scheduler_named(scheduler, config)
    parts = {part.folder: offered[own] for own, part in parts_of(name).items()}
    pipe: Any = make(**parts, **{} if is_other(name) else _NO_SAFETY_CHECKER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _cast_to_own(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward pre-hook: casts a layer's input to its weights' dtype."""
    return (inputs[0].to(next(layer.parameters()).dtype), *inputs[1:])


def _cast_on_entry(vae: FirstStage) -> None:
    """Let an fp32 first stage decode what a bf16 UNet made: diffusers hands the latents over as they are."""
    layers: tuple[Any, ...] = (getattr(vae, "quantize", None), vae.post_quant_conv, vae.decoder.conv_in)
    for layer in layers:
        if layer is not None and not getattr(layer, "_casts_input", False):
            layer.register_forward_pre_hook(_cast_to_own)
            layer._casts_input = True
