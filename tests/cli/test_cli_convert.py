from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import bundle_of, lycoris_state, random_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_kit.adapters import AdapterState, read_adapter, refusals, write_kohya
from lora_kit.adapters.updates import build_update
from lora_kit.cli.main import main
from lora_kit.models.known_trees import known_tree

HEADER = {
    "ss_base_model_version": "sd_v1",
    "ss_tag_frequency": '{"my cats": {"a cat": 2}}',
    "ss_dataset_dirs": '{"my cats": {}}',
    "ss_seed": "7",
    "modelspec.title": "cats",
}


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    write_kohya(tmp_path / "a.safetensors", random_state(bundle_of(folder).components)._replace(metadata=HEADER))
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_there_and_back_is_the_same_file(to: str, dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    """Every tensor, every alpha, the header and its two hashes: the very bytes."""
    state = random_state(bundle_of(folder).components)._replace(metadata=HEADER)
    write_kohya(tmp_path / "a.safetensors", state, dtype)
    assert run("convert", tmp_path / "a.safetensors", "--to", to, "--out", tmp_path / "b", "--base", folder) == 0
    assert run("convert", tmp_path / "b", "--to", "kohya", "--out", tmp_path / "c", "--base", folder) == 0
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_captions_stay_behind_when_asked(file: Path, folder: Path, tmp_path: Path) -> None:
    assert run("convert", file, "--to", "kohya", "--out", tmp_path / "b", "--base", folder, "--no-captions") == 0
    kept = {key: text for key, text in metadata_of(tmp_path / "b").items() if not key.startswith("sshs_")}
    assert kept == {key: text for key, text in HEADER.items() if key not in ("ss_tag_frequency", "ss_dataset_dirs")}
    # The hash is that of the tensors, so it stays; the bytes of the captions are gone.
    assert metadata_of(tmp_path / "b")["sshs_model_hash"] == metadata_of(file)["sshs_model_hash"]
    assert b"cat" not in (tmp_path / "b").read_bytes().replace(b'"modelspec.title":"cats"', b"")


def test_a_cast_is_a_cast(file: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("convert", file, "--to", "kohya", "--out", tmp_path / "b", "--base", folder, "--dtype", "fp16") == 0
    assert "cast to fp16" in capsys.readouterr().out
    old, new = load_file(file), load_file(tmp_path / "b")
    for key, tensor in old.items():
        assert torch.equal(new[key], tensor if key.endswith("alpha") else tensor.half())


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_names_of_the_published_bases_need_no_base(family: str, tmp_path: Path) -> None:
    wanted = ("unet.mid_block.attentions.0.", "unet.conv_in", "text_encoder")
    modules = {one.name: one for one in known_tree(family) if one.kind != "other" and one.name.startswith(wanted)}
    tensors = {}
    for name, module in modules.items():
        if not name.startswith("text_encoder") or ".layers.3." in name:
            tensors[f"{name}.lora_A.weight"] = torch.ones(1, *module.shape[1:])
            tensors[f"{name}.lora_B.weight"] = torch.ones(module.shape[0], 1, *(1 for _ in module.shape[2:]))
    save_file(tensors, tmp_path / "a.safetensors")
    assert run("convert", tmp_path / "a.safetensors", "--to", "kohya", "--out", tmp_path / "b") == 0
    assert len(load_file(tmp_path / "b")) == len(tensors) * 3 // 2
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.alpha" in load_file(tmp_path / "b")


def test_learned_tokens_are_asked_for_and_written_apart(tiny_sd1_folder: Path, tmp_path: Path, capsys: Any) -> None:
    header = {"unet": json.dumps(["GEGLU"]), "unet:0:rank": "4", "<s1>": "<embed>"}
    modules = [m for m in known_tree("sd1") if m.name.endswith("ff.net.0.proj")]
    q = {f"unet:{i}:down": torch.ones(4, m.shape[1]) for i, m in enumerate(sorted(modules, key=_old_order))}
    q |= {f"unet:{i}:up": torch.ones(m.shape[0], 4) for i, m in enumerate(sorted(modules, key=_old_order))}
    save_file(q | {"<s1>": torch.ones(768)}, tmp_path / "a", header)
    assert run("convert", tmp_path / "a", "--to", "diffusers", "--out", tmp_path / "b") == 2
    assert "learned tokens (<s1>), which diffusers's layout does not hold" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert run("convert", tmp_path / "a", "--to", "kohya", "--out", tmp_path / "with") == 0
    assert torch.equal(load_file(tmp_path / "with")["bundle_emb.<s1>.string_to_param.*"], torch.ones(1, 768))
    tokens = tmp_path / "tokens"
    assert run("convert", tmp_path / "a", "--to", "kohya", "--out", tmp_path / "b", "--tokens", tokens) == 0
    assert torch.equal(load_file(tokens / "s1.safetensors")["<s1>"], torch.ones(768))
    assert set(metadata_of(tmp_path / "b")) == {"sshs_model_hash", "sshs_legacy_hash"}


def _old_order(module: Any) -> int:
    return ["down_blocks", "up_blocks", "mid_block"].index(module.name.split(".")[1])


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--rank", "4"], "--rank and --keep say how to --densify"),
        (["--densify", "--rank", "4", "--keep", "0.5"], "exclude each other"),
        (["--densify", "--keep", "1.5"], "--keep: got 1.5; allowed: a share"),
        (["--tokens", "t"], "the file has no learned tokens"),
        (["--base", "no/such/base.safetensors"], "there is no file or folder"),
    ],
)
def test_options_that_make_no_sense_are_told(
    more: list[str], what: str, tiny_sd1_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    write_kohya(tmp_path / "a", random_state(bundle_of(tiny_sd1_folder).components))
    base = [] if "--base" in more else ["--base", tiny_sd1_folder]
    assert run("convert", tmp_path / "a", "--to", "peft", "--out", tmp_path / "b", *base, *more) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_nothing_is_overwritten(tiny_sd1_folder: Path, tmp_path: Path, capsys: Any) -> None:
    write_kohya(tmp_path / "a", random_state(bundle_of(tiny_sd1_folder).components))
    before = (tmp_path / "a").read_bytes()
    assert run("convert", tmp_path / "a", "--to", "kohya", "--out", tmp_path / "a", "--base", tiny_sd1_folder) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "a").read_bytes() == before


