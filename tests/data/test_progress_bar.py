"""Progress bars hand everything through, and stay away from stdout and short work."""

from __future__ import annotations

import pytest

import lora_kit.progress as module
from lora_kit.progress import no_progress, progress


@pytest.mark.parametrize("bar", [progress, no_progress])
def test_items_pass_in_order(bar: module.ProgressBar) -> None:
    assert list(bar(iter("abc"), "Passing", 3)) == ["a", "b", "c"]


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    list(progress(range(5), "Passing", 5))
    assert capsys.readouterr() == ("", "")


def test_long_work_tells_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_EVERY_S", -1.0)
    list(progress(range(2), "Passing", 2))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["Passing: 1 of 2", "Passing: 2 of 2"]


def test_bar_on_a_terminal_is_drawn_and_closed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(module, "PATIENCE_S", -1.0)
    list(progress(range(2), "Passing", 2))
    out, err = capsys.readouterr()
    assert out == ""
    assert "Passing" in err
    assert "2/2" in err
