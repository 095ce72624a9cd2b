"""The benchmark of methods reads runs that are there; its figures are not looked at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora_kit.training import train

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, "methods", raising=False)
    import methods

    return methods


def test_each_run_has_a_row_with_its_own_figures(methods, make_recipe, make_picture_folder, tmp_path):
    other = make_picture_folder(tmp_path / "other", count=3, size=(48, 40))
    held_out = f"validation.held_out={{path: {other}}}"
    drawn = (held_out, "validation.retrieval=true", "train.max_steps=1")
    for name in ("lora", "lokr"):
        train(make_recipe(f"targets={{preset: attention, rank: 1, method: {name}}}", *drawn, name=name))
    rows = methods.table(tmp_path, ["lora", "lokr", "loha"]).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["lora", "lokr"]
    assert rows[2].count("|") == rows[0].count("|") == rows[1].count("|")
    assert rows[2].split("|")[-2].strip() == "–"  # not timed
    size = (tmp_path / "lora" / "adapter.safetensors").stat().st_size
    assert rows[2].split("|")[4].strip() == f"{size / 1e6:.1f}"


def test_every_method_of_the_table_is_a_recipe(methods):
    from lora_kit.recipe import load_recipe

    for method in methods.METHODS.values():
        load_recipe(methods.RECIPE, [*method.overrides, f"optimizer.lr={method.rate}"])
