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

# Checked in order: a DoRA file also has lora_down, and a Tucker LoCon also has lora_up.
_NOT_YET = (
    (r"\.(dora_scale|lora_magnitude_vector)(\.|$)", "a DoRA (weight-decomposed) adapter"),
    (r"\.lora_mid\.weight$", "a LoCon adapter with Tucker decomposition (lora_mid)"),
    (r"\.hada_[wt]\d", "a LyCORIS LoHa adapter"),
    (r"\.lora_B(\.default)?\.bias$", "a LoRA with trained biases (PEFT's lora_bias)"),
    (r"\.lokr_[wt]\d", "a LyCORIS LoKr adapter"),
    (r"\.(oft_blocks|oft_diag)$", "a LyCORIS OFT / BOFT adapter"),
    (r"^lora_.*\.(a1|a2|b1|b2)\.weight$", "a LyCORIS GLoRA adapter"),
    (r"^lora_.*\.on_input$", "a LyCORIS IA3 adapter"),
    (r"^lora_.*\.(w_norm|b_norm)$", "a LyCORIS adapter with trained norms"),
    (r"^lora_.*\.diff(_b)?$", "a LyCORIS full-difference adapter"),
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
                "Plain LoRA in kohya's or diffusers' layout can be read."
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
