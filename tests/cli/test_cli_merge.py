"""`lora-kit merge` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_samples import adapter_file, bundle_of
from safetensors.torch import load_file

from lora_kit.cli.main import main


@pytest.fixture
def adapter(tiny_sd1_folder: Path, tmp_path: Path) -> Path:
    return adapter_file(tmp_path / "a.safetensors", bundle_of(tiny_sd1_folder).components)


def modules_of(adapter: Path) -> dict[str, int]:
    keys = load_file(adapter)
    names = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    return {name: sum(key.startswith(prefix) and "alpha" in key for key in keys) for name, prefix in names.items()}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["merge", *map(str, arguments)])
    captured = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, captured.out, captured.err


def test_a_merge_prints_how_exact_it_was(capsys, tiny_sd1_folder, tmp_path, adapter):
    code, out, _ = run(capsys, tiny_sd1_folder, "--adapter", f"{adapter}:0.5", "--out", tmp_path / "out")
    assert code == 0
    assert f"unet: {modules_of(adapter)['unet']} modules merged, written in float32" in out
    assert "8 weights recomputed in float64: largest relative error" in out
    assert out.endswith(f"wrote {tmp_path / 'out'}\n")


def test_json_is_one_document_of_the_same(capsys, tiny_sd1_folder, tmp_path, adapter):
    code, out, _ = run(capsys, tiny_sd1_folder, "--adapter", adapter, "--out", tmp_path / "out", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["modules"] == modules_of(adapter)
    assert document["weights"]["worst"] <= 1


def test_a_dry_run_needs_no_out_and_its_scales_are_final(capsys, tiny_sd1_folder, adapter):
    scales = ["--scale", "unet.**=0.5", "--scale", "unet.mid_block.**=2"]
    code, out, _ = run(capsys, tiny_sd1_folder, "--adapter", f"{adapter}:0.5", "--dry-run", "--json", *scales)
    changes = {change["module"]: change for change in json.loads(out)["changes"]}
    assert code == 0
    assert changes["unet.mid_block.resnets.0.conv1"]["updates"][0]["scale"] == 1.0
    assert changes["unet.down_blocks.0.resnets.0.conv1"]["updates"][0]["scale"] == 0.25
    assert changes["text_encoder.encoder.layers.0.mlp.fc1"]["updates"][0]["scale"] == 0.5
    assert changes["unet.mid_block.resnets.0.conv1"]["file"] == "unet/diffusion_pytorch_model.safetensors"


def test_an_unmerge_gives_the_base_back_and_says_how_exactly(capsys, tiny_sd1_folder, tmp_path, adapter):
    assert run(capsys, tiny_sd1_folder, "--adapter", adapter, "--out", tmp_path / "merged")[0] == 0
    arguments = [tmp_path / "merged", "--adapter", adapter, "--out", tmp_path / "back", "--unmerge"]
    code, out, _ = run(capsys, *arguments, "--original", tiny_sd1_folder)
    assert code == 0
    assert "modules unmerged" in out
    assert "from what it was before the merge" in out
    assert "tensors are equal bit for bit; the largest difference is" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out: is missing"),
        (["--out", "x", "--original", "y"], "--original: goes with --unmerge"),
        (["--dry-run", "--scale", "unet.nowhere=1"], "matches no adapted module"),
        (["--dry-run", "--block-weights", "1,2"], "got 2 numbers"),
    ],
)
def test_wrong_arguments_end_with_one_message(capsys, tiny_sd1_folder, adapter, arguments, message):
    code, out, err = run(capsys, tiny_sd1_folder, "--adapter", adapter, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_a_merge_imports_no_networks(tiny_sd1_folder, tmp_path, adapter):
    """Their libraries take longer to import than the merge of a whole Stable Diffusion takes."""
    command = ["merge", str(tiny_sd1_folder), "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    heavy = ("diffusers", "transformers", "peft", "accelerate", "lora_kit.recipe")
    code = (
        "import sys\nfrom lora_kit.cli.main import main\n"
        f"try:\n    main({command!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "out" / "model_index.json").is_file()
