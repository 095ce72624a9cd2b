"""Folders that PEFT itself saved, and configs by PEFT's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import bundle_of
from library_outputs import TOLERANCE, assert_same, dora_tolerance, double_bundle, outputs, outputs_by_weight
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from lora_kit.adapters import read_adapter
from lora_kit.adapters.formats.peft_rules import check_effort, rules_from
from lora_kit.errors import AdapterFileError

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def saved_by_peft(base: Path, component: str, config: Any, folder: Path) -> Any:
    """PEFT's own folder with random weights, and what the network then computes."""
    from peft import get_peft_model

    networks = dict(double_bundle(base).components)
    torch.manual_seed(0)
    model = get_peft_model(networks[component], config)
    for name, weight in model.named_parameters():
        if "magnitude" in name:
            weight.data *= 1 + 0.1 * torch.rand_like(weight)
    model.save_pretrained(folder)
    networks[component] = model.get_base_model()
    return outputs(networks["unet"], networks["text_encoder"])


def lora(**more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **more)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"attn2.*to_k": 2, "conv1": 3}, "alpha_pattern": {"to_out.0": 9, "^conv_in": 1}},
    ],
)
def test_a_folder_of_the_unet(more: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    config = lora(target_modules=["to_q", "to_k", "to_out.0", "conv1", "conv_in", "proj_in"], **more)
    expected = saved_by_peft(folder, "unet", config, tmp_path / "a")
    state = read_adapter(tmp_path / "a", double_bundle(folder).components)
    tolerance = dora_tolerance(state) if "use_dora" in more else TOLERANCE
    assert_same(outputs_by_weight(folder, state), expected, tolerance)


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
@pytest.mark.parametrize("effective", [False, True])
def test_peft_loha_and_lokr(kind: str, effective: bool, tiny_sd1_folder: Path, tmp_path: Path) -> None:
    import peft

    config = getattr(peft, kind)(
        r=2,
        alpha=3,  # PEFT rounds LoHa's alpha / r to fp32: here it is exact in it
        target_modules=["to_q", "to_k", "conv1", "proj_in", "conv_in"],
        rank_pattern={"attn2.to_k": 1},
        alpha_pattern={"conv1": 5},
        use_effective_conv2d=effective,
        init_weights=False,
    )
    expected = saved_by_peft(tiny_sd1_folder, "unet", config, tmp_path / "a")
    state = read_adapter(tmp_path / "a", double_bundle(tiny_sd1_folder).components)
    assert {update.method for update in state.updates.values()} == {kind[:4].lower()}
    assert_same(outputs_by_weight(tiny_sd1_folder, state), expected)


def test_what_only_peft_can_say_of_a_lokr_is_refused(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    from peft import LoKrConfig

    config = LoKrConfig(r=32, alpha=16, target_modules=["to_q"], init_weights=False)
    saved_by_peft(tiny_sd1_folder, "unet", config, tmp_path / "a")
    assert "both factors are whole, so only alpha = rank can be held" in said(tmp_path / "a", tiny_sd1_folder)


def test_a_config_of_another_method_than_its_tensors_is_refused(peft_folder: Path, tiny_sd1_folder: Path) -> None:
    (peft_folder / "adapter_config.json").write_text('{"peft_type": "LOHA", "r": 4, "alpha": 8}')
    assert "its tensors are not those of the config's method, loha" in said(peft_folder, tiny_sd1_folder)


def test_a_folder_of_the_text_encoder_is_known_by_its_names(folder: Path, tmp_path: Path) -> None:
    expected = saved_by_peft(folder, "text_encoder", lora(target_modules=["q_proj", "fc2"]), tmp_path / "a")
    state = read_adapter(tmp_path / "a", double_bundle(folder).components)
    assert {name.partition(".")[0] for name in state.updates} == {"text_encoder"}
    assert_same(outputs_by_weight(folder, state), expected)


def test_two_folders_in_one(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    unet = saved_by_peft(tiny_sd1_folder, "unet", lora(target_modules=["to_q"]), tmp_path / "a" / "unet")
    text = saved_by_peft(tiny_sd1_folder, "text_encoder", lora(target_modules=["fc1"]), tmp_path / "a" / "text_encoder")
    state = read_adapter(tmp_path / "a", double_bundle(tiny_sd1_folder).components)
    got = outputs_by_weight(tiny_sd1_folder, state)
    assert_same(got, type(got)(text.states, unet.noise))


@pytest.mark.parametrize(
    "names", ["mid_block.*to_q", Q, "to_q", "^to_q", "attn1.to_q|attn2.to_q", "o_q", r"attn\d.to_q"]
)
def test_patterns_match_as_in_peft(names: str) -> None:
    rules = rules_from({"r": 4, "lora_alpha": 8, "alpha_pattern": {names: 2}, "rank_pattern": {names: 1}}, "config")
    matches = get_pattern_key([names], Q) == names
    assert (rules.alpha_of(Q, 4), rules.rank_of(Q)) == ((2.0, 1) if matches else (8.0, 4))


def test_the_first_pattern_that_matches_decides() -> None:
    assert rules_from({"alpha_pattern": {"to_q": 1, "attn1.to_q": 2}}, "config").alpha_of(Q, 4) == 1.0
    assert rules_from({"alpha_pattern": {"attn1.to_q": 2, "to_q": 1}}, "config").alpha_of(Q, 4) == 2.0


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"peft_type": "OFT"}, "PEFT's OFT cannot be read .*; allowed: LORA, LOHA, LOKR"),
        ({"peft_type": "IA3"}, "scales the bias too"),
        ({"peft_type": 7}, "PEFT's 7 cannot be read"),
        ({"lora_bias": True, "bias": "all"}, "uses lora_bias, bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base's own weights"),
        ({"r": "4"}, "a rank is '4'"),
        ({"r": True}, "a rank is True"),
        ({"lora_alpha": float("nan")}, "an alpha is nan"),
        ({"lora_alpha": 10**400}, "an alpha is 1000"),
        ({"rank_pattern": []}, None),
        ({"rank_pattern": {"a[[x]": 1}}, None),
        ({"rank_pattern": [1]}, "rank_pattern is no object"),
        ({"rank_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": {"(a+)+x": 1}}, "could take for ever"),
        ({"alpha_pattern": {r"(a)\1": 1}}, "could take for ever"),
        ({"alpha_pattern": {"(?=a)b": 1}}, "could take for ever"),
        ({"alpha_pattern": {"a?a?a?a?": 1}}, "could take for ever"),
        ({"alpha_pattern": {"(a|a)(a|a)(a|a)": 1}}, "could take for ever"),
    ],
)
def test_a_config_that_cannot_be_held_is_told(config: dict[str, Any], what: str | None) -> None:
    if what is None:
        rules_from(config, "config")
        return
    with pytest.raises(AdapterFileError, match=what):
        rules_from(config, "config")


