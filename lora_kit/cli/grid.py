"""`lora-kit grid`: strength × prompt × seed as one labelled picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lora_kit.allocator import keep_freed_blocks
from lora_kit.cli import picture_options as shared
from lora_kit.cli.options import (
    base_section,
    parse_adapter,
    parse_numbers,
    parse_seeds,
    parse_size,
    refuse_existing,
    scale_rules,
)
from lora_kit.cli.picture_options import HELP_GROUPS, picture_options, prompts_or_pictures
from lora_kit.cli.quick_imports import quick_imports
from lora_kit.errors import RecipeError

__all__ = ["HELP_GROUPS", "command"]


def command(
    base: shared.Base,
    adapter: Annotated[list[str], typer.Option(help="Adapter file. Several are all drawn at the same strength.")],
    out: Annotated[Path, typer.Option(help="The PNG.")],
    prompt: shared.Prompt = None,
    scales: Annotated[str, typer.Option(help="Strengths, a column each.")] = "0,0.5,1",
    seeds: Annotated[str, typer.Option(help="Seeds; each prompt has a row for each.")] = "0",
    scale: shared.Scale = None,
    block_weights: shared.BlockWeights = None,
    embedding: shared.Embedding = None,
    negative: shared.Negative = "",
    steps: shared.Steps = 25,
    guidance: shared.Guidance = 7.5,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of a picture. Default: the base's own.")] = None,
    sampler: shared.Sampler = "ddim",
    eta: shared.Eta = 0.0,
    image: shared.Image = None,
    mask: shared.Mask = None,
    strength: shared.Strength = None,
    long_prompts: shared.LongPrompts = "cut",
    prediction_type: shared.Prediction = None,
    tokenizer: shared.Tokenizer = None,
    batch_size: shared.Batch = None,
    dtype: shared.Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a picture that is there.")] = False,
) -> None:
    """Draw prompts and seeds downwards, strengths to the right. A strength of 0 is the base."""
    adapters = [parse_adapter(text) for text in adapter]
    if any(option.scale != 1 for option in adapters):
        raise RecipeError("grid: --adapter takes a file without :SCALE here; --scales gives the strengths")
    rules = scale_rules(scale, block_weights)
    strengths, rows = parse_numbers(scales, "--scales"), parse_seeds(seeds)
    prompts = prompts_or_pictures(prompt, image)
    pictures = picture_options(image, mask, strength, len(prompts))
    if size:
        parse_size(size)
    refuse_existing([out], overwrite)

    keep_freed_blocks()
    with quick_imports():
        from lora_kit.cli.drawing import Wish, begin, facts_of, save_png
    from lora_kit.inference import SamplingSettings, grid
    from lora_kit.progress import progress

    asked = SamplingSettings(
        steps=steps,
        guidance=guidance,
        negative_prompt=negative,
        sampler=sampler,
        eta=eta,
        strength=strength,
        long_prompts=long_prompts,
        batch_size=batch_size,
    )
    model, tokens = base_section(base, prediction_type, tokenizer), embedding or ()
    wish = Wish(model, adapters, dtype, rules, tokens, prompt, pictures, size)
    prepared, settings, inputs = begin(wish, asked)
    sheet = grid(prepared, prompts, rows, strengths, settings, progress, inputs)
    facts = {
        "prompts": json.dumps(prompts, ensure_ascii=False),
        "seeds": seeds,
        "scales": scales,
        "prediction_type": prepared.bundle.prediction_type,
        "adapters": json.dumps([option.path.name for option in adapters]),
    }
    save_png(sheet, out, facts | facts_of(base, settings, rules, tokens) | pictures.facts())
    typer.echo(str(out))
