"""Names of tensors in single-file checkpoints (the LDM layout) ↔ names in the diffusers networks, as data.

The LDM UNet numbers its blocks in one row (`input_blocks.4.1`), diffusers by level (`down_blocks.1.attentions.0`);
which is which follows from the number of levels and of residual blocks in a level, so `claim` needs only those.
Every tensor of a file is translated by itself, which lets a merge stream through the file.

Sources: CompVis/stable-diffusion `openaimodel.py`, `diffusionmodules/model.py`; Stability-AI/stablediffusion;
OpenCLIP `transformer.py`; the classes of diffusers and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

UNET, VAE, CLIP, OPEN_CLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
)

Form = Literal["same", "packed", "pointwise"]
"""How the file holds the tensor: `same`; `packed`: q, k and v stacked along dimension 0; `pointwise`: a linear
layer's weight [out, in] that older files hold as a 1×1 convolution [out, in, 1, 1]."""


class Claim(NamedTuple):
    """Where one tensor of the file belongs."""

    component: str
    """`unet`, `vae` or `text_encoder`."""
    names: tuple[str, ...]
    """Names in the component's state dict; three for a packed tensor, else one. The text encoder's carry no
    leading `text_model.`."""
    form: Form = "same"


class Structure(NamedTuple):
    """What a name's translation depends on."""

    unet_levels: int
    unet_layers: int
    """Residual blocks in a level, down path (the up path has one more)."""
    vae_levels: int
    text_layers: int
    """Layers of the text encoder in use. SD2 reads the states before OpenCLIP's last one, so it is left out."""


UNET_NAMES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESNET_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OPEN_CLIP_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OPEN_CLIP_OUTER_NAMES = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}

UNUSED = re.compile(
    r"""
    model_ema\..* | first_stage_model\.(model_ema|loss)\..*             # moving averages, the VAE's discriminator
    | (sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)? | (sqrt_recip|sqrt_recipm1)_alphas_cumprod
    | (log_|sqrt_)one_minus_alphas_cumprod | betas | logvar | lvlb_weights
    | posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)    # the schedule, computed anew from its betas
    | scale_factor                                                       # read by itself into the VAE's config
    | cond_stage_model\.(transformer|model)\.(.*\.)?(position_ids|attn_mask|text_projection(\.weight)?|logit_scale)
    | cond_stage_model\.(text_projection|logit_scale)                    # CLIP's picture side
    """,
    re.VERBOSE,
)
"""Tensors that a text-to-image network does not use, by name. Any other unknown name is an error."""


def structure(names: Iterable[str]) -> Structure:
    """What the names of a whole file say about the networks; zeros where a component is missing."""
    known = set(names)
    strides = sorted(_numbers(known, rf"{re.escape(UNET)}input_blocks\.(\d+)\.0\.op\.weight"))
    inputs = _numbers(known, rf"{re.escape(UNET)}input_blocks\.(\d+)\.")
    vae = _numbers(known, rf"{re.escape(VAE)}encoder\.down\.(\d+)\.")
    clip = _numbers(known, rf"{re.escape(CLIP)}(?:text_model\.)?encoder\.layers\.(\d+)\.")
    open_clip = _numbers(known, rf"{re.escape(OPEN_CLIP)}transformer\.resblocks\.(\d+)\.")
    # A whole OpenCLIP tower has its projection and one layer more than SD2 uses; some writers leave both out.
    spare = f"{OPEN_CLIP}text_projection" in known or len(open_clip) == 24
    return Structure(
        unet_levels=len(strides) + 1 if inputs else 0,
        unet_layers=strides[0] - 1 if strides else max(inputs, default=0),
        vae_levels=len(vae),
        text_layers=len(clip) or max(len(open_clip) - spare, 0),
    )


def claim(name: str, form: Structure) -> Claim | None:
    """Where the tensor `name` of a single-file checkpoint belongs, or None if no network has a place for it."""
    for prefix, component, translate in _COMPONENTS:
        if name.startswith(prefix) and not UNUSED.fullmatch(name):
            found = translate(name.removeprefix(prefix), form)
            return None if found is None else Claim(component, *found)
    return None


def is_unused(name: str, form: Structure) -> bool:
    """Whether `name` is a tensor that such files carry and text to image does not need."""
    spare = f"{OPEN_CLIP}transformer.resblocks.{form.text_layers}."
    return UNUSED.fullmatch(name) is not None or name.startswith(spare)


Found = tuple[tuple[str, ...], Form] | None


