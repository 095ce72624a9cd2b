"""A CLIP tokenizer of a few words, for bases made in tests."""

from __future__ import annotations

from typing import Any

SUBJECTS = ("red apple", "green tree", "blue boat", "black cat", "yellow sun", "grey house", "white fish", "brown dog")
WORDS = [*dict.fromkeys(word for subject in SUBJECTS for word in subject.split())]


def _byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes in byte-level BPE (Radford et al. 2019)."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _merges() -> list[tuple[str, str]]:
    """The merges that make each of WORDS a single token, left to right."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges[(pieces[0], pieces[1])] = None
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(merges)


def small_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """A CLIPTokenizer with 77 positions and a vocabulary of bytes and WORDS; start and end are the last two ids."""
    from transformers import CLIPTokenizer

    letters, merges = _byte_letters(), _merges()
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)])
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad_token)
