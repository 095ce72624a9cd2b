"""A whole small UNet wrapped by LyCORIS, its file read by us: outputs agree for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import bundle_of
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_kit.adapters import AdapterState, read_adapter

SCALE = 0.7
METHODS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon"},
    "locon tucker": {"algo": "locon", "use_tucker": True},
    "dora": {"algo": "locon", "dora_wd": True},
    "loha": {"algo": "loha"},
    "loha tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "full and norms": {"algo": "full", "train_norm": True},
    "diag-oft": {"algo": "diag-oft", "constraint": 0.01, "rescaled": True},
    "boft": {"algo": "boft", "preset": "attn-mlp"},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
}


def randomise(network: LycorisNetwork) -> None:
    """Small changes to every module, so that the output stays in range through all layers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("dora_scale", "rescale")):
                parameter.mul_(1 + 0.1 * noise)
            else:  # of `full`, which holds the weights themselves, a change; of the others what they began with, too
                parameter.add_(0.02 * noise)


def output(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    states = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    dtype = next(unet.parameters()).dtype
    with torch.no_grad():
        return unet(latents.to(dtype), torch.tensor([500]), states.to(dtype)).sample.double()


def merge(unet: nn.Module, state: AdapterState, scale: float) -> None:
    with torch.no_grad():
        for name, update in state.updates.items():
            module = unet.get_submodule(name.removeprefix("unet."))
            changes = ((module.weight, update.weight_delta), (getattr(module, "bias", None), update.bias_delta))
            deltas = [(own, change(scale, own, torch.float64)) for own, change in changes]
            for own, delta in deltas:
                if delta is not None:
                    assert own is not None
                    own += delta


@pytest.mark.parametrize("method", METHODS)
def test_the_network_computes_what_lycoris_does(method: str, tiny_sd1_folder: Path, tmp_path: Path) -> None:
    unet = bundle_of(tiny_sd1_folder).unet.eval()
    options = {"preset": "full", "linear_dim": 4, "linear_alpha": 2.0, **METHODS[method]}
    network = create_lycoris(unet, SCALE, **options)
    network.apply_to()
    randomise(network.eval())
    path = tmp_path / "a.safetensors"
    save_file({key: value.detach().contiguous() for key, value in network.state_dict().items()}, path)
    theirs = output(unet)

    plain = bundle_of(tiny_sd1_folder)
    before = output(plain.unet.eval())
    state = read_adapter(path, plain.components)
    assert len(state.updates) == len(network.loras) > 50
    exact = plain.unet.double()
    merge(exact, state, SCALE)
    ours = output(exact)
    effect = (ours - before).abs().max()
    rounding = (output(exact.float()) - ours).abs().max()
    # LyCORIS adds each layer's change in fp32 to the base's output: two such sums where the merged network in fp32 has
    # one. What that network loses to fp32 is measured here on the spot; theirs may be a small multiple of it.
    assert rounding < 1e-3 * effect
    assert (theirs - ours).abs().max() <= 16 * rounding
