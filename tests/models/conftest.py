"""Both generations of Stable Diffusion, for tests that hold for either."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_kit.models import ModelBundle, load_bundle
from lora_kit.recipe.sections import ModelSection


@pytest.fixture(params=["tiny_sd1_folder", "tiny_sd2_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def bundle(folder: Path) -> ModelBundle:
    return load_bundle(ModelSection(base=str(folder)))
