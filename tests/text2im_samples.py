"""A small random LDM text-to-image model of the real structure, for tests: LDMBert, factor 8, KL or VQ first stage."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from small_tokenizers import WORDS

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def small_bert_tokenizer() -> Any:
    """A BertTokenizer of WORDS, and of letters as pieces, from a vocab.txt as the published base has it."""
    from transformers import BertTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*_SPECIAL, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
        return BertTokenizer.from_pretrained(folder, do_lower_case=True)


def small_first_stage(kind: str) -> Any:
    """`kl` or `vq`, of factor 8: LDMTextToImagePipeline reckons latents as pixels // 8 whatever its first stage."""
    from diffusers import AutoencoderKL, VQModel

    shared: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
        "scaling_factor": 0.18215,
    }
    if kind == "kl":
        return AutoencoderKL(**shared)
    network = VQModel(**shared, num_vq_embeddings=64)
    torch.nn.init.normal_(network.quantize.embedding.weight)  # fresh code vectors lie all but on one another
    return network


def small_text2im(first_stage: str = "kl") -> Any:
    """The LDMTextToImagePipeline of 64 × 64 pictures."""
    from diffusers import DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    torch.manual_seed(3)
    tokenizer = small_bert_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=48,
        norm_num_groups=8,
        attention_head_dim=4,
    )
    bert = LDMBertConfig(
        vocab_size=len(tokenizer),
        d_model=48,
        encoder_layers=2,
        encoder_ffn_dim=96,
        encoder_attention_heads=2,
        head_dim=16,  # heads times this is not the model's width, as in the published base
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    return LDMTextToImagePipeline(
        vqvae=small_first_stage(first_stage),
        bert=LDMBertModel(bert),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
    )
