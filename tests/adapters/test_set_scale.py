"""Strengths of live adapters, as a whole and per block."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from live_samples import dense_updates, lora_updates, picture, small_net
from peft import LoraConfig
from torch import Tensor, nn

from lora_kit.adapters import Strength, load_adapter, set_scale
from lora_kit.adapters.layers import live_layers
from lora_kit.adapters.scaling import adapted_modules
from lora_kit.errors import RecipeError, TargetError


@pytest.fixture
def net() -> dict[str, nn.Module]:
    net = small_net()
    load_adapter(net, lora_updates(net), "style")
    load_adapter(net, dense_updates(net, 1), "face")
    return net


def strengths(net: Mapping[str, nn.Module], adapter: str) -> dict[str, float]:
    """Module → strength as the layers hold it; 0 where the adapter is off."""
    found: dict[str, float] = {}
    for name, (lora, delta, _) in live_layers(net).items():
        if lora is not None and adapter in lora.lora_A:
            on = adapter in lora.active_adapters
            found[name] = lora.scaling[adapter] / (lora.lora_alpha[adapter] / lora.r[adapter]) if on else 0.0
        if delta is not None and adapter in delta.updates:
            found[name] = delta.scales.get(adapter, 0.0)
    return found


@pytest.mark.parametrize(
    "scale",
    [
        {"unet.**": 0.5, "unet.up_blocks.**": 0.25, "unet.proj": 0},
        Strength(0.5, ("unet.up_blocks.**=0.5", "unet.proj=0")),
    ],
)
@pytest.mark.parametrize("adapter", ["style", "face"])
def test_the_last_glob_that_matches_decides(adapter: str, scale: object, net: dict[str, nn.Module]) -> None:
    set_scale(net, {adapter: scale})
    expected = {
        name: 0.0 if name == "unet.proj" else 0.25 if "up_blocks" in name else 0.5
        for name in adapted_modules(net)[adapter]
    }
    assert strengths(net, adapter) == expected
    other = {"style": "face", "face": "style"}[adapter]
    assert set(strengths(net, other).values()) == {0.0}


def test_a_module_that_no_glob_matches_has_strength_one(net: dict[str, nn.Module]) -> None:
    set_scale(net, {"style": {"unet.proj": 0.5}, "face": "unet.norm=-2"})
    assert strengths(net, "style") == {name: 0.5 if name == "unet.proj" else 1.0 for name in strengths(net, "style")}
    assert strengths(net, "face") == {name: -2.0 if name == "unet.norm" else 1.0 for name in strengths(net, "face")}


def test_per_module_strengths_act_on_the_output(net: dict[str, nn.Module]) -> None:
    set_scale(net, {"style": {"unet.**": 0, "unet.proj": 0.5}})
    got = net["unet"](picture())
    only = small_net()
    load_adapter(only, {"unet.proj": lora_updates(only)["unet.proj"]}, "style")
    set_scale(only, {"style": 0.5})
    assert torch.equal(got, only["unet"](picture()))


def test_everything_wrong_is_told_before_anything_changes(net: dict[str, nn.Module]) -> None:
    set_scale(net, {"style": 0.5})
    before = net["unet"](picture())
    with pytest.raises(RecipeError) as caught:
        set_scale(net, {"style": {"unet.nowhere": 1}, "face": "unet.proj=much"})
    said = str(caught.value)
    assert "adapter `style`" in said
    assert "`unet.nowhere` matches no adapted module" in said
    assert "adapter `face`" in said
    assert "PATTERN=NUMBER" in said
    with pytest.raises(TargetError, match="no adapter is named `other`"):
        set_scale(net, {"style": 1, "other": 1})
    with pytest.raises(TargetError, match="scale of adapter `style` is inf"):
        set_scale(net, {"face": 1, "style": float("inf")})
    with pytest.raises(RecipeError, match="block weights"):
        set_scale(net, {"style": "1,2,3"})
    assert torch.equal(net["unet"](picture()), before)


def test_adapters_that_others_put_in_stay_as_they_are() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = small_net()["unet"]

    from peft import inject_adapter_in_model

    holder = Foreign()
    config = LoraConfig(r=2, target_modules=["proj", "conv_in"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(config, holder.unet, "theirs")
    theirs = holder.unet(picture())
    net: dict[str, nn.Module] = {"unet": holder.unet}
    load_adapter(net, lora_updates(net), "ours")
    assert not torch.equal(holder.unet(picture()), theirs)
    set_scale(net, {"ours": 0})
    assert torch.equal(holder.unet(picture()), theirs)


class Level(nn.Module):
    """One level of a UNet: as many residual blocks as Stable Diffusion has, each a linear layer."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([nn.ModuleDict({"conv1": nn.Linear(4, 4)}) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block["conv1"](x)
        return x


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Level(2) for _ in range(4)])
        self.mid_block = Level(2)
        self.up_blocks = nn.ModuleList([Level(3) for _ in range(4)])


def test_block_weights_reach_the_blocks_they_name() -> None:
    net: dict[str, nn.Module] = {"unet": Levels(), "text_encoder": nn.ModuleDict({"layers": nn.Linear(4, 4)})}
    load_adapter(net, lora_updates(net), "style")
    numbers = [round(0.01 * (index + 1), 2) for index in range(26)]
    set_scale(net, {"style": ",".join(map(str, numbers))})
    got = strengths(net, "style")
    # BASE is number 0, IN00 to IN11 are 1 to 12, M00 is 13, OUT00 to OUT11 are 14 to 25. A level of the down path
    # takes three places, its second residual block being IN02 on the first level.
    assert got["text_encoder.layers"] == pytest.approx(0.01)
    assert got["unet.down_blocks.0.resnets.1.conv1"] == pytest.approx(0.04)
    assert got["unet.mid_block.resnets.0.conv1"] == pytest.approx(0.14)
    assert got["unet.up_blocks.3.resnets.2.conv1"] == pytest.approx(0.26)


def test_block_weights_are_refused_where_the_blocks_are_others(net: dict[str, nn.Module]) -> None:
    with pytest.raises(RecipeError, match="block weights"):
        set_scale(net, {"style": ",".join(["1"] * 17)})
