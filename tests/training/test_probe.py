"""`lora-kit plan --probe`: real steps, whatever the recipe, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_kit.allocator import give_back_freed
from lora_kit.cli.main import main
from lora_kit.cli.plan_probe import duration
from lora_kit.recipe import Recipe
from lora_kit.training.peak_memory import peak_memory, reset_peak
from lora_kit.training.probe import probe

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("data.cache=none", "train.micro_batch_size=3", "train.gradient_checkpointing=true"),
        ("data.cache=disk", "targets={preset: attention, text_encoder: true}"),
        ("model.quantize=int8", "targets={preset: all-linear}"),
        ("targets={preset: attention, method: full}", "train.ema_decay=0.9"),
        ('tokens=[{token: "<toy>", initializer: cat}]', "targets=none", 'data.trigger="<toy>"'),
        ("train.mixed_precision=bf16", "optimizer.name=prodigy"),
    ],
)
def test_it_takes_the_steps_that_the_recipe_asks_for(
    make_recipe: MakeRecipe, tmp_path: Path, options: tuple[str, ...]
) -> None:
    recipe = make_recipe(*options, f"data.cache_dir={tmp_path / 'cache'}" if "data.cache=disk" in options else "seed=1")
    before = sorted(path for path in tmp_path.rglob("*"))
    found = probe(recipe)
    assert sorted(path for path in tmp_path.rglob("*")) == before  # no run folder, no cache
    assert len(found.seconds) == 3 and all(one > 0 for one in found.seconds)
    assert all(torch.isfinite(torch.tensor(found.losses)))
    assert len(set(found.losses)) == 3  # the steps change the weights, and have their own noise
    assert (found.side, found.batch_size) == (16, 4)
    assert found.micro_batches == (2 if "train.micro_batch_size=3" in options else 1)
    assert found.peak_bytes is not None and found.loading_bytes is not None


def test_the_peak_is_of_what_came_after_the_reset() -> None:
    device = torch.device("cpu")
    size = 64 * 2**20
    reset_peak(device)
    before = peak_memory(device)
    block = torch.ones(size // 4)
    assert before is not None
    grown = (peak_memory(device) or 0) - before
    assert size * 0.9 < grown < size * 1.5  # other threads may take and give some memory
    del block
    give_back_freed()  # a command that ran in this process may have had glibc keep it
    reset_peak(device)
    assert (peak_memory(device) or 0) < before + size * 0.5


@pytest.mark.parametrize("form", ["text", pytest.param("json", marks=pytest.mark.slow)])
def test_plan_prints_it(make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    make_recipe()
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(tmp_path / "recipe.yaml"), "--probe", *(["--json"] if form == "json" else [])])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    if form == "text":
        assert "probe: 3 steps of 4 pictures of 16 x 16 on cpu" in said
        assert "4 steps take" in said and "memory: at most" in said
    else:
        assert len(json.loads(said)["probe"]["seconds"]) == 3


@pytest.mark.parametrize(("seconds", "said"), [(42.4, "42 s"), (310, "5 min 10 s"), (12000, "3 h 20 min")])
def test_durations_are_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said
