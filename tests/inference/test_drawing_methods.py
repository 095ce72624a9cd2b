"""generate and grid with per-block strengths, with other methods than LoRA, and with learned tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_samples import adapter_file, bundle_of
from PIL import Image
from safetensors.torch import save_file

from lora_kit.adapters import AdapterState, LoraUpdate, read_adapter, write_kohya
from lora_kit.cli.main import main
from lora_kit.errors import RecipeError
from lora_kit.inference import SamplingSettings, generate, prepare

SMALL = SamplingSettings(steps=2, guidance=1.0, width=16, height=16)
RUN = ["--steps", "2", "--guidance", "1", "--size", "16x16", "--dtype", "fp32"]


def drawn(base: Path, files: list[Path], scales: list[float], rules: tuple[str, ...] = ()) -> bytes:
    prepared = prepare(str(base), files, torch.float32, rules)
    return generate(prepared, ["red apple"], [0], scales, SMALL)[0].image.tobytes()


def scaled_file(path: Path, source: Path, base: Path, share: dict[str, float]) -> Path:
    """`source` with every alpha multiplied by the share of what its module's name starts with."""
    updates: dict[str, LoraUpdate] = {}
    for name, update in read_adapter(source, bundle_of(base).components).updates.items():
        assert isinstance(update, LoraUpdate)
        (number,) = [one for start, one in share.items() if name.startswith(start)] or [1.0]
        updates[name] = LoraUpdate(update.down, update.up, update.alpha * number)
    write_kohya(path, AdapterState(dict(updates), {}))
    return path


def test_rules_multiply_every_files_strength(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    components = bundle_of(tiny_sd1_folder).components
    files = [adapter_file(tmp_path / f"{seed}.safetensors", components, seed) for seed in (0, 1)]
    share = {"unet.up_blocks": 0.25, "unet.mid_block": 0.0, "text_encoder": 0.5}
    rules = tuple(f"{start}.**={number}" for start, number in share.items())
    scaled = [scaled_file(tmp_path / f"s{path.name}", path, tiny_sd1_folder, share) for path in files]
    # Powers of two: the strengths are the same numbers either way, so the pictures are the same.
    assert drawn(tiny_sd1_folder, files, [0.5, 1.0], rules) == drawn(tiny_sd1_folder, scaled, [0.5, 1.0])
    assert drawn(tiny_sd1_folder, files, [0.5, 1.0], rules) != drawn(tiny_sd1_folder, files, [0.5, 1.0])
    assert drawn(tiny_sd1_folder, files, [0, 0], rules) == drawn(tiny_sd1_folder, [], [])


def test_a_rule_must_match_a_module_of_one_file(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    components = bundle_of(tiny_sd1_folder).components
    whole = adapter_file(tmp_path / "whole.safetensors", components)
    updates = read_adapter(whole, components).updates
    text = {name: update for name, update in updates.items() if name.startswith("text_encoder")}
    write_kohya(tmp_path / "text.safetensors", AdapterState(text, {}))
    drawn(tiny_sd1_folder, [tmp_path / "text.safetensors", whole], [1, 1], ("unet.mid_block.**=0",))
    with pytest.raises(RecipeError, match="matches no adapted module"):
        prepare(str(tiny_sd1_folder), [tmp_path / "text.safetensors"], None, ("unet.mid_block.**=0",))


def test_the_commands_take_rules_and_say_so_in_the_picture(
    tiny_sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = adapter_file(tmp_path / "a.safetensors", bundle_of(tiny_sd1_folder).components)
    rules = ["unet.**=0.5", "unet.up_blocks.**=0.25"]
    common = [str(tiny_sd1_folder), "--adapter", str(file), "--prompt", "red apple", *RUN]
    common += [part for rule in rules for part in ("--scale", rule)]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["generate", *common, "--out", str(tmp_path / "pictures")])
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["grid", *common, "--scales", "0,1", "--out", str(tmp_path / "grid.png")])
    (path,) = (tmp_path / "pictures").iterdir()
    for written in (path, tmp_path / "grid.png"):
        with Image.open(written) as picture:
            assert json.loads(picture.info["scale_rules"]) == rules
    with Image.open(path) as picture:
        assert picture.tobytes() == drawn(tiny_sd1_folder, [file], [1.0], tuple(rules))
    capsys.readouterr()
    for wrong in (["--scale", "unet.nowhere=1"], ["--block-weights", "1,0"]):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["generate", *common, *wrong, "--out", str(tmp_path / "no")])
        said = capsys.readouterr().err
        assert "matches no adapted module" in said or "block weights" in said
    assert not (tmp_path / "no").exists()


def test_lycoris_files_are_drawn(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    """A LoHa on one layer, a new norm on another."""
    generator = torch.Generator().manual_seed(0)
    q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{q}.{name}": torch.randn(shape, generator=generator)
        for name, shape in (
            ("hada_w1_a", (64, 2)),
            ("hada_w1_b", (2, 64)),
            ("hada_w2_a", (64, 2)),
            ("hada_w2_b", (2, 64)),
        )
    }
    tensors["lora_unet_conv_norm_out.w_norm"] = torch.randn(32, generator=generator)
    tensors["lora_unet_conv_norm_out.b_norm"] = torch.randn(32, generator=generator)
    save_file(tensors, tmp_path / "a.safetensors")
    file = [tmp_path / "a.safetensors"]
    pictures = {scale: drawn(tiny_sd1_folder, file, [scale]) for scale in (0.0, 0.5, 1.0)}
    assert pictures[0.0] == drawn(tiny_sd1_folder, [], [])
    assert len(set(pictures.values())) == 3
    assert drawn(tiny_sd1_folder, file, [1.0], ("unet.**=0.5",)) == pictures[0.5]
