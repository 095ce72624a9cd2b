"""`lora-kit generate`: pictures from a base and scaled adapters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from lora_kit.allocator import keep_freed_blocks
from lora_kit.cli import picture_options as shared
from lora_kit.cli.options import (
    base_section,
    parse_adapter,
    parse_size,
    refuse_existing,
    scale_rules,
)
from lora_kit.cli.picture_options import HELP_GROUPS, picture_options, prompts_or_pictures
from lora_kit.cli.quick_imports import quick_imports

__all__ = ["HELP_GROUPS", "command"]


def command(
    base: shared.Base,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    prompt: shared.Prompt = None,
    adapter: Annotated[list[str] | None, typer.Option(help="FILE or FILE:SCALE. May be given several times.")] = None,
    scale: shared.Scale = None,
    block_weights: shared.BlockWeights = None,
    embedding: shared.Embedding = None,
    negative: shared.Negative = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of each prompt's first picture; the next has the next.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures for each prompt.")] = 1,
    steps: shared.Steps = 25,
    guidance: shared.Guidance = 7.5,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the base's own.")] = None,
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that are there.")] = False,
) -> None:
    """Draw every prompt `count` times. Each PNG's text chunks say how to draw it again."""
    adapters, rules = [parse_adapter(text) for text in adapter or []], scale_rules(scale, block_weights)
    if size:
        parse_size(size)  # a typo is answered before anything is loaded
    prompts = prompts_or_pictures(prompt, image)
    pictures = picture_options(image, mask, strength, len(prompts))
    seeds = list(range(seed, seed + count))
    names = prompts if prompt else [path.stem for path in pictures.images]
    paths = [out / f"{index:03d}_{slug(text)}_seed{one}.png" for index, text in enumerate(names) for one in seeds]
    refuse_existing(paths, overwrite)

    keep_freed_blocks()
    with quick_imports():
        from lora_kit.cli.drawing import Wish, begin, facts_of, save_png
    from lora_kit.inference import SamplingSettings, generate
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
    scales = [option.scale for option in adapters]
    used = json.dumps([{"file": option.path.name, "scale": option.scale} for option in adapters])
    drawn = generate(prepared, prompts, seeds, scales, settings, progress, inputs)
    for picture, path in zip(drawn, paths, strict=True):
        facts = {
            "prompt": picture.prompt,
            "seed": str(picture.seed),
            "adapters": used,
            "prediction_type": prepared.bundle.prediction_type,
            **facts_of(base, settings, rules, tokens),
            **pictures.facts(),
        }
        save_png(picture.image, path, facts)
        typer.echo(str(path))


def slug(text: str) -> str:
    """A prompt as a part of a file's name: letters, digits and hyphens, at most 40."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:40] or "picture"
