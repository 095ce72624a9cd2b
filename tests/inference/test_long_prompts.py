"""Prompts longer than the text encoder reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_samples import bundle_of
from PIL import Image

from lora_kit.cli.main import main
from lora_kit.inference import SamplingSettings, draw

CUT = SamplingSettings(steps=2, guidance=1.0, width=16, height=16)
CHUNKS = replace(CUT, long_prompts="chunks")
LONG = "red apple " * 40


def test_chunks_read_the_end_of_a_prompt_that_is_cut_off_otherwise(tiny_sd1_folder: Path) -> None:
    bundle = bundle_of(tiny_sd1_folder)
    prompts = [LONG, f"{LONG} blue boat"]
    for settings, are_equal in ((CUT, True), (CHUNKS, False)):
        first, second = draw(bundle, prompts, [0, 0], settings=settings)
        assert (first.tobytes() == second.tobytes()) == are_equal


def test_prompts_of_other_lengths_leave_a_picture_as_it_is(tiny_sd1_folder: Path) -> None:
    bundle = bundle_of(tiny_sd1_folder)
    alone = [draw(bundle, [prompt], [0], settings=CHUNKS)[0] for prompt in ("blue boat", LONG)]
    together = draw(bundle, ["blue boat", LONG], [0, 0], settings=CHUNKS)
    # Rounding only; a value on the edge between two bytes may fall either way.
    pairs = [(np.asarray(a, np.int16), np.asarray(b, np.int16)) for a, b in zip(alone, together, strict=True)]
    assert max(np.abs(a - b).max() for a, b in pairs) <= 1
    assert draw(bundle, ["blue boat"], [0], settings=CUT)[0].tobytes() == alone[0].tobytes()


def test_the_command_tells_how_to_read_long_prompts(
    tiny_sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", str(tiny_sd1_folder), "--prompt", LONG, "--steps", "1", "--size", "16x16"]
    for name, extra in (("cut", []), ("chunks", ["--long-prompts", "chunks"])):
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*common, "--out", str(tmp_path / name), *extra])
        assert ("--long-prompts chunks reads all of it" in capsys.readouterr().err) == (name == "cut")
        (path,) = (tmp_path / name).iterdir()
        with Image.open(path) as picture:
            assert picture.info["long_prompts"] == name
