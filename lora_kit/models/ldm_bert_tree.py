"""Config → module tree of diffusers' LDMBertModel, as `models.architecture` has it for the other networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_kit.models.architecture import UnknownArchitectureError, described_module
from lora_kit.targeting import ModuleInfo

MODEL_TYPE = "ldmbert"
"""What a text encoder's config.json calls it."""
_DEFAULTS: dict[str, int] = {
    "vocab_size": 30522,
    "max_position_embeddings": 77,
    "encoder_layers": 32,
    "encoder_ffn_dim": 5120,
    "encoder_attention_heads": 8,
    "head_dim": 64,
    "d_model": 1280,
}
"""LDMBertConfig's own, the published base's."""


def ldm_bert_tree(config: Mapping[str, Any]) -> list[ModuleInfo]:
    """The modules that take part in a forward pass: all but `to_logits`."""
    return list(_modules(_whole(config)))


def uncalled_parameters(config: Mapping[str, Any]) -> int:
    """Weights and biases of `to_logits`, which lie in memory too."""
    whole = _whole(config)
    return int((whole["d_model"] + 1) * whole["vocab_size"])


def _whole(config: Mapping[str, Any]) -> Mapping[str, int]:
    if config.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise UnknownArchitectureError
    return _DEFAULTS | {key: config[key] for key in _DEFAULTS if key in config}


def _modules(config: Mapping[str, int]) -> Iterator[ModuleInfo]:
    width, middle = config["d_model"], config["encoder_ffn_dim"]
    inside = config["encoder_attention_heads"] * config["head_dim"]
    name = "text_encoder.model"
    yield described_module(f"{name}.embed_tokens", "other", config["vocab_size"], width, bias=False)
    yield described_module(f"{name}.embed_positions", "other", config["max_position_embeddings"], width, bias=False)
    for index in range(config["encoder_layers"]):
        layer = f"{name}.layers.{index}"
        for part in ("k_proj", "v_proj", "q_proj"):
            yield described_module(f"{layer}.self_attn.{part}", "linear", inside, width, bias=False)
        yield described_module(f"{layer}.self_attn.out_proj", "linear", width, inside)
        yield described_module(f"{layer}.self_attn_layer_norm", "other", width)
        yield described_module(f"{layer}.fc1", "linear", middle, width)
        yield described_module(f"{layer}.fc2", "linear", width, middle)
        yield described_module(f"{layer}.final_layer_norm", "other", width)
    yield described_module(f"{name}.layer_norm", "other", width)
