"""Learned tokens inside an adapter file: `bundle_emb.<token>.string_to_param.*` (A1111's web UI, Forge, ComfyUI) or
`bundle_emb.<token>.clip_l` (OneTrainer, ComfyUI), each [n, width].

Facts from A1111's extensions-builtin/Lora/networks.py, ComfyUI's sd1_clip.py and OneTrainer's LoRA savers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lora_kit.errors import AdapterFileError

_KEY = re.compile(r"bundle_emb\.(?P<token>.+)\.(?:string_to_param\.\*|clip_l|clip_h)")


def token_of(key: str) -> str | None:
    """The token whose vectors the key holds, or None if it is another key."""
    match = _KEY.fullmatch(key)
    return match["token"] if match else None


def take_bundled(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the tokens' vectors out of a file's tensors, by token.

    Raises AdapterFileError for a token that is there twice, or a `bundle_emb` key of another model's.
    """
    found: dict[str, Tensor] = {}
    strange = [key for key in tensors if key.startswith("bundle_emb.") and token_of(key) is None]
    for key in [key for key in tensors if token_of(key) is not None]:
        token = token_of(key) or ""
        if token in found:
            strange.append(key)
        found[token] = tensors.pop(key)
    if strange:
        raise AdapterFileError(
            f"{path}: {', '.join(strange[:5])}: tokens of another model, or twice; known are "
            "bundle_emb.TOKEN.string_to_param.* and bundle_emb.TOKEN.clip_l."
        )
    return found


def bundled_tensors(embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tokens' vectors [width] or [n, width] under the keys that hold them in an adapter file.

    Raises AdapterFileError for a name with a dot, which A1111 would cut.
    """
    if dotted := sorted(token for token in embeddings if "." in token):
        raise AdapterFileError(f"learned tokens with a dot cannot lie in an adapter file: {', '.join(dotted)}")
    return {
        f"bundle_emb.{token}.string_to_param.*": vectors.reshape(-1, vectors.shape[-1]).contiguous()
        for token, vectors in embeddings.items()
    }


def without_bundled(keys: Iterable[str]) -> list[str]:
    """The keys that are no tokens'."""
    return [key for key in keys if not key.startswith("bundle_emb.")]
