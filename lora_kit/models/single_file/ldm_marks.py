"""What a single file is, by the names of its tensors. Imports neither torch nor diffusers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from lora_kit.errors import ModelError
from lora_kit.models.single_file.ldm_keys import CLIP, OPEN_CLIP, UNET, VAE

_ADAPTER_MARKS = ("lora_down", "lora_up", "lora_A", "lora_B", "lora.down", "lora.up", "hada_w1", "lokr_w", "unet:0:")
_OTHER_MODELS = {
    "conditioner.embedders.": "a Stable Diffusion XL checkpoint",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "model.diffusion_model.double_blocks.": "a Flux checkpoint",
    "double_blocks.": "a Flux checkpoint",
    "control_model.": "a ControlNet",
    "embedder.model.": "a Stable unCLIP checkpoint",
    "cond_stage_model.transformer.token_emb.": "an LDM text-to-image checkpoint; give its diffusers folder instead",
}
PARTS = {"UNet": (UNET,), "VAE": (VAE,), "text encoder": (CLIP, OPEN_CLIP)}
SHOWN = 8


def recognise(path: Path, names: Collection[str], needed: Sequence[str] = tuple(PARTS)) -> None:
    """Raise ModelError where the file is something else than an SD v1 or v2 checkpoint, naming what it is.

    needed: the parts that it must hold, of PARTS.
    """
    if any(mark in name for name in names for mark in _ADAPTER_MARKS):
        raise ModelError(
            f"{path} is an adapter (LoRA or similar), not a base model. Give the base it was trained on as "
            f"the base, and this file as --adapter."
        )
    for prefix, what in _OTHER_MODELS.items():
        if any(name.startswith(prefix) for name in names):
            raise ModelError(f"{path} is {what}. Supported so far: Stable Diffusion v1 and v2, text to image.")
    missing = [part for part in needed if not any(name.startswith(PARTS[part]) for name in names)]
    if missing:
        raise ModelError(
            f"{path} has no {' and no '.join(missing)}; it begins with {some(list(names))}. A single-file base holds "
            f"{', '.join(prefixes[0] + '*' for prefixes in PARTS.values())} tensors. For a diffusers network give its "
            f"pipeline's folder instead."
        )


def some(names: list[str]) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
