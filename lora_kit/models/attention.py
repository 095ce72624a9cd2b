"""What computes attention in the UNet and the VAE: torch's own (SDPA), or xformers where that is asked for."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.import_utils import is_xformers_available

from lora_kit.errors import RecipeError

_FIX = "set `model.attention: sdpa`"


def check_attention(kind: str) -> None:
    """Raise RecipeError where `kind` (`sdpa`, `xformers`) cannot be had on this machine."""
    if kind != "xformers":
        return
    if not is_xformers_available():
        raise RecipeError(
            "model.attention: xformers needs the package `xformers`, which is not installed. Run "
            f"`pip install lora_kit[xformers]`, or {_FIX}."
        )
    if not torch.cuda.is_available():
        raise RecipeError(f"model.attention: xformers runs on NVIDIA GPUs, and none was found; {_FIX}.")


def use_attention(kind: str, *networks: Any) -> None:
    """Let the networks' attention be computed so. `sdpa` is what diffusers takes of itself.

    networks: diffusers' UNets and autoencoders. Raises RecipeError as `check_attention`, and where diffusers' own trial
    of xformers fails.
    """
    check_attention(kind)
    if kind != "xformers":
        return
    for network in networks:
        try:
            network.enable_xformers_memory_efficient_attention()
        except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
            raise RecipeError(
                f"model.attention: xformers does not work here: {error} It must be built for this torch "
                f"({torch.__version__}) and GPU; install the one that is, or {_FIX}."
            ) from error
