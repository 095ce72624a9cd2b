"""The benchmark of the data path runs at toy sizes: its code is kept from rotting, its figures are not looked at."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from lora_kit.cli.main import main

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture(autouse=True)
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("data_fill", "data_start", "data_step", "plan"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first run's precision for the process


def test_a_filled_set_starts_from_its_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import data_fill  # pyright: ignore[reportMissingImports]
    import data_start  # pyright: ignore[reportMissingImports]

    recipe = data_fill.write_set(tmp_path, 8)
    with pytest.raises(SystemExit) as caught:
        main(["cache", str(recipe)])
    assert caught.value.code == 0
    assert "pictures: 8 of 8 encoded; captions: 8 of 8 encoded" in capsys.readouterr().out
    seconds = data_start.measure(str(recipe), time.monotonic())
    assert tuple(seconds) == (*data_start.PARTS, data_start.CPU)


def test_the_step_prints_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import data_step  # pyright: ignore[reportMissingImports]

    data_step.tables(data_step.Sizes(pixels=64, batch=2, steps=1, entries=32, quick=True), tmp_path)
    shown = capsys.readouterr().out
    assert re.findall(r"^### (.*?):", shown, re.MULTILINE) == ["A whole step", "The loader"]
    rows = re.findall(r"^\| (.+?) \| ([0-9.]+) \|", shown, re.MULTILINE)
    assert len(rows) == 4
    assert all(float(figure) > 0 for _, figure in rows)
