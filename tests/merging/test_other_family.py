"""A LoRA of one family on another: refused wherever a base meets a file, both named, and shapes that differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_samples import bundle_of, random_state
from PIL import Image
from real_configs import PUBLISHED

from lora_kit.adapters import AdapterState, LoraUpdate, read_raw, write_kohya
from lora_kit.adapters.state import adaptable_modules
from lora_kit.cli.main import main
from lora_kit.errors import AdapterFileError
from lora_kit.merging.other_family import fitted_to
from lora_kit.models.known_trees import known_tree
from lora_kit.models.tree_family import family_of_tree


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.fixture(params=["sd1", "sd2"])
def pair(request: pytest.FixtureRequest, small_real_base: Callable[[str], Path], tmp_path: Path):
    """(the adapter's family, the adapter, a base of the other family, its name)."""
    theirs, other = request.param, {"sd1": "sd2", "sd2": "sd1"}[request.param]
    folders = {"sd1": small_real_base("sd1"), "sd2": small_real_base("sd2-v")}
    state = random_state(bundle_of(folders[theirs]).components)._replace(metadata={"lora_kit.family": theirs})
    write_kohya(tmp_path / "a.safetensors", state)
    return theirs, tmp_path / "a.safetensors", folders[other], other


def commands(base: Path, adapter: Path, out: Path) -> dict[str, list[object]]:
    out.mkdir()
    Image.new("RGB", (16, 16)).save(out / "a.png")
    (out / "a.txt").write_text("a picture")
    recipe = {
        "model": {"base": str(base), "adapter": str(adapter)},
        "targets": {"preset": "attention"},
        "data": {"sources": [{"path": str(out)}], "resolution": 16, "workers": 0},
        "output_dir": str(out / "run"),
    }
    (out / "recipe.yaml").write_text(json.dumps(recipe))
    return {
        "generate": ["generate", base, "--adapter", adapter, "--prompt", "x", "--out", out / "pictures"],
        "grid": ["grid", base, "--adapter", adapter, "--prompt", "x", "--out", out / "grid.png"],
        "merge": ["merge", base, "--adapter", adapter, "--out", out / "merged"],
        "merge --dry-run": ["merge", base, "--adapter", adapter, "--dry-run"],
        "plan": ["plan", out / "recipe.yaml"],
        "convert": ["convert", adapter, "--to", "diffusers", "--out", out / "b.safetensors", "--base", base],
    }


def test_every_command_names_both_families_and_the_first_shapes(pair, tmp_path: Path, capsys) -> None:
    theirs, adapter, base, own = pair
    for name, command in commands(base, adapter, tmp_path / "out").items():
        assert run(*command) == 2, name
        said = capsys.readouterr().err
        assert f"a.safetensors was trained on {theirs}, and " in said, name
        assert f" is {own}: give the base it belongs to." in said, name
        assert "do not fit the module's weight [" in said, name
        assert "Traceback" not in said
        assert len(said.splitlines()) <= 8, said  # the first shapes, not all of them
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"a.png", "a.txt", "recipe.yaml"}


def test_training_is_refused_too(pair, make_picture_folder, tmp_path: Path) -> None:
    theirs, adapter, base, own = pair
    from lora_kit.recipe import load_recipe
    from lora_kit.training import train

    commands(base, adapter, tmp_path / "out")
    with pytest.raises(AdapterFileError, match=f"trained on {theirs}, and the recipe's base is {own}"):
        train(load_recipe(tmp_path / "out" / "recipe.yaml"))
    assert not (tmp_path / "out" / "run" / "adapter.safetensors").exists()


def test_inspect_tells_it_as_a_finding(pair, capsys) -> None:
    theirs, adapter, base, own = pair
    assert run("inspect", adapter, "--base", base, "--json") == 0
    misfit = json.loads(capsys.readouterr().out)["misfit"]
    assert f"was trained on {theirs}, and {base} is {own}" in misfit


def of_real_size(family: str, path: Path, header: dict[str, str]) -> Path:
    """Rank 1 on the attention of the first level and the text encoder's first layer."""
    updates = {
        module.name: LoraUpdate(torch.zeros(1, *module.shape[1:]), torch.zeros(module.shape[0], 1), 1.0)
        for module in known_tree(family)
        if ".attn2.to_" in module.name and "down_blocks.0" in module.name
    }
    write_kohya(path, AdapterState(updates, header))
    return path


@pytest.mark.parametrize(("theirs", "own"), [("sd1", "sd2"), ("sd2", "sd1")])
def test_a_file_whose_header_is_silent_is_known_by_its_shapes(theirs: str, own: str, tmp_path: Path) -> None:
    """768 and 1024: the widths of the text states that the published bases attend to."""
    file = of_real_size(theirs, tmp_path / "a.safetensors", {})
    modules = {module.name: module for module in known_tree(own)}
    width = {
        name: PUBLISHED[f"{name}-base" if name == "sd2" else name].unet["cross_attention_dim"] for name in (theirs, own)
    }
    with pytest.raises(AdapterFileError) as caught:
        fitted_to(file, read_raw(file), modules, "the base")
    head, _, first, *_ = str(caught.value).splitlines()
    assert head.startswith(
        f"{file} was trained on {theirs} (by its shapes: its header does not say), and the base is {own}"
    )
    assert f"down [1, {width[theirs]}]" in first
    assert f"[320, {width[own]}]" in first


def test_a_misfit_within_a_family_is_told_whole(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    state = random_state(bundle_of(tiny_sd1_folder).components)
    name, update = next(iter(state.updates.items()))
    wrong = {**state.updates, name: LoraUpdate(torch.zeros(1, 7, 3, 3), update.up[:, :1], 1.0)}
    write_kohya(tmp_path / "a.safetensors", AdapterState(wrong, {"lora_kit.family": "sd1"}))
    modules = adaptable_modules(bundle_of(tiny_sd1_folder).components)
    with pytest.raises(AdapterFileError, match=r"^[^\n]*does not fit the model \(1 problems\)"):
        fitted_to(tmp_path / "a.safetensors", read_raw(tmp_path / "a.safetensors"), modules, "the base")


def test_a_foreign_file_that_fits_is_taken(tmp_path: Path) -> None:
    """A LoRA on self-attention alone has the same shapes in both: told, not refused (as a 4-channel one on 9)."""
    modules = {module.name: module for module in known_tree("sd1")}
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    update = LoraUpdate(torch.zeros(1, 320), torch.zeros(320, 1), 1.0)
    write_kohya(tmp_path / "a.safetensors", AdapterState({name: update}, {"lora_kit.family": "sd2"}))
    assert fitted_to(tmp_path / "a.safetensors", read_raw(tmp_path / "a.safetensors"), modules, "b").updates.keys() == {
        name
    }


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_family_of_a_tree(family: str) -> None:
    assert family_of_tree({module.name: module for module in known_tree(family)}) == family
    assert family_of_tree({}) is None
