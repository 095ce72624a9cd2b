"""The style and subject figures cannot be won by pictures that show nothing."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lora_kit.training.validation.figures import mean_saturation, retrieval


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


REFERENCES = [noise(seed) for seed in range(12)]


def test_each_reference_finds_itself():
    assert retrieval(REFERENCES, REFERENCES) == (1.0, 1.0, 12)


def test_blank_pictures_find_nothing():
    assert retrieval([Image.new("RGB", (32, 32), "white")] * 12, REFERENCES) == (0.0, 0.0, 12)


def test_one_picture_for_every_subject_finds_only_its_own():
    assert retrieval([REFERENCES[3]] * 12, REFERENCES).top1 == 1 / 12


def test_brightness_and_contrast_do_not_count():
    paler = [Image.fromarray((np.asarray(p) // 2 + 100).astype(np.uint8)) for p in REFERENCES]
    assert retrieval(paler, REFERENCES).top1 == 1.0


def test_black_on_white_has_no_saturation_and_pure_red_has_all():
    assert mean_saturation([Image.new("RGB", (4, 4), "white"), Image.new("RGB", (4, 4), "black")]) == 0.0
    assert mean_saturation([Image.new("RGB", (4, 4), (255, 0, 0))]) == 255.0
