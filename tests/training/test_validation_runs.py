"""Validation in whole runs: what it measures, decides and draws, and that a resume comes to the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process
from PIL import Image
from safetensors import safe_open

from lora_kit.errors import RecipeError
from lora_kit.training import train
from lora_kit.training.build import build_run
from lora_kit.training.processes.launch import build_accelerator
from lora_kit.training.validation.drawing import _read_tiles, spread
from lora_kit.training.validation.measuring import differences, gap_figures, held_out_figures, measure, measure_base

SPLIT = ("validation.held_out={count: 3}", "validation.every=1", "validation.drift_prompts=[a dog, a tree]")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def validations(folder: Path) -> list[dict]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if "held_out_loss" in line]


def test_bands_and_gap_are_what_they_say() -> None:
    base, losses = [[4.0, 3.0, 2.0, 1.0], [2.0, 2.0, 2.0, 2.0]], [[3.0, 3.0, 2.0, 1.0], [1.0, 2.0, 2.0, 0.0]]
    found = held_out_figures(losses, base, ["t0-499", "t500-999"])
    assert found["held_out_difference"] == pytest.approx((-0.25 - 0.75) / 2)
    assert found["held_out_difference_t0-499"] == pytest.approx(-0.5)
    assert found["held_out_difference_t500-999"] == pytest.approx((0 - 1) / 2)
    train_base, train_losses = [[9.0], [5.0], [7.0]], [[7.0], [3.0], [5.0]]
    gap = gap_figures((losses, base), (train_losses, train_base))
    assert gap["train_subset_difference"] == -2.0
    assert gap["gap"] == pytest.approx(-0.5 - -2.0)


def test_every_validation_tells_bands_gap_and_drift(make_recipe, tmp_path):
    outcome = train(make_recipe(*SPLIT, "validation.held_out_timesteps=8"))
    lines, last = validations(tmp_path / "run"), result(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    first, end = lines[0], lines[-1]
    assert first["held_out_difference"] == first["gap"] == first["drift"] == 0.0
    bands = [end[f"held_out_difference_t{low}-{low + 249}"] for low in (0, 250, 500, 750)]
    assert end["held_out_difference"] == pytest.approx(sum(bands) / 4)  # equally many timesteps in each
    assert end["held_out_difference_low"] < end["held_out_difference"] < end["held_out_difference_high"]
    assert end["gap"] == pytest.approx(end["held_out_difference"] - end["train_subset_difference"])
    assert end["drift"] > 0
    assert {name: last[name] for name in end if name != "step"} == {k: v for k, v in end.items() if k != "step"}
    told = "\n".join(outcome.lines())
    assert "t750-999: " in told and "gap to the held-out ones" in told and "drift on unrelated prompts" in told
    assert "best step: " in told


def test_measuring_again_gives_the_same_bits_and_the_base_is_the_base(make_recipe):
    recipe = make_recipe(*SPLIT)
    run = build_run(recipe, build_accelerator(recipe))
    base = measure_base(run)
    with torch.no_grad():
        for parameter in run.trainable.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    first, second = measure(run, base), measure(run, base)
    assert first == second
    assert any(differences(first.held_out, base.held_out))
    assert measure_base(run)[:2] == base[:2]  # whatever the adapter is by now
    # Independent of how drift is reckoned in the run: all predictions at once, in float64 afterwards.
    assert base.drift is not None
    noised, captions = base.drift.noised, [p for p in base.drift.prompts for _ in range(4)]
    run.bundle.unet.eval()
    with torch.no_grad():
        states = run.bundle.family.condition(run.bundle, captions, "cut")
        now = run.bundle.unet(noised.noisy, noised.timesteps, states).sample.double()
    before = base.drift.predictions.double()
    moved = (now - before).square().mean() / (before - noised.noise.double()).square().mean()
    # The numerator's relative error is twice that of the fp32 predictions' difference: about √n 2^-24 of predictions
    # that are some ten times larger than it.
    assert first.figures["drift"] == pytest.approx(float(moved), rel=1e-3)


def test_held_out_pictures_are_not_trained_on(make_recipe, picture_folder):
    recipe = make_recipe(*SPLIT)
    run = build_run(recipe, build_accelerator(recipe))
    assert run.held_out is not None and run.train_subset is not None
    trained = {record.id for record in run.data.records}
    held = {record.id for record in run.held_out.pictures.records}
    assert (len(held), len(run.train_subset.records)) == (3, 3)
    assert not trained & held
    assert len(trained | held) == len(list(picture_folder.glob("*.png")))


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
def test_a_split_works_with_every_cache_and_buckets(make_recipe, tmp_path, cache):
    place = f"data.cache_dir={tmp_path / 'cache'}"
    own = (place,) if cache == "disk" else ()
    train(make_recipe(*SPLIT, "data.buckets={step: 8}", f"data.cache={cache}", *own, "train.max_steps=1", name=cache))
    found = result(tmp_path / cache)
    train(make_recipe(*SPLIT, "data.buckets={step: 8}", "train.max_steps=1", name="again"))
    # Latents of the VAE are the same to fp32 rounding however they are batched.
    assert found["held_out_base_loss"] == pytest.approx(result(tmp_path / "again")["held_out_base_loss"], rel=1e-5)


def spoil_after(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    """Held-out losses that fall until step `best` and then rise, by more than their spread."""
    from lora_kit.training.validation.measuring import Measured
    from lora_kit.training.validation.measuring import measure as sound

    steps = iter(range(100))

    def false(run, base, is_base=False):
        found, step = sound(run, base, is_base), next(steps)
        losses = [[abs(step - best) + 0.01 * picture] for picture in range(3)]
        return Measured(found.figures | {"held_out_loss": float(abs(step - best))}, losses)

    monkeypatch.setattr("lora_kit.training.validation.rounds.measure", false)


def test_early_stop_ends_in_the_normal_way_and_a_resume_does_not_go_past_it(make_recipe, tmp_path, monkeypatch):
    spoil_after(monkeypatch, 0)
    stop = (*SPLIT, "validation.early_stop={patience: 2}", "train.max_steps=9", "save.every=0")
    outcome = train(make_recipe(*stop))
    run = tmp_path / "run"
    assert "stopped early after step 2: 2 validations in a row" in result(run)["stopped"]
    assert result(run)["stopped"] in outcome.lines()
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000002"]
    before = digest(run / "adapter.safetensors")
    (run / "adapter.safetensors").unlink()
    again = train(make_recipe(*stop, "train.resume=latest"))
    assert digest(run / "adapter.safetensors") == before
    assert any("stopped early after step 2" in line for line in again.lines())
    # With more patience it goes on.
    train(make_recipe(*stop, "validation.early_stop.patience=3", "train.resume=latest"))
    assert result(run)["last_step"] == 3


def test_the_history_of_a_resumed_run_is_that_of_one_never_stopped(make_recipe, tmp_path):
    keep = (*SPLIT, "save.keep=9")
    train(make_recipe(*keep))
    run = tmp_path / "run"
    whole, figures = validations(run), result(run)
    train(make_recipe(*keep, f"train.resume={run / 'checkpoints' / 'step-000002'}"))
    assert validations(run) == whole
    assert result(run) == figures


def test_a_finished_run_resumed_measures_nothing_again(make_recipe, tmp_path, monkeypatch):
    train(make_recipe(*SPLIT))
    whole, figures = validations(tmp_path / "run"), result(tmp_path / "run")
    monkeypatch.setattr("lora_kit.training.run.validate", lambda *_: pytest.fail("measured twice"))
    train(make_recipe(*SPLIT, "train.resume=latest"))
    assert validations(tmp_path / "run") == whole
    assert result(tmp_path / "run") == figures


def test_other_held_out_pictures_after_a_resume_are_measured_anew(make_recipe, tmp_path, capsys):
    train(make_recipe(*SPLIT, "train.max_steps=2"))
    train(make_recipe(*SPLIT, "validation.held_out={count: 2}", "train.resume=latest"))
    assert "the base was measured anew" in capsys.readouterr().err
    line = validations(tmp_path / "run")[-1]
    recipe = make_recipe(*SPLIT, "validation.held_out={count: 2}", name="other")
    run = build_run(recipe, build_accelerator(recipe))
    base = measure_base(run)
    assert line["held_out_base_loss"] == pytest.approx(measure(run, base, True).figures["held_out_loss"])


def test_the_best_weights_come_out_where_asked(make_recipe, tmp_path, monkeypatch):
    keep = ("save.every=1", "save.keep=9", "save.result=both")
    with monkeypatch.context() as patched:
        spoil_after(patched, 2)
        outcome = train(make_recipe(*SPLIT, *keep))
    train(make_recipe(*SPLIT, "train.max_steps=4", name="plain"))
    run, plain = tmp_path / "run", tmp_path / "plain"
    assert outcome.best_paths == (run / "adapter.best.safetensors",)
    found = result(run)
    assert (found["best_step"], found["last_step"], found["last_less_best"]) == (2, 4, pytest.approx(2.0))
    assert found["last_differs_from_best"] is True
    assert any("best step: 2; the last, 4, is +2.0000" in line for line in outcome.lines())
    train(make_recipe(*SPLIT, "train.max_steps=2", name="short"))
    wanted = {"adapter.safetensors": plain, "adapter.best.safetensors": tmp_path / "short"}
    for name, other in wanted.items():
        own, same = safe_open(str(run / name), "pt"), safe_open(str(other / "adapter.safetensors"), "pt")
        assert all(torch.equal(own.get_tensor(key), same.get_tensor(key)) for key in same.keys())  # noqa: SIM118
    # And alone, of the finished run.
    train(make_recipe(*SPLIT, "save.result=best", "train.resume=latest"))
    own, best = (safe_open(str(run / name), "pt") for name in wanted)
    assert all(torch.equal(own.get_tensor(key), best.get_tensor(key)) for key in best.keys())  # noqa: SIM118


def test_a_base_that_is_never_beaten_is_said(make_recipe, tmp_path, capsys, monkeypatch):
    spoil_after(monkeypatch, 0)
    outcome = train(make_recipe(*SPLIT, "save.result=both", "train.max_steps=2"))
    assert "the best step is 0, but that is the base itself" in capsys.readouterr().err.replace("\n", " ")
    assert any("best step: 0, the base itself" in line for line in outcome.lines())
    assert not (tmp_path / "run" / "adapter.best.safetensors").exists()


DRAWN = ("validation.prompts=[red apple, blue cup]", "validation.every=2", "validation.strengths=[0.0, 0.5, 1.0]")


def test_step_sheets_hold_the_pictures_of_each_step_also_after_a_resume(make_recipe, tmp_path):
    train(make_recipe(*DRAWN))
    samples = tmp_path / "run" / "samples"
    sheets = {path.name: digest(path) for path in samples.glob("*.png")}
    assert {"steps-00.png", "steps-01.png", "final_grid.png", "step-000004.png"} <= sheets.keys()
    # The tiles at strength 1 are what the step's own sheet shows: 16-pixel pictures, enlarged eight times.
    drawn = {strength: [Image.new("RGB", (16, 16))] * 2 for strength in (0.0, 0.5, 1.0)}
    tiles = _read_tiles(samples / "tiles" / "step-000002.png", ["red apple", "blue cup"], drawn)
    assert tiles is not None and len(tiles[0.5]) == 2
    with Image.open(samples / "step-000002.png") as sheet:
        shown = tiles[1.0][1].resize((128, 128), Image.Resampling.NEAREST)
        right, below = sheet.width - 132, sheet.height - 132
        assert sheet.convert("RGB").crop((right, below, right + 128, below + 128)).tobytes() == shown.tobytes()
    train(make_recipe(*DRAWN, f"train.resume={tmp_path / 'run' / 'checkpoints' / 'step-000002'}"))
    assert {path.name: digest(path) for path in samples.glob("*.png")} == sheets


def test_a_full_fine_tune_has_a_row_of_its_own_weights(make_recipe, tmp_path):
    rules = 'targets=[{match: "unet.**", method: full}]'
    train(make_recipe(rules, *DRAWN, *SPLIT[::2], "train.max_steps=2"))
    assert (tmp_path / "run" / "samples" / "steps-00.png").exists()
    assert result(tmp_path / "run")["drift"] > 0


def test_a_sheet_has_at_most_twelve_columns_with_both_ends() -> None:
    assert spread([0, 5, 9]) == [0, 5, 9]
    steps = spread(list(range(0, 1001, 10)))
    assert (len(steps), len(set(steps)), steps[0], steps[-1]) == (12, 12, 0, 1000)


class Notebook(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "notebook"
    requires_logging_directory = False
    seen: list = []  # noqa: RUF012

    def __init__(self, run_name: str, **options):
        super().__init__()
        self.seen.append(("begun", run_name, options))

    @property
    def tracker(self):
        return self.seen

    @on_main_process
    def store_init_configuration(self, values):
        self.seen.append(("config", values))

    @on_main_process
    def log(self, values, step=None, **_):
        self.seen.append(("log", step, values))

    @on_main_process
    def log_images(self, values, step=None, **_):
        self.seen.append(("pictures", step, list(values)))

    @on_main_process
    def finish(self):
        self.seen.append(("over",))


def test_a_tracker_gets_the_recipe_the_numbers_and_the_pictures(make_recipe, monkeypatch, tmp_path):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setattr(Notebook, "seen", [])
    options = "train.tracker_options={notebook: {colour: red}}"
    drawn = ("validation.prompts=[red apple]", "validation.step_grid=false")
    train(make_recipe("train.trackers=[notebook]", "train.tracker_project=apples", options, *drawn))
    seen = Notebook.seen
    assert seen[0] == ("begun", "apples", {"colour": "red"})
    config = seen[1][1]
    assert config["optimizer.lr"] == 0.01
    assert not any(str(tmp_path) in str(value) for value in config.values())
    assert [entry[1] for entry in seen if entry[0] == "log" and "loss" in entry[2]] == [1, 2, 3, 4]
    assert [entry[1:] for entry in seen if entry[0] == "pictures"] == [
        (0, ["samples"]),
        (4, ["samples"]),
        (4, ["final_grid"]),
    ]
    assert seen[-1] == ("over",)


def test_trackers_that_cannot_be_are_told_before_anything_is_loaded(make_recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"(?s)got wandbb; allowed: .*Did you mean wandb.*pip install clearml"):
        train(make_recipe("train.trackers=[wandbb, clearml]"))
    assert not (tmp_path / "run").exists()
