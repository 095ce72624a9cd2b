"""A recipe on the small random base, and a run of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from lora_kit.recipe import Recipe, load_recipe

BASICS = """
model: {{base: {base}}}
targets:
  - {{match: "unet.**.attn*.to_{{q,k,v,out.0}}", rank: 4}}
  - {{match: "unet.**.resnets.*.conv1", rank: 2}}
data:
  sources: [{{path: {pictures}}}]
  resolution: 16
  batch_size: 4
  caption_dropout: 0.1
optimizer: {{lr: 0.01}}
train: {{max_steps: 4, log_every: 1}}
save: {{every: 2}}
validation: {{every: 0, steps: 2}}
output_dir: {out}
"""


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the first run's precision for the whole process; each test is a process of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make_recipe(tiny_sd1_folder: Path, picture_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A function (*overrides, name="run") → recipe on the small base, writing to tmp_path/name."""

    def make(*overrides: str, name: str = "run", **places: Any) -> Recipe:
        path = tmp_path / "recipe.yaml"
        values = {"base": tiny_sd1_folder, "pictures": picture_folder, "out": tmp_path / name} | places
        path.write_text(BASICS.format(**values))
        return load_recipe(path, overrides)

    return make
