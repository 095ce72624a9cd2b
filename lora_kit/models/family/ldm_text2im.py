"""The original text-to-image latent diffusion, `CompVis/ldm-text2im-large-256`: UNet, LDMBert, KL or VQ first stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig
from torch import Tensor

from lora_kit.errors import ModelError
from lora_kit.models.bundle import Family, ModelBundle
from lora_kit.models.family.families import StableDiffusion, recognise


class LdmTextToImage(StableDiffusion):
    """LDM text-to-image (Rombach et al. 2022, section 4.3.1), told the last hidden state of LDMBert.

    As LDMTextToImagePipeline does: captions padded with [PAD] to the positions that the text encoder has, no attention
    mask, so that the network sees the states of the padding too. A long caption's chunks are each [CLS] … [SEP].
    """

    name = "ldm_text2im"
    pipeline_name = "LDMTextToImagePipeline"

    def token_limit(self, bundle: ModelBundle) -> int:
        """Positions of the text encoder: 77. The tokenizer's own limit is BERT's 512, and the pipeline passes it by."""
        return int(bundle.text_encoder.config.max_position_embeddings)

    def _states(self, bundle: ModelBundle, ids: Tensor) -> Tensor:
        # Said here, so that LDMBert does not ask its config and have transformers warn of that.
        return bundle.text_encoder(ids, return_dict=True).last_hidden_state


def recognise_ldm(unet: Mapping[str, Any], text: LDMBertConfig, source: str) -> Family:
    """The family of a base whose text encoder is LDMBert. Raises ModelError for one that is not the text-to-image's."""
    recognise(unet, int(text.hidden_size), source)  # refuses what no family here is
    if unet.get("in_channels") != unet.get("out_channels"):
        raise ModelError(
            f"{source} has LDMBert as its text encoder, and a UNet that takes {unet.get('in_channels')} channels and "
            f"gives {unet.get('out_channels')}; LDM text-to-image takes what it gives. Use parts of one model."
        )
    return LdmTextToImage()
