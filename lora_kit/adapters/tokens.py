"""Learned tokens that come with an adapter (pivotal tuning, cloneofsimo/lora): into tokenizer and text encoder.

The base's own tokenizer and embedding are kept as objects; what stands in their place is made anew from them and all
learned tokens whenever an adapter with some comes or goes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_kit.adapters.places import Model
from lora_kit.adapters.record import Tokens, record_of, start_record
from lora_kit.errors import AdapterFileError, TargetError

TEXT_ENCODER = "text_encoder"


def token_names(token: str, vectors: int) -> list[str]:
    """What the tokenizer knows a token's vectors as, in diffusers' spelling: `<cat>`, `<cat>_1`, …"""
    return [token, *(f"{token}_{index}" for index in range(1, vectors))]


def check_tokens(model: Model, networks: Mapping[str, nn.Module], embeddings: Mapping[str, Tensor]) -> None:
    """Raise AdapterFileError listing every learned token that cannot be put in; nothing is changed."""
    if not embeddings:
        return
    tokenizer, network = _tokenizer(model), networks.get(TEXT_ENCODER)
    if tokenizer is None or network is None:
        raise AdapterFileError(
            f"the file comes with learned tokens ({', '.join(embeddings)}), which need a tokenizer and a text encoder: "
            "load it into a pipeline or a ModelBundle, or give its `updates` alone to leave them out."
        )
    width, known = _bare_embedding(network).embedding_dim, tokenizer.get_vocab()
    problems: list[str] = []
    for token, vector in embeddings.items():
        if vector.ndim not in (1, 2) or vector.shape[-1] != width or not len(vector):
            takes = f"the text encoder takes [{width}] or [n, {width}]"
            problems.append(f"{token}: its vectors are {list(vector.shape)}; {takes}")
        elif not bool(torch.isfinite(vector).all()):
            problems.append(f"{token}: holds NaN or infinite values")
        if known.keys() & set(token_names(token, len(vector) if vector.ndim == 2 else 1)):
            problems.append(f"{token}: the tokenizer has a token of that name already")
    if problems:
        raise AdapterFileError("\n  ".join(["the learned tokens do not fit; nothing was loaded:", *problems]))


def add_tokens(
    model: Model, networks: Mapping[str, nn.Module], adapter_name: str, embeddings: Mapping[str, Tensor]
) -> None:
    """Put checked tokens in: prompts can say them from now on. Other prompts are encoded as before."""
    if not embeddings:
        return
    network = networks[TEXT_ENCODER]
    record = start_record(network)
    if record.tokens is None:
        record.tokens = Tokens(_tokenizer(model), _bare_embedding(network))
    record.tokens.learned[adapter_name] = {
        name: row for token, vectors in embeddings.items() for name, row in _rows(token, vectors).items()
    }
    _rebuild(model, network, record.tokens)


def require_tokenizer(model: Model, networks: Mapping[str, nn.Module], adapter_name: str) -> None:
    """Raise TargetError if the adapter's learned tokens cannot be taken out of what was given."""
    tokens = _tokens(networks)
    if tokens and adapter_name in tokens.learned and _tokenizer(model) is None:
        raise TargetError(
            f"adapter `{adapter_name}` has learned tokens: eject it from the pipeline or bundle that it was loaded "
            "into, whose tokenizer knows them."
        )


def remove_tokens(model: Model, networks: Mapping[str, nn.Module], adapter_name: str) -> None:
    """Take an adapter's tokens out again; with the last, tokenizer and embedding are the base's own objects."""
    tokens = _tokens(networks)
    if tokens is None or tokens.learned.pop(adapter_name, None) is None:
        return
    network = networks[TEXT_ENCODER]
    _rebuild(model, network, tokens)
    if not tokens.learned:
        record_of(network).tokens = None


def _rows(token: str, vectors: Tensor) -> dict[str, Tensor]:
    """[width] or [n, width] → each vector by the name the tokenizer has for it."""
    rows = vectors.reshape(-1, vectors.shape[-1])
    return dict(zip(token_names(token, len(rows)), rows, strict=True))


def _rebuild(model: Model, network: nn.Module, tokens: Tokens) -> None:
    learned = {token: vector for one in tokens.learned.values() for token, vector in one.items()}
    tokenizer, embedding = tokens.tokenizer, cast(nn.Embedding, tokens.embedding)
    if learned:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(list(learned))
        ids = {tokenizer.convert_tokens_to_ids(token): vector for token, vector in learned.items()}
        embedding = _enlarged(embedding, ids)
    model.tokenizer = tokenizer
    cast(Any, network).set_input_embeddings(embedding)


def _enlarged(base: nn.Embedding, vectors: Mapping[int, Tensor]) -> nn.Embedding:
    """The embedding with a row for each id of `vectors`; rows that no token has, if any, are zero."""
    weight = base.weight.detach()
    rows = max(len(weight), 1 + max(vectors))
    enlarged = torch.cat([weight, weight.new_zeros(rows - len(weight), weight.shape[1])])
    for index, vector in vectors.items():
        enlarged[index] = vector.to(enlarged)
    made = nn.Embedding(*enlarged.shape, padding_idx=base.padding_idx, _weight=enlarged, _freeze=True)
    made.training = base.training
    return made


def _tokens(networks: Mapping[str, nn.Module]) -> Tokens | None:
    network = networks.get(TEXT_ENCODER)
    return None if network is None else record_of(network).tokens


def _bare_embedding(network: nn.Module) -> nn.Embedding:
    embedding: Any = cast(Any, network).get_input_embeddings()
    assert isinstance(embedding, nn.Embedding), f"the text encoder's tokens are a {type(embedding).__name__}"
    return embedding


def _tokenizer(model: Model) -> Any:
    """The tokenizer of a pipeline or bundle; a mapping of networks has none."""
    return None if isinstance(model, Mapping) else getattr(model, "tokenizer", None)
