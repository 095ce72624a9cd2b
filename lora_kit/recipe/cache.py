"""The part of `data:` that says where encoded pictures and captions are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from lora_kit.recipe.base import PathText, Section


class CacheSection(Section):
    """What is kept of pictures and captions once they are encoded."""

    cache: Literal["memory", "disk", "none"] = "memory"
    """Keep each picture's latent distribution, so that the VAE encodes it once: in `memory` for this run (128 KiB a
    picture at 512 px), or on `disk` for all runs. On disk the text states of a frozen text encoder are kept too
    (231 KiB a caption for SD 1.x), and memory does not grow with the pictures. Latents are not kept with
    `crop: random`, nor anything with `none`. `lora-kit cache` fills the disk ahead of a run."""
    cache_dir: PathText | None = None
    """Folder of `cache: disk`; many recipes can share one. Default: what the environment variable LORA_KIT_CACHE
    names, else `lora_kit` in XDG_CACHE_HOME, else ~/.cache/lora_kit. What was made of another picture, caption,
    crop, VAE or text encoder has another key, so nothing stale is ever read."""
    cache_dtype: Literal["fp32", "fp16"] = "fp32"
    """Precision of latents on disk. fp32: the run is the same as with `memory`. fp16 halves the disk, and rounds
    latents by up to 0.05 %, far less than the VAE itself loses."""


def cache_folder(section: CacheSection) -> Path:
    """Where `cache: disk` keeps things, absolute. It need not exist yet."""
    named = section.cache_dir or os.environ.get("LORA_KIT_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    # Such a variable that holds a relative path is to be ignored (XDG base directory specification).
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path("~/.cache").expanduser()) / "lora_kit"
