"""Text states of captions that differ in length: encoding in chunks, and padding with a mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kit.models.moving import rows_on


class PaddedStates(NamedTuple):
    """Text states of captions with different numbers of tokens, as one tensor."""

    states: Tensor
    """[b, tokens, width]; zeros behind the end of shorter captions."""
    mask: Tensor
    """bool [b, tokens]: False where nothing may be attended to."""


def join_states(states: Sequence[Tensor]) -> Tensor | PaddedStates:
    """Each caption's states [tokens, width] → one condition; a mask is needed only where they differ in length.

    Masked rather than filled with empty chunks, as web UIs do: those would be attended to, and a caption's prediction
    would depend on which others share its micro-batch.
    """
    longest = max(len(one) for one in states)
    if all(len(one) == longest for one in states):
        return torch.stack(list(states))
    padded = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True)
    lengths = rows_on([len(one) for one in states], padded.device)
    return PaddedStates(padded, torch.arange(longest, device=padded.device) < lengths[:, None])


def expand_tokens(tokenizer: Any, captions: Sequence[str]) -> list[str]:
    """Captions with each learned token of n vectors written out: `<cat>` → `<cat> <cat>_1 … <cat>_(n-1)`.

    The names are those of diffusers' TextualInversionLoaderMixin. Captions that were written out already stay.
    """
    added: Any = tokenizer.added_tokens_encoder
    for token in [name for name in added if f"{name}_1" in added]:
        count = next(n for n in range(1, len(added) + 1) if f"{token}_{n}" not in added)
        spelt = " ".join([token, *(f"{token}_{index}" for index in range(1, count))])
        pattern = re.compile(rf"{re.escape(token)}(?!_\d| {re.escape(token)}_1)", re.IGNORECASE)
        captions = [pattern.sub(lambda _, text=spelt: text, caption) for caption in captions]
    return list(captions)


def chunk_ids(tokenizer: Any, captions: Sequence[str], length: int) -> list[list[list[int]]]:
    """Each caption's token ids in chunks of `length`, as the tokenizer would write them: start, content, end, padding.

    A caption without words is one chunk. Content is cut every `length` - 2 tokens, in the middle of a word if need be.
    """
    written = expand_tokens(tokenizer, captions)
    encoded: Any = tokenizer(written, add_special_tokens=False, truncation=False, verbose=False)
    return [[_chunk(tokenizer, part, length) for part in _parts(ids, length - 2)] for ids in encoded.input_ids]


def _parts(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, max(1, len(ids)), size)]


def _chunk(tokenizer: Any, content: list[int], length: int) -> list[int]:
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if start is None:  # BERT's tokenizers call them otherwise
        start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = [start, *content, end]
    return ids + [tokenizer.pad_token_id] * (length - len(ids))
