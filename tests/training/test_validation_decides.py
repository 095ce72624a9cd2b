"""Held-out splits, intervals, bands, the gap, early stop, the best adapter, trackers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process
from safetensors.torch import load_file

from lora_kit.data.records import Record, Records
from lora_kit.data.split import part_held_out
from lora_kit.errors import DataError, RecipeError
from lora_kit.recipe.validation import EarlyStop
from lora_kit.training import train
from lora_kit.training.build import build_run
from lora_kit.training.held_out import band_count
from lora_kit.training.launch import build_accelerator
from lora_kit.training.measures import Measured, figures, is_over, verdict
from lora_kit.training.statistics import Interval, difference, interval, student_t


def records(names):
    return Records([Record(name, "", 0, 3, lambda: None) for name in names])  # type: ignore[arg-type,return-value]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_pictures_added_later_change_nothing_for_the_others():
    names = [f"set/{index}.png" for index in range(400)]
    kept, held = part_held_out(records(names), 0.1)
    assert {record.id for record in kept} | {record.id for record in held} == set(names)
    assert 20 <= len(held) <= 60  # binomial: 40 ± 6
    assert all(record.repeats == 1 for record in held)
    more_kept, more_held = part_held_out(records([*reversed(names), *(f"new/{i}.png" for i in range(100))]), 0.1)
    assert {r.id for r in held} <= {r.id for r in more_held}
    assert {r.id for r in kept} <= {r.id for r in more_kept}
    with pytest.raises(DataError, match="leaves none held out"):
        part_held_out(records(["a"]), 1e-9)


def test_regularisation_pictures_stay_in_training():
    reg = [Record(f"r{i}", "", 0, 1, lambda: None, is_regularisation=True) for i in range(50)]  # type: ignore[arg-type,return-value]
    kept, held = part_held_out(Records([*records([f"a{i}" for i in range(50)]), *reg]), 0.5)
    assert not any(record.is_regularisation for record in held)
    assert sum(record.is_regularisation for record in kept) == 50


@pytest.mark.parametrize(
    ("freedom", "wanted"),  # tables of Student's t, 97.5 %
    [(1, 12.706), (4, 2.776), (10, 2.228), (11, 2.201), (15, 2.131), (30, 2.042), (120, 1.980), (10**6, 1.960)],
)
def test_students_t_is_that_of_the_tables(freedom, wanted):
    assert student_t(freedom) == pytest.approx(wanted, abs=6e-4)


def test_an_interval_holds_the_true_mean_in_95_of_100_cases():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 6, generator=generator, dtype=torch.float64) + 0.3
    held = [abs(found.mean - 0.3) <= found.half_width for found in map(interval, samples.tolist())]
    share = sum(held) / len(held)
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)
    assert math.isnan(interval([1.0]).half_width)
    far = difference(interval([1.0, 2.0, 3.0]), interval([0.0, 0.0, 0.3]), (3, 3))
    assert far.mean == pytest.approx(1.9)
    assert far.standard_error == pytest.approx(math.sqrt(1 / 3 + 0.03 / 3))


def test_figures_are_paired_by_picture_and_parted_by_band():
    base = [[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0]]
    now = [[0.5, 2.0, 3.0, 4.0], [1.0, 2.0, 2.0, 2.0]]
    found = figures(Measured(now, [[0.0] * 4]), Measured(base, [[1.0] * 4]))
    assert found["held_out_loss"] == pytest.approx((2.375 + 1.75) / 2)
    assert found["held_out_difference"] == pytest.approx((-0.125 - 0.25) / 2)
    assert found["held_out_difference_band_1"] == pytest.approx(-0.75)
    assert [found[f"held_out_difference_band_{band}"] for band in (2, 3, 4)] == [0.0, 0.0, 0.0]
    assert found["trained_difference"] == -1.0
    assert found["gap"] == pytest.approx(-0.1875 + 1.0)
    assert [band_count(n) for n in (1, 2, 3, 4, 5, 6, 8)] == [1, 2, 3, 4, 1, 3, 4]


def test_patience_counts_validations_without_a_lower_loss():
    history = [{"step": i, "held_out_loss": loss} for i, loss in enumerate([1.0, 0.9, 0.95, 0.91, 0.89])]
    rule = EarlyStop(patience=2)
    assert [is_over(history[:n], rule) for n in range(6)] == [False, False, False, False, True, False]
    assert is_over(history, EarlyStop(patience=3, min_difference=0.05))
    assert not is_over(history, None)


def test_a_verdict_says_best_only_beyond_the_interval():
    assert "the best is better" in verdict(40, 20, Interval(0.01, 0.002, 0.004))
    assert "cannot be told apart" in verdict(40, 20, Interval(0.003, 0.002, 0.004))
    assert verdict(40, 40, Interval(0.0, 0.0, 0.0)) == "best held-out loss: the last step, 40."


SPLIT = ("validation.held_out_fraction=0.4", "validation.every=1", "data.batch_size=2")


def test_no_picture_is_trained_on_and_held_out(make_recipe):
    recipe = make_recipe(*SPLIT)
    run = build_run(recipe, build_accelerator(recipe))
    assert run.held_out is not None
    trained = {record.id for record in run.data.records}
    held = {record.id for record in run.held_out.pictures.records}
    assert trained and held and not trained & held


def overfitting(make_recipe, name, *more):
    """A rate at which every step makes the held-out loss worse than the first did."""
    rule = "validation.early_stop={patience: 2}"
    options = ("optimizer.lr=3.0", "train.max_steps=40", "save.every=0", rule, *more)
    return make_recipe(*SPLIT, *options, name=name)


def test_a_run_that_gets_no_better_ends_early_says_so_and_resumed_stays_ended(make_recipe, tmp_path, capsys):
    outcome = train(overfitting(make_recipe, "run"))
    assert outcome.figures["step"] < 40
    assert "validations without a lower held-out loss" in capsys.readouterr().err
    folder = tmp_path / "run"
    adapter = (folder / "adapter.safetensors").read_bytes()
    again = train(overfitting(make_recipe, "run", "train.resume=latest"))
    assert again.figures["step"] == outcome.figures["step"]
    assert (folder / "adapter.safetensors").read_bytes() == adapter
    validated = [line for line in lines_of(folder) if "held_out_loss" in line]
    assert {"held_out_interval", "held_out_difference_band_4", "gap", "gap_interval"} <= validated[-1].keys()


def test_the_best_checkpoints_adapter_is_written_and_is_the_one_of_that_step(make_recipe, tmp_path):
    options = ("optimizer.lr=0.02", "schedule.name=constant", "save.every=0")
    steps = [*SPLIT, *options, "train.max_steps=6"]
    outcome = train(make_recipe(*steps, name="run"))
    best = outcome.figures["best_step"]
    folder = tmp_path / "run"
    there = (folder / "adapter.best.safetensors").is_file()
    assert there == (best not in (0, outcome.figures["step"]))
    if there:
        train(make_recipe(*SPLIT, *options, f"train.max_steps={best}", name="short"))
        paths = (tmp_path / "short" / "adapter.safetensors", folder / "adapter.best.safetensors")
        short, kept = (load_file(path) for path in paths)
        assert all(torch.equal(short[key], kept[key]) for key in short)


class Kept(GeneralTracker):
    """A tracker of somebody's own."""

    name = "kept"
    requires_logging_directory = False
    logged: list[tuple[dict, int]] = []  # noqa: RUF012

    def __init__(self, run_name, **options):
        super().__init__()
        self.options = options

    @property
    def tracker(self):
        return self

    @on_main_process
    def store_init_configuration(self, values):
        self.logged.append((values, -1))

    @on_main_process
    def log(self, values, step=None, **_):
        self.logged.append((values, step))


