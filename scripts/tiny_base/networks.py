"""Lay out the tiny base as a diffusers folder: trained VAE, CLIP tokenizer from the captions, fresh networks.

    python scripts/tiny_base/networks.py --captions data/openmoji/color/metadata.jsonl \
        --vae runs/tiny-base/vae --out runs/tiny-base/fresh

A Stable Diffusion v1 in small: 64 x 64 pictures, 16 x 16 latents, U-Net of 48/96/144/144 channels with
8.5 M parameters, a CLIP text model of two layers, 160 wide. recipe.yaml beside this file then trains it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's (Radford et al. 2021)
VOCABULARY = 4096  # enough for every word of the captions to be one token
WIDTH, TOKENS = 160, 77


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level BPE like CLIP's, with a small vocabulary learnt from the captions."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORD), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(letters) - 2,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96, 144, 144),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads: diffusers' name for it in SD 1 configs
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1's schedule. `clip_sample` and `set_alpha_to_one` must be off: latents pass ±1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, default=Path("data/openmoji/color/metadata.jsonl"))
    parser.add_argument("--vae", type=Path, default=Path("runs/tiny-base/vae"))
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-base/fresh"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    captions = [json.loads(line)["text"] for line in arguments.captions.read_text().splitlines()]
    tokenizer = train_tokenizer(captions)
    unet = new_unet()
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(arguments.vae),
        text_encoder=new_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(arguments.out)
    tokens = [len(tokenizer(caption)["input_ids"]) - 2 for caption in captions]
    print(f"{arguments.out}: U-Net {unet.num_parameters() / 1e6:.2f} M, vocabulary {len(tokenizer)}")
    print(f"tokens a caption: mean {sum(tokens) / len(tokens):.2f}, most {max(tokens)}")


if __name__ == "__main__":
    main()
