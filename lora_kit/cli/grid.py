"""`lora-kit grid`: strength × prompt × seed as one labelled picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lora_kit.allocator import keep_freed_blocks
from lora_kit.cli.options import (
    BLOCK_WEIGHTS_HELP,
    EMBEDDING_HELP,
    LONG_PROMPTS_HELP,
    PREDICTION_HELP,
    SCALE_HELP,
    TOKENIZER_HELP,
    DtypeName,
    LongPrompts,
    PredictionName,
    base_section,
    parse_adapter,
    parse_numbers,
    parse_seeds,
    parse_size,
    refuse_existing,
    scale_rules,
)
from lora_kit.cli.picture_options import (
    BATCH_HELP,
    ETA_HELP,
    HELP_GROUPS,
    IMAGE_HELP,
    MASK_HELP,
    PROMPT_HELP,
    SAMPLER_HELP,
    STRENGTH_HELP,
    picture_options,
    prompts_or_pictures,
)
from lora_kit.cli.quick_imports import quick_imports
from lora_kit.errors import RecipeError

__all__ = ["HELP_GROUPS", "command"]


def command(
    base: Annotated[str, typer.Argument(help="A diffusers folder, a checkpoint file, a hub id, or `tiny`.")],
    adapter: Annotated[list[str], typer.Option(help="Adapter file. Several are all drawn at the same strength.")],
    out: Annotated[Path, typer.Option(help="The PNG.")],
    prompt: Annotated[list[str] | None, typer.Option(help=PROMPT_HELP)] = None,
    scales: Annotated[str, typer.Option(help="Strengths, a column each.")] = "0,0.5,1",
    seeds: Annotated[str, typer.Option(help="Seeds; each prompt has a row for each.")] = "0",
    scale: Annotated[list[str] | None, typer.Option(help=SCALE_HELP)] = None,
    block_weights: Annotated[str | None, typer.Option(help=BLOCK_WEIGHTS_HELP)] = None,
    embedding: Annotated[list[str] | None, typer.Option(help=EMBEDDING_HELP)] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 or less turns it off.")] = 7.5,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of a picture. Default: the base's own.")] = None,
    sampler: Annotated[str, typer.Option(help=SAMPLER_HELP)] = "ddim",
    eta: Annotated[float, typer.Option(min=0, max=1, help=ETA_HELP)] = 0.0,
    image: Annotated[list[Path] | None, typer.Option(help=IMAGE_HELP)] = None,
    mask: Annotated[list[Path] | None, typer.Option(help=MASK_HELP)] = None,
    strength: Annotated[float | None, typer.Option(help=STRENGTH_HELP)] = None,
    long_prompts: Annotated[LongPrompts, typer.Option(help=LONG_PROMPTS_HELP)] = "cut",
    prediction_type: Annotated[PredictionName | None, typer.Option(help=PREDICTION_HELP)] = None,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help=BATCH_HELP)] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Default: fp16 on a GPU, else fp32.")] = None,
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
