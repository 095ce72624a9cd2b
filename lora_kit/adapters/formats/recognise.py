"""Which layout a file has, by its keys; and a clear name for what is not supported yet."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from lora_kit.adapters.formats.cloneofsimo import CloneOfSimo
from lora_kit.adapters.formats.diffusers import Diffusers
from lora_kit.adapters.formats.kohya import Kohya
from lora_kit.adapters.formats.layout import Layout
from lora_kit.adapters.formats.peft import Peft
from lora_kit.errors import AdapterFileError

LAYOUTS: tuple[Layout, ...] = (Kohya(), Diffusers(), Peft(), CloneOfSimo())

_NOT_YET = (
    (r"\.lora_B(\.default)?\.bias$", "a LoRA with trained biases (PEFT's lora_bias)"),
    (r"\.oft_diag$", "an OFT adapter of an old LyCORIS (oft_diag)"),
    (r"\.lambda_layer$", "a T-LoRA adapter, whose rank depends on the time step (lambda_layer)"),
    (r"^oft_unet_", "an OFT adapter of sd-scripts"),
    (r"\.bias_(indices|values|size)$", "a LyCORIS extraction with sparse remainders (bias_indices)"),
    (r"^lora_te[12]_|^text_encoder_2\.|^lora_unet_(input|output)_blocks_", "an adapter for Stable Diffusion XL"),
)
_NOT_AN_ADAPTER = (
    (r"^model\.diffusion_model\.|^cond_stage_model\.|^first_stage_model\.", "a whole checkpoint"),
    (r"^(down_blocks|mid_block|up_blocks|conv_in)\.", "a network's own weights (UNet or VAE)"),
    (r"^(text_model\.)?(encoder\.layers|embeddings)\.", "a text encoder's own weights"),
    (r"^(emb_params|string_to_param|<.*>$)", "a textual-inversion embedding"),
)


def recognise(path: Path, keys: Collection[str]) -> Layout:
    """The layout of a file with these keys.

    Raises AdapterFileError naming what the file is, if it is not an adapter of a layout that can be read.
    """
    if not keys:
        raise AdapterFileError(f"{path}: the file holds no tensors")
    for pattern, what in _NOT_YET:
        example = _first(pattern, keys)
        if example is not None:
            raise AdapterFileError(
                f"{path}: not supported yet: this is {what} (it has {example!r}). "
                "LoRA in kohya's or diffusers' layout and LyCORIS's methods can be read."
            )
    for layout in LAYOUTS:
        if any(layout.parse(key) is not None for key in keys):
            return layout
    for pattern, what in _NOT_AN_ADAPTER:
        example = _first(pattern, keys)
        if example is not None:
            raise AdapterFileError(f"{path}: this is {what}, not an adapter (it has {example!r})")
    raise AdapterFileError(
        f"{path}: unknown layout; its keys look like {next(iter(sorted(keys)))!r}. "
        "Known: kohya and LyCORIS (lora_unet_….lora_down.weight), diffusers (unet.….lora_A.weight), "
        "PEFT (base_model.model.….lora_A.weight), cloneofsimo/lora (unet:0:up)."
    )


def _first(pattern: str, keys: Collection[str]) -> str | None:
    compiled = re.compile(pattern)
    return next((key for key in sorted(keys) if compiled.search(key)), None)
