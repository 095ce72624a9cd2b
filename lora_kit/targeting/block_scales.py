"""Strength per module: `glob=number` in order, and sd-webui's block-weight strings. Pure; needs only module names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lora_kit.errors import RecipeError, TargetError
from lora_kit.targeting.globs import compile_pattern, dead_alternatives
from lora_kit.targeting.names import spellings
from lora_kit.targeting.suggest import nearest_modules

INS, OUTS = [f"IN{index:02}" for index in range(12)], [f"OUT{index:02}" for index in range(12)]
BLOCKS_26 = ("BASE", *INS, "M00", *OUTS)
"""The order of a 26-number string: text encoder, the UNet's input, middle and output blocks in LDM's numbering."""
BLOCKS_17 = tuple(block for block in BLOCKS_26 if block not in {*INS[::3], *INS[10:], *OUTS[:3]})
"""The order of a 17-number string: BASE and the blocks with attention, which are all a plain LoRA changes."""

_LEVELS, _LAYERS = 4, 2  # of every Stable Diffusion v1 and v2 UNet
_OTHER_DEPTH = (
    f"block weights: got {{}}; the strings know UNets of {_LEVELS} levels with {_LAYERS} residual blocks each, as all "
    "of Stable Diffusion v1 and v2 are. Use `glob=number` for this one."
)
_BLOCK = re.compile(r"unet\.(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")


class _Spec(NamedTuple):
    text: str
    scale_of: Callable[[str], float | None]
    """Module name → strength, or None where the text says nothing about it."""


def module_scales(names: Sequence[str], base: float, specs: Sequence[str]) -> dict[str, float]:
    """Module → `base` × the number of the last of `specs` that matches it; `base` where none does.

    A spec is `glob=number`, with the globs (and `re:` regular expressions) of the targeting rules, or a block-weight
    string: 17 or 26 numbers with commas between, as in sd-webui-lora-block-weight. `names` are the adapted modules.

    Raises RecipeError, listing everything that is wrong: a spec that cannot be read, a number that is not finite, a
    glob (or an alternative in its braces) that matches none of `names`, with the nearest of them.
    """
    problems: list[str] = []
    found: list[_Spec] = []
    for text in specs:
        try:
            found.append(_block_weights(text) if _is_block_weights(text) else _glob(text, names))
        except (RecipeError, TargetError) as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    return {name: base * _last(found, name) for name in names}


def ldm_block(name: str) -> str | None:
    """The block of a module of an SD v1 or v2 base: `BASE` (text encoder), `IN04`, `M00`, `OUT11`; None for the
    UNet's modules outside its blocks, such as `unet.time_embedding.linear_1`, which the strings do not reach.

    LDM (`openaimodel.py`) numbers the down path's residual blocks and downsamplers in one row after `conv_in`, and
    the up path's residual blocks with the upsampler in the last of its level.
    """
    component, _, inner = name.partition(".")
    if component.startswith("text_encoder"):
        return "BASE"
    if inner.startswith("mid_block."):
        return "M00"
    if inner == "conv_in":
        return "IN00"
    match = _BLOCK.match(f"{name}.")
    if match is None:
        return None
    side, level, part, index = match[1], int(match[2]), match[3], int(match[4])
    position = _LAYERS if part.endswith("samplers") else index
    block = level * (_LAYERS + 1) + position + (side == "down")
    if level >= _LEVELS or position > _LAYERS:
        raise RecipeError(_OTHER_DEPTH.format(name))
    return f"{'IN' if side == 'down' else 'OUT'}{block:02}"


def check_depth(modules: Sequence[str], specs: Sequence[str]) -> None:
    """Raise RecipeError if a block-weight string is meant for a UNet whose blocks are not numbered as it thinks.

    modules: all of the base's, not only the adapted ones.
    """
    found = [match for name in modules if (match := _BLOCK.match(f"{name}."))]
    levels = {match[2] for match in found}
    residual = {match[4] for match in found if match.group(1, 2, 3) == ("down", "0", "resnets")}
    if any(map(_is_block_weights, specs)) and (len(levels), len(residual)) != (_LEVELS, _LAYERS):
        raise RecipeError(_OTHER_DEPTH.format(f"a UNet of {len(levels)} levels with {len(residual)} residual blocks"))


def _is_block_weights(text: str) -> bool:
    return "=" not in text and "," in text


def _block_weights(text: str) -> _Spec:
    orders = {17: BLOCKS_17, 26: BLOCKS_26}
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if _number(part) is None]
    if wrong or len(parts) not in orders:
        got = f"{', '.join(map(repr, wrong))} in it" if wrong else f"{len(parts)} numbers"
        raise RecipeError(
            f"block weights `{text}`: got {got}; allowed: 17 numbers ({_listed(BLOCKS_17)}) or 26 "
            f"({_listed(BLOCKS_26)}) with commas between"
        )
    # As in the extension, a block that the short form leaves out gets nothing of the adapter.
    table = dict.fromkeys(BLOCKS_26, 0.0) | dict(zip(orders[len(parts)], map(float, parts), strict=True))

    def scale_of(name: str) -> float | None:
        block = ldm_block(name)
        return None if block is None else table[block]

    return _Spec(text, scale_of)


def _glob(text: str, names: Sequence[str]) -> _Spec:
    glob, equals, number = text.rpartition("=")
    value = _number(number)
    if not equals or not glob.strip() or value is None:
        raise RecipeError(
            f"scale `{text}`: allowed: PATTERN=NUMBER, such as unet.up_blocks.**=0.6, with a finite number"
        )
    pattern = compile_pattern(glob.strip())
    picked = {name for name in names if any(map(pattern.matches, spellings(name)))}
    if not picked:
        nearest = "".join(f"\n  {name}" for name in nearest_modules(pattern, names))
        raise RecipeError(f"scale `{text}`: `{pattern.text}` matches no adapted module. The nearest:{nearest}")
    dead = dead_alternatives(pattern, [spelling for name in names for spelling in spellings(name)])
    if dead:
        listed = ", ".join(f"`{alternative}`" for alternative in dead)
        raise RecipeError(f"scale `{text}`: {listed} of its braces matches no adapted module; correct or remove it.")
    return _Spec(text, lambda name: value if name in picked else None)


def _last(specs: Sequence[_Spec], name: str) -> float:
    for spec in reversed(specs):
        scale = spec.scale_of(name)
        if scale is not None:
            return scale
    return 1.0


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _listed(blocks: Sequence[str]) -> str:
    return " ".join(blocks)
