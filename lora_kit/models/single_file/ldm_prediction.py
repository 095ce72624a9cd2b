"""What a single-file checkpoint predicts: what says so for certain, and hints where nothing does.

SD 2's 512 base predicts the noise and its 768 model v, and their tensors have the same names and shapes. Imports
neither torch nor diffusers.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_kit.errors import ModelError
from lora_kit.models.single_file.ldm_configs import Shapes, is_v2
from lora_kit.models.single_file.ldm_keys import UNET

_WORDS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "sample": "sample"}
_ARCHITECTURES = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}
_IN_NAMES = {"v_prediction": re.compile(r"768|v[-_]?pred", re.I), "epsilon": re.compile(r"512|[-_]base|[-_]eps", re.I)}
"""Published names: 768-v-ema, v2-1_768-ema-pruned, v2-1_768-nonema-pruned; 512-base-ema, v2-1_512-ema-pruned."""

STATISTIC = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_THRESHOLD = 0.09
"""Above it ComfyUI takes a 4-channel SD2 for a v model (comfy/supported_models.py, `SD20.model_type`, which says of
itself that it may not always work)."""


class Hint(NamedTuple):
    """Something that makes one answer likelier, and proves nothing."""

    says: str
    """`epsilon` or `v_prediction`."""
    why: str


def told_by(metadata: Mapping[str, str]) -> str | None:
    """What the header says by the ModelSpec standard (Stability AI): its prediction type, else its architecture."""
    said = _WORDS.get(metadata.get("modelspec.prediction_type", ""))
    return said or _ARCHITECTURES.get(metadata.get("modelspec.architecture", ""))


def is_open(shapes: Shapes, metadata: Mapping[str, str]) -> bool:
    """Whether somebody has to say what the checkpoint predicts: SD2's, unless its header does. The inpainting model
    of SD2 is one only, and predicts the noise."""
    inputs = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 4))[1]
    return is_v2(shapes) and inputs == 4 and told_by(metadata) is None


def ask(path: Path, shapes: Shapes, metadata: Mapping[str, str], read: Callable[[str], Any]) -> ModelError:
    """The error that asks for it, with every hint there is. read: one of the file's tensors by name."""
    found = [*_name(path), *_beside(path), *_said(metadata), *_statistic(shapes, read)]
    lines = [
        f"{path} is a Stable Diffusion v2 checkpoint, and its tensors do not tell what it predicts: "
        "set model.prediction_type: epsilon (the 512 base) or v_prediction (the 768 model); for generate and grid that "
        "is --prediction-type."
    ]
    lines += ["Hints, none of which proves it:"] if found else ["Nothing about the file hints at either."]
    return ModelError("\n".join([*lines, *(f"  {hint.says}: {hint.why}" for hint in found)]))


def _name(path: Path) -> Iterator[Hint]:
    for says, pattern in _IN_NAMES.items():
        if match := pattern.search(path.stem):
            yield Hint(says, f"the file's name has {match[0]!r}, as the published files of that model do")


def _beside(path: Path) -> Iterator[Hint]:
    """The LDM config of the same name, as web UIs want it beside a v model; its default is the noise."""
    config = path.with_suffix(".yaml")
    if not config.is_file():
        return
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    match = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE)
    says = _WORDS.get({"eps": "epsilon"}.get(match[1], match[1])) if match else "epsilon"
    if says is not None:
        why = f"has parameterization: {match[1]}" if match else "has no parameterization, which means the noise"
        yield Hint(says, f"{config.name} beside it {why}")


def _said(metadata: Mapping[str, str]) -> Iterator[Hint]:
    """What the header says in words of its own."""
    for key, value in metadata.items():
        for says, pattern in _IN_NAMES.items():
            if key.startswith(("modelspec.", "ss_")) and (match := pattern.search(value[:200])):
                yield Hint(says, f"its header's {key} ({value[:60]}) has {match[0]!r}")


def _statistic(shapes: Shapes, read: Callable[[str], Any]) -> Iterator[Hint]:
    if STATISTIC not in shapes:
        return
    spread = statistics.pstdev(float(one) for one in read(STATISTIC).flatten().tolist())
    says, side = ("v_prediction", "above") if spread > _THRESHOLD else ("epsilon", "not above")
    yield Hint(says, f"a norm's bias has the deviation {spread:.3f}, {side} {_THRESHOLD}: ComfyUI's rule of thumb")
