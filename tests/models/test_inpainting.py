"""The inpainting family: what it is recognised by, the masks of its training, and what goes beside z_t."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from lora_kit.models import ModelBundle, load_bundle, pipeline
from lora_kit.models.family.masks import drawn_mask, mask_for
from lora_kit.models.family.picture_inputs import PictureInputs
from lora_kit.recipe import ModelSection
from lora_kit.recipe.inpainting import InpaintingSection, ShapeSection

SIZE = (48, 64)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["tiny_inpainting_folder", "tiny_inpainting2_folder"])
def filler(request: pytest.FixtureRequest) -> ModelBundle:
    return load_bundle(ModelSection(base=str(request.getfixturevalue(request.param))))


def test_the_config_tells_the_family(tiny_inpainting_folder: Path, tiny_inpainting2_folder: Path) -> None:
    names = [
        load_bundle(ModelSection(base=str(f))).family.name for f in (tiny_inpainting_folder, tiny_inpainting2_folder)
    ]
    assert names == ["sd1-inpainting", "sd2-inpainting"]


def test_its_pipeline_is_diffusers_for_inpainting(filler: ModelBundle) -> None:
    assert type(pipeline(filler)) is StableDiffusionInpaintPipeline


def test_mask_and_masked_picture_are_diffusers_own(filler: ModelBundle) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=chance()) * 2 - 1
    holes = [torch.zeros(1, 16, 16), None]
    holes[0][:, 3:9, 5:14] = 1
    family = type(filler.family)(InpaintingSection(masks="data", whole=0.0))
    ours = family.beside(filler, pixels, holes, [chance(3), chance(4)])
    # The same masks and posteriors, by the pipeline: a generator stands where the mask's draws have left it.
    generators = [chance(3), chance(4)]
    masks = torch.stack(
        [mask_for(family.section, hole, (16, 16), g) for hole, g in zip(holes, generators, strict=True)]
    )
    pipe = pipeline(filler)
    mask, masked = pipe.prepare_mask_latents(
        masks, pixels * (masks < 0.5), 2, 16, 16, torch.float32, torch.device("cpu"), generators, False
    )
    assert masks[0].equal(holes[0])
    # exp(x / 2) against sqrt(exp(x)), then scaled: a few units in the last place of values near 1
    torch.testing.assert_close(ours, torch.cat([mask, masked], dim=1), rtol=1e-6, atol=1e-6)


def test_what_goes_beside_a_sample_does_not_depend_on_its_batch(filler: ModelBundle) -> None:
    pixels = torch.rand(3, 3, 16, 16, generator=chance()) * 2 - 1
    together = filler.family.beside(filler, pixels, [None] * 3, [chance(seed) for seed in range(3)])
    alone = [filler.family.beside(filler, pixels[i : i + 1], [None], [chance(i)]) for i in range(3)]
    assert together[:, :1].equal(torch.cat(alone)[:, :1])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)  # convolutions of other batch sizes


def test_a_prompt_alone_fills_everything(filler: ModelBundle) -> None:
    beside = filler.family.beside_drawn(filler, None, (2, 4, 8, 8), [chance(0), chance(1)])
    grey = [PictureInputs(Image.new("RGB", (16, 16), (200, 10, 30))) for _ in range(2)]
    assert beside.equal(filler.family.beside_drawn(filler, grey, (2, 4, 8, 8), [chance(0), chance(1)]))
    assert beside[:, 0].eq(1).all()


@pytest.mark.parametrize("hole", [None, torch.zeros(1, *SIZE)], ids=["drawn", "data"])
def test_a_stated_part_of_the_pictures_is_masked_wholly(hole: torch.Tensor | None) -> None:
    section, generator = InpaintingSection(whole=0.25), chance()
    count = 4000
    whole = sum(bool(mask_for(section, hole, SIZE, generator).all()) for _ in range(count))
    # Binomial: 4 standard deviations are 110; a drawn mask covers everything in next to none of the cases.
    assert abs(whole - count / 4) < 4 * (count * 0.25 * 0.75) ** 0.5


def test_the_datas_masks_are_filled_from_half_on() -> None:
    hole = torch.tensor([[[0.0, 0.49, 0.5, 1.0]]])
    assert mask_for(InpaintingSection(whole=0.0), hole, (1, 4), chance()).tolist() == [[[0, 0, 1, 1]]]


def test_masks_are_drawn_of_the_kinds_that_are_asked_for() -> None:
    boxes = InpaintingSection(shapes=ShapeSection(strokes=0.0), most=1)
    strokes = InpaintingSection(shapes=ShapeSection(rectangles=0.0), most=1)
    for seed in range(40):
        mask = drawn_mask(boxes, SIZE, chance(seed))[0].bool()
        rows, columns = mask.any(1), mask.any(0)
        assert mask.equal(rows[:, None] & columns[None]), "one rectangle"
        assert round(0.1 * SIZE[0]) <= rows.sum() <= round(0.6 * SIZE[0])
        assert round(0.1 * SIZE[1]) <= columns.sum() <= round(0.6 * SIZE[1])
        stroke = drawn_mask(strokes, SIZE, chance(seed))[0]
        assert stroke.any()
        assert set(stroke.unique().tolist()) <= {0.0, 1.0}
    both = [drawn_mask(InpaintingSection(), SIZE, chance(seed)) for seed in range(8)]
    assert all(one.equal(drawn_mask(InpaintingSection(), SIZE, chance(seed))) for seed, one in enumerate(both))
    assert len({one.numpy().tobytes() for one in both}) == 8


def test_shapes_come_in_their_proportion() -> None:
    section, generator = InpaintingSection(shapes=ShapeSection(rectangles=3.0, strokes=1.0), most=1), chance()
    count, boxes = 1000, 0
    for _ in range(count):
        mask = drawn_mask(section, SIZE, generator)[0].bool()
        boxes += mask.equal(mask.any(1)[:, None] & mask.any(0)[None])
    # Binomial, 4 standard deviations; a stroke at the picture's edge may look like a rectangle now and then.
    assert 0.75 * count - 4 * 13.7 <= boxes <= 0.75 * count + 4 * 13.7 + 30
