"""Lay out a tiny LDM text-to-image model as a diffusers folder: the tiny base's first stage and U-Net, a fresh LDMBert.

    python scripts/tiny_base/openmoji.py --out data/openmoji
    python scripts/ldm/text2im.py --captions data/openmoji/color/metadata.jsonl --out runs/ldm-text2im/fresh
    accelerate launch scripts/train_lora.py scripts/ldm/text2im.yaml           LDMBert and U-Net, by method: full
    accelerate launch scripts/train_lora.py scripts/ldm/text2im_lora.yaml      a style LoRA on that

The published model (Rombach et al. 2022, section 4.3.1) in small: a KL first stage; BERT's word pieces, learnt from the
captions; LDMBert of three layers. Its U-Net has the form of Stable Diffusion v1's, so the tiny base's begins it: it
knows pictures, and none of LDMBert's words, which the two then learn together.

The first stage is of factor 4, and LDMTextToImagePipeline reckons latents as size // 8: ask it for 128 x 128 to have
64 x 64 pictures. lora_kit goes by the first stage.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizer

TINY_BASE = Path(__file__).parents[2] / "lora_kit" / "assets" / "tiny_base"
VOCABULARY = 4096  # enough for nearly every word of the captions to be one piece


def train_tokenizer(captions: list[str], folder: Path) -> BertTokenizer:
    """BERT's word pieces (Schuster & Nakajima 2012) with a small vocabulary, as the vocab.txt that BERT has."""
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(captions, vocab_size=VOCABULARY, min_frequency=1, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    pieces.save_model(str(folder))
    return BertTokenizer.from_pretrained(folder, model_max_length=77)


def new_text_encoder(vocabulary: int, width: int) -> LDMBertModel:
    """Fresh, with words that are far apart: at the config's deviation of 0.02 a few hundred steps' biases outgrew them,
    the last norm divided them away, and every caption had the same states."""
    network = LDMBertModel(
        LDMBertConfig(
            vocab_size=vocabulary,
            d_model=width,
            encoder_layers=3,
            encoder_ffn_dim=4 * width,
            encoder_attention_heads=4,
            head_dim=width // 4,
        )
    )
    torch.nn.init.normal_(network.model.embed_tokens.weight, std=0.5)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, default=Path("data/openmoji/color/metadata.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/ldm-text2im/fresh"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    captions = [json.loads(line)["text"] for line in arguments.captions.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(captions, arguments.out / "tokenizer")
    unet = UNet2DConditionModel.from_pretrained(TINY_BASE, subfolder="unet", torch_dtype=torch.float32)
    bert = new_text_encoder(len(tokenizer), unet.config["cross_attention_dim"])
    LDMTextToImagePipeline(
        vqvae=AutoencoderKL.from_pretrained(TINY_BASE, subfolder="vae", torch_dtype=torch.float32),
        bert=bert,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_pretrained(TINY_BASE, subfolder="scheduler"),
    ).save_pretrained(arguments.out)
    sizes = f"U-Net {unet.num_parameters() / 1e6:.2f} M, LDMBert {bert.num_parameters() / 1e6:.2f} M parameters"
    print(f"{arguments.out}: {sizes}, vocabulary {len(tokenizer)}")


if __name__ == "__main__":
    main()
