from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lora_kit.targeting import ModuleInfo, canonical_name, module_tree
from lora_kit.targeting.names import spellings


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 5)
        self.down = nn.Conv2d(4, 6, 3, stride=2)
        self.norm = nn.LayerNorm(7)
        self.scale = nn.Parameter(torch.ones(2))
        self.act = nn.SiLU()


def test_modules_with_own_parameters_in_order() -> None:
    with torch.device("meta"):
        tree = module_tree({"unet": nn.Sequential(Block())})
    assert tree == [
        ModuleInfo("unet.0", "other", (2,), 2),
        ModuleInfo("unet.0.proj", "linear", (5, 3), 20),
        ModuleInfo("unet.0.down", "conv", (6, 4, 3, 3), 222),
        ModuleInfo("unet.0.norm", "other", (7,), 14),
    ]


def test_grouped_and_dilated_convolutions_are_not_for_lora() -> None:
    layers = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv1d(4, 4, 1))
    assert {module.kind for module in module_tree({"unet": layers})} == {"other"}


def test_injected_adapters_do_not_show() -> None:
    network = nn.Sequential(Block())
    before = module_tree({"unet": network})
    inject_adapter_in_model(LoraConfig(target_modules=["proj", "down"]), network)
    assert module_tree({"unet": network}) == before


def test_spellings_of_both_transformers_versions() -> None:
    old, new = "text_encoder.text_model.encoder.layers.0", "text_encoder.encoder.layers.0"
    assert (spellings(old), spellings(new)) == ((old, new), (new, old))
    assert canonical_name(old) == canonical_name(new) == new
    assert spellings("unet.conv_in") == ("unet.conv_in",)
