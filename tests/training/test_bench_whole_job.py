"""The benchmark of whole jobs runs, and gives all contenders the same work; its figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from job import jobs

    yield jobs
    for name in ("job", "job.jobs"):
        sys.modules.pop(name, None)


def test_the_plain_loop_gets_the_recipe_that_lora_kit_runs(jobs, tmp_path):
    from lora_kit.recipe import load_recipe

    job = jobs.quickstart(50, quick=True)
    ours, plain, *_ = [one for one in jobs.contenders(job) if one.targets == "all"]
    *_, recipe_file = (part for part in jobs.command(job, ours, tmp_path / "ours") if part.endswith(".yaml"))
    *_, settings_file = jobs.command(job, plain, tmp_path / "plain")
    recipe, settings = load_recipe(recipe_file, ours.overrides), json.loads(Path(settings_file).read_text())
    assert (recipe.model.base, Path(settings["base"]).name) == ("tiny", "tiny_base")
    assert settings["pictures"] == recipe.data.sources[0].path
    assert settings["steps"] == recipe.train.max_steps == 50
    assert settings["batch_size"] == recipe.data.batch_size == 16
    assert (settings["lr"], settings["warmup"]) == (recipe.optimizer.lr, recipe.schedule.warmup_steps)
    assert (settings["rank"], settings["caption_dropout"]) == (recipe.targets.rank, recipe.data.caption_dropout)
    assert recipe.objective.min_snr_gamma is None
    assert recipe.validation.every == 0


def test_those_with_the_same_targets_are_compared_with_one(jobs, tmp_path):
    for job in (jobs.quickstart(2, quick=True), jobs.quickstart(2, quick=False)):
        found = jobs.contenders(job)
        assert [one.targets for one in found if one.is_reference] == ["attention", "all"]
        assert len({(one.name, one.targets) for one in found}) == len(found)


@pytest.mark.slow
def test_every_contender_trains_and_has_a_row(tmp_path):
    command = [sys.executable, str(BENCH / "whole_job.py"), "--quick", "--work", str(tmp_path), "--only", "attention "]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert [row[1] for row in rows[2:]] == ["quickstart"] * 4 + ["SD 1.5 size"] * 4
    trained = rows[0].index("trained")
    assert len({row[trained] for row in rows[2:6]}) == len({row[trained] for row in rows[6:]}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sd15-quick"]
    floors = [line for line in done.stdout.splitlines() if "bare passes of the frozen network" in line]
    assert [line.split(":")[0] for line in floors] == ["quickstart, attention", "SD 1.5 size, attention"]
