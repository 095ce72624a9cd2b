"""The base's fingerprint."""

from __future__ import annotations

import hashlib

import torch

from lora_kit.errors import ModelError
from lora_kit.models.bundle import ModelBundle


def base_hash(bundle: ModelBundle) -> str:
    """sha256 (64 hex digits) over the UNet's and text encoder's tensors in name order: name, dtype, shape, bytes.

    The same for the same weights in the same dtype, however they were stored; take it before adapters are
    injected. Reads every byte once: about a second for SD 1.5 in half precision.
    """
    digest = hashlib.sha256()
    for component, network in sorted(bundle.components.items()):
        # transformers 5.6 dropped CLIPTextModel's inner `text_model.`.
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in network.state_dict().items()}
        for name, tensor in sorted(tensors.items()):
            if tensor.is_meta:
                raise ModelError(f"{bundle.source} was only laid out, without weights: load it with load_bundle.")
            digest.update(f"{component}.{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
