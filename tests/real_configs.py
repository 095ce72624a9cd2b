"""The configs of the published Stable Diffusion bases, and small random bases of the same structure.

Written from the config.json files of CompVis/stable-diffusion-v1-4, stable-diffusion-v1-5/stable-diffusion-v1-5,
stable-diffusion-v1-5/stable-diffusion-inpainting, stabilityai/stable-diffusion-2-base, -2-1-base, -2, -2-1 and
-2-inpainting; keys that say the libraries' defaults are left out where the published files leave them out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from small_tokenizers import small_tokenizer

Config = dict[str, Any]

_UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_UNET_1 = _UNET | {"attention_head_dim": 8, "cross_attention_dim": 768}
_UNET_2 = _UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "use_linear_projection": True,
}
_TEXT: Config = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "vocab_size": 49408,
}
_TEXT_1 = _TEXT | {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
_TEXT_2 = _TEXT | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,  # OpenCLIP's ViT-H has 24: the states are those before the last
    "projection_dim": 512,
}
_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_SCHEDULER: Config = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
_PARTS = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}


@dataclass(frozen=True)
class Published:
    """The configs of one base."""

    unet: Config
    text_encoder: Config
    vae: Config
    scheduler: Config
    pipeline: str = "StableDiffusionPipeline"

    def write(self, folder: Path) -> Path:
        """The configs alone, as a diffusers folder: what a plan reads."""
        scheduler = self.scheduler["_class_name"]
        index = {"_class_name": self.pipeline, **_PARTS, "scheduler": ["diffusers", scheduler]}
        documents = {
            "model_index.json": index,
            "unet/config.json": self.unet,
            "text_encoder/config.json": self.text_encoder,
            "vae/config.json": self.vae,
            "scheduler/scheduler_config.json": self.scheduler,
        }
        for name, document in documents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(document, indent=2) + "\n")
        (folder / "tokenizer").mkdir(exist_ok=True)
        return folder


_V = _SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
_EPSILON = _SCHEDULER | {"prediction_type": "epsilon"}
_INPAINT = "StableDiffusionInpaintPipeline"
PUBLISHED: dict[str, Published] = {
    "sd1": Published(_UNET_1, _TEXT_1, _VAE, _SCHEDULER),
    "sd1-inpainting": Published(_UNET_1 | {"in_channels": 9}, _TEXT_1, _VAE, _SCHEDULER, _INPAINT),
    "sd2-base": Published(_UNET_2, _TEXT_2, _VAE, _EPSILON),
    "sd2-v": Published(_UNET_2 | {"sample_size": 96}, _TEXT_2, _VAE | {"sample_size": 768}, _V),
    "sd2.1-v": Published(
        _UNET_2 | {"sample_size": 96, "upcast_attention": True}, _TEXT_2, _VAE | {"sample_size": 768}, _V
    ),
    "sd2-inpainting": Published(_UNET_2 | {"in_channels": 9}, _TEXT_2, _VAE, _EPSILON, _INPAINT),
}
"""SD 1.4 and 1.5 have the same configs, 2.0-base and 2.1-base too."""


def narrowed(published: Published) -> Published:
    """The same blocks and layers under the same names, a twentieth as wide, text states 24 (SD 1) and 32 (SD 2) as 768
    and 1024 are, for pictures of 64 pixels (96 where the real one's are 768)."""
    second = published.unet.get("use_linear_projection", False)
    tokenizer = small_tokenizer("!" if second else "<|endoftext|>")
    width = published.unet["cross_attention_dim"] // 32
    unet = {
        "block_out_channels": [16, 32, 64, 64],
        "norm_num_groups": 8,
        "cross_attention_dim": width,
        "attention_head_dim": [1, 2, 4, 4] if second else 8,
        "sample_size": published.unet["sample_size"] // 8,
    }
    text = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 2,
        "projection_dim": width,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vae = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1}
    return replace(
        published,
        unet=published.unet | unet,
        text_encoder=published.text_encoder | text,
        vae=published.vae | vae | {"sample_size": published.vae["sample_size"] // 8, "scaling_factor": 0.18215},
    )


def small_base(folder: Path, name: str, seed: int = 0) -> Path:
    """A random base of the structure of `PUBLISHED[name]`, as diffusers saves it."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    published = narrowed(PUBLISHED[name])
    torch.manual_seed(seed)
    make: Any = getattr(diffusers, published.pipeline)
    scheduler: Any = getattr(diffusers, published.scheduler["_class_name"])
    pipe = make(
        vae=diffusers.AutoencoderKL.from_config(published.vae),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_dict(published.text_encoder)),
        tokenizer=small_tokenizer("!" if published.unet.get("use_linear_projection") else "<|endoftext|>"),
        unet=diffusers.UNet2DConditionModel.from_config(published.unet),
        scheduler=scheduler.from_config(published.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    # Verbatim: diffusers leaves out what its sampler of that name does not know, and other samplers do.
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(published.scheduler, indent=2) + "\n")
    return folder
