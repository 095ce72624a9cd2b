"""What several commands take, parsed in one place. Imports no torch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from lora_kit.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from lora_kit.recipe import ModelSection

DtypeName = Literal["fp32", "bf16", "fp16"]
PredictionName = Literal["epsilon", "v_prediction", "sample"]

_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]")


class AdapterOption(NamedTuple):
    """`FILE[:SCALE]` of the command line."""

    path: Path
    scale: float


def parse_adapter(text: str, option: str = "--adapter") -> AdapterOption:
    r"""`a.safetensors` → scale 1; `a.safetensors:0.8`, `C:\a.safetensors:-0.5` → their scale.

    Raises RecipeError for an empty file, and for a scale that is no finite number.
    """
    drive = text[:2] if _WINDOWS_PATH.match(text) else ""
    path, colon, scale = text.removeprefix(drive).rpartition(":")
    if not colon:
        path, scale = scale, "1"
    value = _number(scale)
    if not path or value is None:
        raise RecipeError(
            f"{option}: got {text!r}; allowed: FILE or FILE:SCALE with a finite number, such as style.safetensors:0.8"
        )
    return AdapterOption(Path(drive + path), value)


def base_section(base: str, prediction_type: PredictionName | None, tokenizer: str | None) -> ModelSection:
    """The base of a command that has no recipe."""
    from lora_kit.recipe import ModelSection

    return ModelSection(base=base, prediction_type=prediction_type, tokenizer=tokenizer)


def scale_rules(scale: list[str] | None, block_weights: str | None) -> tuple[str, ...]:
    """`--scale` and `--block-weights` as rules for `lora_kit.targeting.block_scales`: the last match decides."""
    return (*([block_weights] if block_weights else []), *(scale or []))


def parse_numbers(text: str, option: str) -> list[float]:
    """`0,0.5,1` → numbers. Raises RecipeError naming the option."""
    values = [_number(part) for part in text.split(",")]
    found = [value for value in values if value is not None]
    if len(found) != len(values):
        raise RecipeError(f"{option}: got {text!r}; allowed: finite numbers with commas between, such as 0,0.5,1")
    return found


def parse_seeds(text: str) -> list[int]:
    """`0,1` → seeds. Raises RecipeError for what is no whole number from 0 on."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise RecipeError(f"--seeds: got {text!r}; allowed: whole numbers from 0 on with commas between, such as 0,1")
    return [int(part) for part in parts]


def parse_size(text: str) -> tuple[int, int]:
    """`768x512` → (width, height) in pixels. Raises RecipeError otherwise."""
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text.strip(), re.ASCII)
    if match is None:
        raise RecipeError(f"--size: got {text!r}; allowed: WIDTHxHEIGHT in pixels, such as 512x512")
    return int(match[1]), int(match[2])


def torch_dtype(name: DtypeName) -> torch.dtype:
    """`bf16` → torch.bfloat16."""
    import torch  # only when a command runs

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Raise RecipeError if one of `paths` exists and may not be overwritten: before any work is done."""
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise RecipeError(f"{', '.join(existing[:5])} exists already; name another place or pass --overwrite")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
