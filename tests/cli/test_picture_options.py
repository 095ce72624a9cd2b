"""`--image`, `--mask`, `--strength`, `--eta` and `--sampler` of `lora-kit generate` and `grid`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from adapter_samples import adapter_file, bundle_of
from PIL import Image, ImageDraw

from lora_kit.cli.main import main
from lora_kit.cli.picture_options import SAMPLER_HELP
from lora_kit.inference import SamplingSettings, draw
from lora_kit.models.family.picture_inputs import PictureInputs
from lora_kit.models.pipelines import SCHEDULERS


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A picture and a mask of 16 × 16 pixels."""
    image, mask = Image.new("RGB", (16, 16), (200, 40, 60)), Image.new("L", (16, 16))
    ImageDraw.Draw(mask).rectangle((4, 4, 11, 11), fill=255)
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    return tmp_path / "image.png", tmp_path / "mask.png"


def test_the_help_names_every_sampler() -> None:
    assert SAMPLER_HELP.rstrip(".").replace(" or ", ", ").split(", ") == list(SCHEDULERS)


@pytest.mark.parametrize("base", ["tiny_sd1_folder", "tiny_inpainting_folder"])
def test_generate_draws_from_picture_and_mask_and_says_so(
    base: str, files: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, (image, mask), out = request.getfixturevalue(base), files, tmp_path / "out"
    arguments = ["generate", folder, "--prompt", "red apple", "--steps", 4, "--guidance", 1, "--image", image]
    arguments += ["--strength", 0.5, "--eta", 0.3]
    assert run(*arguments, "--mask", mask, "--out", out / "masked") == 0
    assert run(*arguments, "--out", out / "whole") == 0
    settings = SamplingSettings(steps=4, guidance=1.0, width=16, height=16, eta=0.3, strength=0.5)
    for name, inputs in (
        ("masked", PictureInputs(Image.open(image), Image.open(mask))),
        ("whole", PictureInputs(Image.open(image))),
    ):
        (wanted,) = draw(bundle_of(folder), ["red apple"], [0], settings=settings, inputs=[inputs])
        with Image.open(out / name / "000_red-apple_seed0.png") as drawn:
            assert np.array_equal(np.asarray(drawn), np.asarray(wanted))
            told = {key: drawn.info.get(key) for key in ("images", "masks", "strength", "eta")}
        masks = "mask.png" if name == "masked" else None
        assert told == {"images": "image.png", "masks": masks, "strength": "0.5", "eta": "0.3"}


def test_each_prompt_may_have_a_picture_of_its_own(
    tiny_sd1_folder: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    Image.open(files[0]).rotate(90).save(tmp_path / "second.png")
    base = ["generate", tiny_sd1_folder, "--steps", 2, "--guidance", 1, "--strength", 0.5]
    both = ["--prompt", "red apple", "--prompt", "red apple", "--image", files[0], "--image", files[1]]
    assert run(*base, *both, "--out", tmp_path / "two") == 0
    assert run(*base, "--prompt", "red apple", "--image", files[1], "--out", tmp_path / "one") == 0
    with (
        Image.open(tmp_path / "two" / "001_red-apple_seed0.png") as two,
        Image.open(tmp_path / "one" / "000_red-apple_seed0.png") as one,
        Image.open(tmp_path / "two" / "000_red-apple_seed0.png") as first,
    ):
        assert np.abs(np.asarray(two).astype(int) - np.asarray(one)).max() <= 1  # two in a batch round otherwise
        assert not np.array_equal(np.asarray(two), np.asarray(first))


def test_grid_draws_from_a_picture(tiny_sd1_folder: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = adapter_file(tmp_path / "a.safetensors", bundle_of(tiny_sd1_folder).components)
    arguments = ["grid", tiny_sd1_folder, "--adapter", adapter, "--scales", "0", "--prompt", "red apple", "--steps", 2]
    arguments += ["--guidance", 1, "--out"]
    assert run(*arguments, tmp_path / "plain.png") == 0
    assert run(*arguments, tmp_path / "from.png", "--image", files[0], "--strength", 0.5) == 0
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "from.png").read_bytes()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--strength", "0.5"], "--strength is about a picture to begin at: give one with --image"),
        (["--mask", "MASK"], "--mask is about a picture to begin at"),
        (["--image", "IMAGE", "--image", "IMAGE", "--image", "IMAGE"], "got 3 --image for 1 prompts"),
        (["--image", "IMAGE", "--mask", "MASK", "--mask", "MASK"], "got 2 --mask for 1 --image"),
        (["--image", "nowhere.png"], "nowhere.png: the file is missing"),
        (["--image", "IMAGE", "--mask", "OTHER"], "the mask has 18x16 pixels and the picture 16x16"),
        (["--image", "IMAGE", "--size", "32x32"], "of 16x16 pixels gives 16x16, and 32x32 are asked for"),
        (["--image", "IMAGE", "--strength", "0.01"], "less than one of 25 steps"),
        (["--sampler", "eulr"], "Unknown sampler 'eulr'; known are ddim, ddpm"),
        (["--eta", "0.5", "--sampler", "euler"], "eta: got 0.5, which is about the sampler 'ddim'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    extra: list[str],
    said: str,
    tiny_sd1_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("L", (18, 16), 255).save(tmp_path / "other.png")
    places = {"IMAGE": files[0], "MASK": files[1], "OTHER": tmp_path / "other.png"}
    arguments = [places.get(word, word) for word in extra]
    assert run("generate", tiny_sd1_folder, "--prompt", "x", "--out", tmp_path / "out", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
