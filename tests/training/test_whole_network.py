"""What a full fine-tune writes is a cast copy: the weights that are measured and drawn stay as they were trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_kit.models import load_bundle
from lora_kit.recipe import ModelSection
from lora_kit.training.processes.sharding import whole_network


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_network_is_a_copy_with_every_weight_rounded_once(tiny_sd1_folder: Path, dtype: torch.dtype) -> None:
    bundle = load_bundle(ModelSection(base=str(tiny_sd1_folder)))
    for network in (bundle.unet, bundle.text_encoder, bundle.vae):
        before = {name: one.clone() for name, one in network.state_dict().items()}
        made = whole_network(network, keeps=True, dtype=dtype)
        assert made is not network and type(made) is type(network)
        found = made.state_dict()
        assert found.keys() == before.keys()
        for name, own in before.items():
            assert torch.equal(network.state_dict()[name], own)
            assert torch.equal(found[name], own.to(dtype) if own.is_floating_point() else own)


def test_nothing_is_copied_where_nothing_is_cast(tiny_sd1_folder: Path) -> None:
    unet = load_bundle(ModelSection(base=str(tiny_sd1_folder))).unet
    assert whole_network(unet, keeps=True, dtype=torch.float32) is unet
    assert whole_network(unet, keeps=True) is unet