def test_any_tracker_of_accelerates_gets_the_same_figures(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "kept", Kept)
    monkeypatch.setattr("accelerate.tracking._available_trackers", ["kept"])
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda names, *_: names)
    Kept.logged.clear()
    train(make_recipe("train.trackers=[kept]", "train.max_steps=2"))
    assert "recipe" in Kept.logged[0][0]
    steps = {step: values for values, step in Kept.logged[1:]}
    for line in lines_of(tmp_path / "run"):
        if "loss" in line:
            assert steps[line["step"]]["loss"] == line["loss"]


def test_an_unknown_or_missing_tracker_is_told_before_anything_is_loaded(make_recipe):
    with pytest.raises(RecipeError, match=r"train\.trackers: got `wandbb`.*Did you mean wandb"):
        train(make_recipe("train.trackers=[wandbb]"))
    with pytest.raises(RecipeError, match=r"`wandb` is not installed. Run: pip install wandb"):
        train(make_recipe("train.trackers=[wandb]"))
    with pytest.raises(RecipeError, match=r"tracker_options\.wandb"):
        make_recipe("train.tracker_options={wandb: {name: a}}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["validation.early_stop={patience: 2}"], "needs held-out pictures"),
        (["validation.held_out_fraction=0.5", "validation.early_stop={}", "validation.every=0"], "makes none"),
        (["validation.held_out_fraction=1.5"], "must be below 1"),
    ],
)
def test_what_cannot_decide_is_refused(make_recipe, overrides, said):
    with pytest.raises(RecipeError, match=said):
        make_recipe(*overrides)


def test_drift_is_nothing_at_first_and_grows_where_the_network_moves(make_recipe, tmp_path):
    prompts = "validation.drift_prompts=[a dog in a park, a red car]"
    train(make_recipe(prompts, "validation.every=2", "train.max_steps=4", "optimizer.lr=0.05"))
    found = [line["drift"] for line in lines_of(tmp_path / "run") if "drift" in line]
    assert found[0] < 1e-10  # rounding, squared: the base was asked one by one
    assert found[1] > 1e-6
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["drift"] > 1e-6


def test_drift_is_measured_against_the_bases_own_predictions(make_recipe):
    from lora_kit.training.drift import STEPS, drift, traces

    recipe = make_recipe()
    run = build_run(recipe, build_accelerator(recipe))
    known = traces(run.bundle, run.learner.conditions, ["a", "b"], (4, 2, 2), 0)
    assert [trace.latents.shape for trace in known] == [(STEPS, 4, 2, 2)] * 2
    assert known[0].timesteps.tolist() == sorted(known[0].timesteps.tolist(), reverse=True)
    # Alone or together in a batch: rounding, squared.
    assert drift(run.bundle, run.learner.conditions, known) < 1e-10
    doubled = [trace._replace(predictions=trace.predictions / 2) for trace in known]
    assert drift(run.bundle, run.learner.conditions, doubled) == pytest.approx(1.0, rel=1e-4)


def test_drift_of_a_full_fine_tune_is_refused(make_recipe):
    with pytest.raises(RecipeError, match=r"drift_prompts.*base's own weights"):
        make_recipe("targets={match: 'unet.**', method: full}", "validation.drift_prompts=[a]")
