"""A merged base says what its adapter was trained to predict, and says its own again when the adapter is out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_samples import bundle_of, random_state
from merge_samples import networks_of, random_checkpoint
from safetensors.torch import save_file

from lora_kit.adapters import write_kohya
from lora_kit.errors import ModelError
from lora_kit.inference import SamplingSettings, draw, prepare
from lora_kit.merging import MergeOptions, merge
from lora_kit.models.schedules import ZERO_TERMINAL_SNR

CONFIG = Path("scheduler") / "scheduler_config.json"
V = {"lora_kit.scheduler": '{"prediction_type": "v_prediction"}'}
ZERO_V = {"lora_kit.scheduler": json.dumps({"prediction_type": "v_prediction", **ZERO_TERMINAL_SNR})}
SMALL = SamplingSettings(steps=4, guidance=1.0, width=16, height=16)


def adapter(base: Path, path: Path, header: dict[str, str], seed: int = 0) -> Path:
    write_kohya(path, random_state(bundle_of(base).components, seed)._replace(metadata=header))
    return path


def read(folder: Path) -> dict[str, object]:
    return json.loads((folder / CONFIG).read_text())


@pytest.fixture
def base(tiny_sd2_folder: Path, tmp_path: Path) -> Path:
    """An SD2 whose config does not name what it predicts, as SD1's do not: the noise."""
    shutil.copytree(tiny_sd2_folder, tmp_path / "base")
    config = read(tmp_path / "base")
    del config["prediction_type"]
    (tmp_path / "base" / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return tmp_path / "base"


def test_the_merged_folder_is_drawn_as_generate_draws_the_adapter(base: Path, tmp_path: Path) -> None:
    file = adapter(base, tmp_path / "v.safetensors", ZERO_V)
    report = merge(base, [(file, 1.0)], tmp_path / "out")
    (note,) = report.notes
    assert note.startswith("v.safetensors was trained to predict v_prediction and with zero terminal SNR, and the base")
    changed = {key: value for key, value in read(tmp_path / "out").items() if read(base).get(key) != value}
    assert changed == {"prediction_type": "v_prediction", **ZERO_TERMINAL_SNR}
    merged, live = bundle_of(tmp_path / "out"), prepare(str(base), [file])
    assert merged.prediction_type == live.bundle.prediction_type == "v_prediction"
    pictures = [np.asarray(draw(one, ["red apple"], [0], settings=SMALL)[0], int) for one in (merged, live.bundle)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # one sum in fp32 or two, then 8 bits
    plain = np.asarray(draw(bundle_of(base), ["red apple"], [0], settings=SMALL)[0], int)
    assert np.abs(pictures[0] - plain).max() > 1


def test_diffusers_samples_the_merged_folder_as_v(base: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    merge(base, [(adapter(base, tmp_path / "v.safetensors", V), 1.0)], tmp_path / "out")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert theirs.scheduler.config.prediction_type == "v_prediction"


def test_an_unmerge_puts_the_bases_very_words_back(base: Path, tmp_path: Path) -> None:
    files = [adapter(base, tmp_path / f"{seed}.safetensors", ZERO_V, seed) for seed in (0, 1)]
    merge(base, [(file, 1.0) for file in files], tmp_path / "both")
    out = MergeOptions(unmerge=True)
    merge(tmp_path / "both", [(files[0], 1.0)], tmp_path / "one", out)
    assert read(tmp_path / "one") == read(tmp_path / "both")  # the other one still needs it
    report = merge(tmp_path / "one", [(files[1], 1.0)], tmp_path / "none", out)
    assert (tmp_path / "none" / CONFIG).read_bytes() == (base / CONFIG).read_bytes()
    assert "the scheduler_config.json says again what it did before the merge" in report.notes
    merge(tmp_path / "none", [(files[0], 1.0)], tmp_path / "again")
    assert read(tmp_path / "again") == read(tmp_path / "both")


def test_a_later_merge_keeps_what_the_base_said_at_first(base: Path, tmp_path: Path) -> None:
    files = [adapter(base, tmp_path / f"{i}.safetensors", header, i) for i, header in enumerate((V, ZERO_V))]
    merge(base, [(files[0], 1.0)], tmp_path / "one")
    merge(tmp_path / "one", [(files[1], 1.0)], tmp_path / "two")
    assert read(tmp_path / "two")["rescale_betas_zero_snr"] is True
    merge(tmp_path / "two", [(file, 1.0) for file in files], tmp_path / "none", MergeOptions(unmerge=True))
    assert (tmp_path / "none" / CONFIG).read_bytes() == (base / CONFIG).read_bytes()


def test_the_first_of_several_decides_and_another_tools_word_does_not(base: Path, tmp_path: Path) -> None:
    headers = [{"ss_base_model_version": "sd_v2_v"}, V, {"lora_kit.scheduler": '{"prediction_type": "sample"}'}]
    files = [adapter(base, tmp_path / f"{i}.safetensors", header, i) for i, header in enumerate(headers)]
    report = merge(base, [(file, 1.0) for file in files], tmp_path / "out")
    assert read(tmp_path / "out")["prediction_type"] == "v_prediction"
    assert [note.partition(" was")[0] for note in report.notes] == [f"{index}.safetensors" for index in range(3)]
    assert "is sampled as the base: that may be wrong for it" in report.notes[0]
    assert "is sampled as 1.safetensors: that may be wrong for it" in report.notes[2]


def test_what_agrees_is_copied_byte_for_byte(tiny_sd2_folder: Path, tmp_path: Path) -> None:
    file = adapter(tiny_sd2_folder, tmp_path / "v.safetensors", V)
    assert merge(tiny_sd2_folder, [(file, 1.0)], tmp_path / "out").notes == ()
    assert (tmp_path / "out" / CONFIG).read_bytes() == (tiny_sd2_folder / CONFIG).read_bytes()


def test_a_damaged_scheduler_config_is_named(base: Path, tmp_path: Path) -> None:
    file = adapter(base, tmp_path / "v.safetensors", V)
    (base / CONFIG).write_text("{")
    with pytest.raises(ModelError, match=r"scheduler_config\.json is not JSON"):
        merge(base, [(file, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("told", [{}, {"modelspec.prediction_type": "epsilon"}])
def test_a_single_file_has_no_schedule_so_it_is_told(told: dict[str, str], tmp_path: Path) -> None:
    save_file(random_checkpoint(2), tmp_path / "base.safetensors", told)
    write_kohya(
        tmp_path / "v.safetensors", random_state(networks_of(tmp_path / "base.safetensors"))._replace(metadata=V)
    )
    out = tmp_path / "out.safetensors"
    (note,) = merge(tmp_path / "base.safetensors", [(tmp_path / "v.safetensors", 1.0)], out).notes
    assert "which the merged base does not say: use it with model.prediction_type: v_prediction" in note


def test_zero_terminal_snr_of_the_noise_is_told_and_not_written(base: Path, tmp_path: Path) -> None:
    file = adapter(base, tmp_path / "a.safetensors", {"ss_zero_terminal_snr": "True"})
    (note,) = merge(base, [(file, 1.0)], tmp_path / "out").notes
    assert "rescale_betas_zero_snr=True and timestep_spacing='trailing'" in note
    assert (tmp_path / "out" / CONFIG).read_bytes() == (base / CONFIG).read_bytes()
    assert torch.isfinite(
        torch.tensor(np.asarray(draw(bundle_of(tmp_path / "out"), ["x"], [0], settings=SMALL)[0]))
    ).all()