def test_the_effort_of_matching_is_bounded() -> None:
    many = rules_from({"alpha_pattern": {f".*{index}.*x": 1 for index in range(100)}}, "config")
    with pytest.raises(AdapterFileError, match="100 patterns for 300 modules"):
        check_effort([many], 300, "config")


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    tensors = {f"base_model.model.{Q}.lora_A.weight": torch.ones(4, 64)}
    tensors[f"base_model.model.{Q}.lora_B.weight"] = torch.ones(64, 4)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    return tmp_path


def said(folder: Path, base: Path) -> str:
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(folder, bundle_of(base).components)
    return str(caught.value)


def test_what_is_wrong_with_a_folder_is_told(peft_folder: Path, tiny_sd1_folder: Path) -> None:
    config, weights = peft_folder / "adapter_config.json", peft_folder / "adapter_model.safetensors"
    assert read_adapter(peft_folder, bundle_of(tiny_sd1_folder).components).updates[f"unet.{Q}"].alpha == 4
    config.write_text('{"r": 8, "lora_alpha": 8}')
    assert f"{Q}: its tensors have rank 4, its config says 8" in said(peft_folder, tiny_sd1_folder)
    config.write_text("{" * 100_000)
    assert "is not JSON" in said(peft_folder, tiny_sd1_folder)
    config.write_text("[" * 100_000)
    assert "is not JSON" in said(peft_folder, tiny_sd1_folder)
    config.write_text('{"r": 4}')
    weights.rename(peft_folder / "adapter_model.bin")
    assert "adapter_model.bin, a pickle" in said(peft_folder, tiny_sd1_folder)
    (peft_folder / "adapter_model.bin").unlink()
    assert "no such file" in said(peft_folder, tiny_sd1_folder)
    config.unlink()
    assert "a folder without adapter_config.json" in said(peft_folder, tiny_sd1_folder)


def test_a_part_under_two_names_is_refused(peft_folder: Path, tiny_sd1_folder: Path) -> None:
    tensors = {
        f"unet.{Q}.{one}.weight": torch.ones(4, 64) if one in ("lora_A", "lora.down") else torch.ones(64, 4)
        for one in ("lora_A", "lora_B", "lora.down", "lora.up")
    }
    save_file(tensors, peft_folder / "a.safetensors")
    assert "2 parts are in the file twice" in said(peft_folder / "a.safetensors", tiny_sd1_folder)
