"""The text encoders that families have: CLIP's (Radford et al. 2021), and LDMBert of the original latent diffusion.

LDMBert is what Rombach et al. 2022 trained together with their text-to-image UNet: a transformer of BERT's kind over
BERT's word pieces, here in diffusers' form.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModel

TextConfig = CLIPTextConfig | LDMBertConfig
TextModel = CLIPTextModel | LDMBertModel

CLASSES: dict[str, tuple[type[TextConfig], type[TextModel]]] = {
    "CLIPTextModel": (CLIPTextConfig, CLIPTextModel),
    "LDMBertModel": (LDMBertConfig, LDMBertModel),
}
"""The name that model_index.json has → the classes of config and network."""


def text_model(config: TextConfig) -> TextModel:
    """A text encoder of the config's kind with new weights, which torch's global random state decides."""
    if isinstance(config, LDMBertConfig):
        return without_dropout(LDMBertModel(config))
    return CLIPTextModel(config)


def without_dropout(network: Any) -> Any:
    """The same text encoder, with every dropout of an LDMBert's own off, in train mode too.

    diffusers' config says 0.1 where the original has none (`embedding_dropout=0.0` in CompVis' BERTEmbedder), and
    SD's CLIP has none either. The base's dropout would make its states random and a resumed run another one: its
    draws come from torch's global state. The config stays as it is.
    """
    if isinstance(network, LDMBertModel):
        for module in network.modules():
            for rate in ("dropout", "activation_dropout"):
                if isinstance(getattr(module, rate, None), float):
                    setattr(module, rate, 0.0)
    return network


def checkpoint_activations(network: TextModel) -> None:
    """Recompute the layers' activations in the backward pass.

    LDMBert has the code for it, but under a flag's name of transformers 3, so that transformers 5 refuses to switch it
    on.
    """
    if isinstance(network, LDMBertModel):
        encoder: Any = network.model
        encoder.gradient_checkpointing = True
        encoder._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    else:
        network.gradient_checkpointing_enable({"use_reentrant": False})
