"""The help of `generate` and `grid`: every option under a heading, none lost."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from lora_kit.cli.main import main
from lora_kit.cli.picture_options import HELP_GROUPS


@pytest.mark.parametrize("command", ["generate", "grid"])
def test_every_option_stands_once_and_under_its_heading(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, "--help"])
    text = capsys.readouterr().out
    shown = re.findall(r"^(\S.*):$|^  (--[a-z-]+)", text, re.MULTILINE)
    sections: dict[str, list[str]] = {}
    for title, option in shown:
        if title:
            sections[title] = []
        else:
            sections[list(sections)[-1]].append(option.removeprefix("--").replace("-", "_"))
    own = inspect.signature(importlib.import_module(f"lora_kit.cli.{command}").command).parameters
    assert sorted(one for found in sections.values() for one in found) == sorted(set(own) - {"base"})
    for title, names in HELP_GROUPS.items():
        assert set(sections[title]) == set(names) & set(own)
