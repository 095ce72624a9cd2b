"""`lora-kit generate` and `grid` with a super-resolution base: pictures in, no prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LDMSuperResolutionPipeline
from PIL import Image

from lora_kit.cli.main import main


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """70 × 40 pixels, which the pipeline resizes to 64 × 32."""
    down, across = np.mgrid[0:40, 0:70]
    values = np.stack([3 * across, 6 * down, 2 * (across + down)], axis=-1)
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "boat.png")
    return tmp_path / "boat.png"


def test_generate_enlarges_as_diffusers_does(tiny_super_resolution_folder: Path, picture: Path, tmp_path: Path) -> None:
    base, out = tiny_super_resolution_folder, tmp_path / "out"
    assert run("generate", base, "--image", picture, "--steps", 3, "--seed", 7, "--out", out) == 0
    pipe = LDMSuperResolutionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    wanted = pipe(Image.open(picture), num_inference_steps=3, generator=generator).images[0]
    with Image.open(out / "000_boat_seed7.png") as drawn:
        assert drawn.size == (256, 128)
        # fp32 both times; a value near the middle between two levels may round to the other one.
        assert np.abs(np.asarray(drawn, np.int16) - np.asarray(wanted, np.int16)).max() <= 1
        assert drawn.info["images"] == "boat.png"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a cat"], "reads no text, and got the prompt 'a cat'; give it a picture alone (--image)"),
        (["--prompt", "a cat", "--image", "PICTURE"], "reads no text, and got the prompt 'a cat'"),
        ([], "say what to draw with --prompt; a base that enlarges pictures takes --image instead"),
        (["--image", "SMALL"], "The picture has 20x20 pixels"),
        (["--image", "PICTURE", "--size", "64x64"], "gives 256x128, and 64x64 are asked for"),
        (["--image", "PICTURE", "--strength", "0.5"], "strength: got 0.5, but this base draws from noise"),
        (["--image", "PICTURE", "--mask", "PICTURE"], "takes no mask"),
    ],
)
def test_what_it_does_not_take_is_refused(
    arguments: Sequence[str],
    said: str,
    tiny_super_resolution_folder: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    files = {"PICTURE": str(picture), "SMALL": str(tmp_path / "small.png")}
    given = [files.get(argument, argument) for argument in arguments]
    assert run("generate", tiny_super_resolution_folder, *given, "--out", tmp_path / "out") == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_base_with_text_still_needs_a_prompt(
    tiny_sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    assert run("generate", tiny_sd1_folder, "--image", tmp_path / "image.png", "--out", tmp_path / "out") == 2
    assert "reads text: say what to draw with --prompt" in " ".join(capsys.readouterr().err.split())