def test_what_fits_no_published_base_says_what_to_do(tiny_sd1_folder: Path, tmp_path: Path, capsys: Any) -> None:
    write_kohya(tmp_path / "a", AdapterState(random_state(bundle_of(tiny_sd1_folder).components).updates, {}))
    assert run("convert", tmp_path / "a", "--to", "peft", "--out", tmp_path / "b") == 2
    assert "--base names another base" in capsys.readouterr().err


@pytest.fixture
def lycoris(folder: Path, tmp_path: Path) -> Path:
    write_kohya(tmp_path / "lycoris.safetensors", lycoris_state(bundle_of(folder).components))
    return tmp_path / "lycoris.safetensors"


def test_kohya_holds_every_method_of_lycoris(lycoris: Path, folder: Path, tmp_path: Path) -> None:
    assert run("convert", lycoris, "--to", "kohya", "--out", tmp_path / "b", "--base", folder) == 0
    assert (tmp_path / "b").read_bytes() == lycoris.read_bytes()


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_what_the_layout_cannot_hold_is_told(to: str, lycoris: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("convert", lycoris, "--to", to, "--out", tmp_path / "b", "--base", folder) == 2
    told = capsys.readouterr().err
    assert f"{to}'s layout cannot hold 10 of the updates; nothing was written" in told
    for reason in ("method is loha", "method is boft", "Tucker", "it is DoRA and others of the network are not"):
        assert reason in told
    assert "pass --densify" in told
    assert not (tmp_path / "b").exists()


def matrices_alone(lycoris: Path, base: Path, out: Path) -> AdapterState:
    """Without what no low-rank form holds: the norm, and the bias."""
    state = read_adapter(lycoris, bundle_of(base).components)
    kept = {name: one for name, one in state.updates.items() if one.parts().keys().isdisjoint({"w_norm", "diff_b"})}
    write_kohya(out, state._replace(updates=kept))
    return state._replace(updates=kept)


def test_norms_and_biases_are_not_densified_away(lycoris: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    wanted = ["convert", lycoris, "--to", "peft", "--out", tmp_path / "b", "--base", folder, "--densify"]
    assert run(*wanted) == 2
    assert "changes more than a matrix (a norm, or a bias)" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("how", [["--keep", "1"], ["--rank", "3"], ["--keep", "0.9"]])
def test_densified_is_as_near_as_it_says(
    how: list[str], lycoris: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    state = matrices_alone(lycoris, folder, tmp_path / "a")
    more = ["--base", folder, "--densify", *how, "--dtype", "fp32"]
    assert run("convert", tmp_path / "a", "--to", "diffusers", "--out", tmp_path / "b", *more) == 0
    printed = capsys.readouterr().out
    components = bundle_of(folder).components
    got = read_adapter(tmp_path / "b", components).updates
    errors, norms = [], []
    for name, update in state.updates.items():
        component, _, inner = name.partition(".")
        weight = components[component].get_parameter(f"{inner}.weight").detach().double()
        dense = update.weight_delta(1.0, weight, torch.float64)
        assert dense is not None
        low = got[name].weight_delta(1.0, None, torch.float64)
        assert low is not None
        if name not in refusals(state, "diffusers"):
            assert torch.equal(low, dense)  # what the layout holds is not touched, but for the cast
            continue
        errors.append(float((dense - low).norm()))
        norms.append(float(dense.norm()))
        # Eckart and Young: no form of that rank is nearer. fp32 factors are off by their rounding alone.
        values = torch.linalg.svdvals(dense.flatten(1))
        rounding = 4 * torch.finfo(torch.float32).eps * norms[-1]
        assert errors[-1] <= float(values[got[name].rank :].norm()) + rounding
        if how[0] == "--rank":
            assert got[name].rank == 3
        else:
            assert 1 - (errors[-1] / norms[-1]) ** 2 >= float(how[1]) - 1e-9
    total = math.hypot(*errors) / math.hypot(*norms)
    told = float(printed.split("is ")[1].split(" in all")[0])
    assert told == pytest.approx(total, rel=0.01)  # printed with three digits
    header = metadata_of(tmp_path / "b")
    assert header["ss_network_module"] == "networks.lora"
    assert "ss_network_args" not in header


def test_what_depends_on_the_weight_needs_the_base(tmp_path: Path, capsys: Any) -> None:
    module = next(one for one in known_tree("sd1") if one.name.endswith("attn1.to_q"))
    parts = {"weight": torch.ones(module.shape[1]), "on_input": torch.tensor(True)}
    write_kohya(tmp_path / "a", AdapterState({module.name: build_update(parts, None, module.shape)}, {}))
    assert run("convert", tmp_path / "a", "--to", "peft", "--out", tmp_path / "b", "--densify") == 2
    assert "depends on the base's weight; name the base (--base)" in capsys.readouterr().err