def _unet(name: str, form: Structure) -> Found:
    for old, new in UNET_NAMES.items():
        if name.startswith(f"{old}."):
            return _same(new + name.removeprefix(old))
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)", name)
    if match is None:
        return None
    row, index, inner = match[1], int(match[2]), match[3]
    if row == "middle_block":
        part = "attentions.0" if index == 1 else f"resnets.{index // 2}"
        return _unet_block(f"mid_block.{part}", inner)
    slot, _, inner = inner.partition(".")
    level, position = divmod(index - (row == "input_blocks"), form.unet_layers + 1)
    block = f"{'down' if row == 'input_blocks' else 'up'}_blocks.{level}"
    if row == "input_blocks" and inner.startswith("op."):
        return _same(f"{block}.downsamplers.0.conv.{inner.removeprefix('op.')}")
    if inner.startswith("conv."):
        return _same(f"{block}.upsamplers.0.{inner}")
    return _unet_block(f"{block}.{'attentions' if slot == '1' else 'resnets'}.{position}", inner)


def _unet_block(block: str, inner: str) -> Found:
    if ".attentions." in block:  # named alike in both
        return _same(f"{block}.{inner}")
    return _renamed(block, inner, RESNET_NAMES)


def _vae(name: str, form: Structure) -> Found:
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return _same(name)
    match = re.fullmatch(r"(encoder|decoder)\.(conv_in|norm_out|conv_out|mid|down|up)\.(.+)", name)
    if match is None:
        return None
    side, part, inner = match.groups()
    if part == "mid":
        return _vae_middle(f"{side}.mid_block", inner)
    if part in ("down", "up"):
        return _vae_level(side, inner, form)
    return _same(f"{side}.{part.replace('norm_out', 'conv_norm_out')}.{inner}")


def _vae_middle(block: str, inner: str) -> Found:
    part, _, rest = inner.partition(".")
    if part == "attn_1":
        layer, _, kind = rest.rpartition(".")
        found = _renamed(f"{block}.attentions.0", rest, VAE_ATTENTION_NAMES)
        pointwise = found is not None and kind == "weight" and layer != "norm"
        return (found[0], "pointwise") if found and pointwise else found
    index = {"block_1": 0, "block_2": 1}.get(part)
    return None if index is None else _vae_resnet(f"{block}.resnets.{index}", rest)


def _vae_level(side: str, name: str, form: Structure) -> Found:
    match = re.fullmatch(r"(\d+)\.(block\.(\d+)|downsample|upsample)\.(.+)", name)
    if match is None:
        return None
    # The LDM decoder counts its levels from the finest, diffusers in the order they run.
    level = int(match[1]) if side == "encoder" else form.vae_levels - 1 - int(match[1])
    block = f"{side}.{'down' if side == 'encoder' else 'up'}_blocks.{level}"
    if match[3] is None:
        return _same(f"{block}.{match[2]}rs.0.{match[4]}")
    return _vae_resnet(f"{block}.resnets.{match[3]}", match[4])


def _vae_resnet(block: str, inner: str) -> Found:
    return _same(f"{block}.{inner.replace('nin_shortcut', 'conv_shortcut')}")


def _clip(name: str, form: Structure) -> Found:
    name = name.removeprefix("text_model.")
    return _same(name) if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else None


def _open_clip(name: str, form: Structure) -> Found:
    if name in OPEN_CLIP_OUTER_NAMES:
        return _same(OPEN_CLIP_OUTER_NAMES[name])
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if match is None or int(match[1]) >= form.text_layers:
        return None
    layer, inner = f"encoder.layers.{match[1]}", match[2]
    if inner.startswith("attn.in_proj_"):
        kind = inner.removeprefix("attn.in_proj_")
        return tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"), "packed"
    return _renamed(layer, inner, OPEN_CLIP_NAMES)


def _renamed(block: str, inner: str, table: dict[str, str]) -> Found:
    layer, _, kind = inner.rpartition(".")
    return _same(f"{block}.{table[layer]}.{kind}") if layer in table else None


def _same(name: str) -> Found:
    return (name,), "same"


def _numbers(names: set[str], pattern: str) -> set[int]:
    """The numbers that the pattern's group finds at the start of `names`."""
    return {int(match[1]) for match in (re.match(pattern, name) for name in names) if match}


_COMPONENTS: tuple[tuple[str, str, Callable[[str, Structure], Found]], ...] = (
    (UNET, "unet", _unet),
    (VAE, "vae", _vae),
    (CLIP, "text_encoder", _clip),
    (OPEN_CLIP, "text_encoder", _open_clip),
)
