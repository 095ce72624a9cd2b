"""Lay out a tiny LDM text-to-image model as a diffusers folder: a trained first stage, LDMBert and UNet still fresh.

    python scripts/tiny_base/openmoji.py --out data/openmoji
    python scripts/ldm/text2im.py --pictures data/openmoji --out runs/ldm-text2im/fresh
    accelerate launch scripts/train_lora.py scripts/ldm/text2im.yaml           UNet and LDMBert, by method: full
    accelerate launch scripts/train_lora.py scripts/ldm/text2im_lora.yaml      a style LoRA on that

The published model (Rombach et al. 2022, section 4.3.1) in small: a KL first stage of factor 8, which
LDMTextToImagePipeline takes for granted, from 64 x 64 pictures to 16 x 8 x 8 latents; BERT's word pieces, learnt from
the captions; LDMBert of three layers, trained with the UNet. The first stage begins at the packaged tiny base's, whose
three levels it has, with one more below.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny_base"))

from autoencoder import load_pictures, psnr, train, whiten

TINY_VAE = Path(__file__).parents[2] / "lora_kit" / "assets" / "tiny_base" / "vae"
VOCABULARY = 4096  # enough for nearly every word of the captions to be one piece
WIDTH = 160
LEVELS = 3
"""Of the tiny base's VAE."""


def new_first_stage() -> AutoencoderKL:
    """Factor 8, as much of it the tiny base's as fits: the innermost level and the layers at the latents are new."""
    vae = AutoencoderKL(
        block_out_channels=(16, 48, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,  # as many numbers as the tiny base's 4 x 16 x 16
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
    )
    tiny = AutoencoderKL.from_pretrained(TINY_VAE)
    vae.encoder.conv_in.load_state_dict(tiny.encoder.conv_in.state_dict())
    for level in range(LEVELS):
        # The tiny base's innermost level has no way further down, and nothing below it to come up from.
        own = vae.encoder.down_blocks[level].state_dict()
        vae.encoder.down_blocks[level].load_state_dict(own | tiny.encoder.down_blocks[level].state_dict())
        vae.decoder.up_blocks[level + 1].load_state_dict(tiny.decoder.up_blocks[level].state_dict())
    vae.encoder.mid_block.load_state_dict(tiny.encoder.mid_block.state_dict())
    for name in ("mid_block", "conv_norm_out", "conv_out"):
        getattr(vae.decoder, name).load_state_dict(getattr(tiny.decoder, name).state_dict())
    return vae


def trained_first_stage(folder: Path, steps: int, batch_size: int) -> AutoencoderKL:
    pictures = load_pictures(folder)
    pictures = pictures[torch.randperm(len(pictures))]
    held_out, pictures = pictures[:128], pictures[128:]
    vae = new_first_stage().to(memory_format=torch.channels_last)
    train(vae, pictures, steps, batch_size)
    vae.eval()
    whiten(vae, pictures)
    print(f"first stage: PSNR {psnr(vae, held_out):.2f} dB on {len(held_out)} pictures it was not trained on")
    return vae


def train_tokenizer(captions: list[str], folder: Path) -> BertTokenizer:
    """BERT's word pieces (Schuster & Nakajima 2012) with a small vocabulary, as the vocab.txt that BERT has."""
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(captions, vocab_size=VOCABULARY, min_frequency=1, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    pieces.save_model(str(folder))
    return BertTokenizer.from_pretrained(folder, model_max_length=77)


def new_text_encoder(vocabulary: int) -> LDMBertModel:
    """Fresh, with words that are far apart: at the config's deviation of 0.02 a few hundred steps' biases outgrew them,
    the last norm divided them away, and every caption had the same states."""
    network = LDMBertModel(
        LDMBertConfig(
            vocab_size=vocabulary,
            d_model=WIDTH,
            encoder_layers=3,
            encoder_ffn_dim=4 * WIDTH,
            encoder_attention_heads=4,
            head_dim=40,
        )
    )
    torch.nn.init.normal_(network.model.embed_tokens.weight, std=0.5)
    return network


def new_unet(channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 96, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads: diffusers' name for it
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """The published model's: 1000 steps, betas from 0.00085 to 0.012, linear in their roots."""
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
    parser.add_argument("--pictures", type=Path, default=Path("data/openmoji"), help="holds color/ and line/")
    parser.add_argument("--out", type=Path, default=Path("runs/ldm-text2im/fresh"))
    parser.add_argument("--first-stage", type=Path, help="a folder of this script's, whose trained one to take")
    parser.add_argument("--steps", type=int, default=700, help="of the first stage")
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    if arguments.first_stage:
        vae = AutoencoderKL.from_pretrained(arguments.first_stage / "vqvae")
    else:
        vae = trained_first_stage(arguments.pictures, arguments.steps, arguments.batch_size)
    captions = [json.loads(line)["text"] for line in (arguments.pictures / "color/metadata.jsonl").open()]
    tokenizer = train_tokenizer(captions, arguments.out / "tokenizer")
    unet, bert = new_unet(vae.config.latent_channels), new_text_encoder(len(tokenizer))
    LDMTextToImagePipeline(
        vqvae=vae.to(memory_format=torch.contiguous_format),
        bert=bert,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
    ).save_pretrained(arguments.out)
    sizes = f"UNet {unet.num_parameters() / 1e6:.2f} M, LDMBert {bert.num_parameters() / 1e6:.2f} M parameters"
    print(f"{arguments.out}: {sizes}, vocabulary {len(tokenizer)}")


if __name__ == "__main__":
    main()
