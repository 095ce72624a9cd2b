"""What `generate` and `grid` share. Import it only when a command runs: it imports torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_kit.adapters.token_files import read_embedding
from lora_kit.cli.options import AdapterOption, DtypeName, parse_size, torch_dtype
from lora_kit.cli.picture_options import PictureOptions
from lora_kit.errors import RecipeError
from lora_kit.files import write_atomically
from lora_kit.inference import Prepared, SamplingSettings, default_settings, prepare
from lora_kit.inference.reading import read_inputs
from lora_kit.inference.sampling import check_prompts
from lora_kit.inference.starts import Inputs
from lora_kit.recipe import ModelSection


class Wish(NamedTuple):
    """What the two commands are asked for alike."""

    base: ModelSection
    adapters: Sequence[AdapterOption]
    dtype: DtypeName | None
    rules: Sequence[str]
    embeddings: Sequence[str]
    prompt: Sequence[str] | None
    """As given: a base without text takes none."""
    pictures: PictureOptions
    size: str | None


class Begun(NamedTuple):
    """A base that is ready to draw, and what with."""

    prepared: Prepared
    settings: SamplingSettings
    inputs: Inputs


def begin(wish: Wish, asked: SamplingSettings) -> Begun:
    """Read the pictures, load the base with adapters and learned tokens, and fit all to each other; warnings go to
    stderr. Raises RecipeError for what the base cannot draw."""
    given = wish.pictures
    inputs = read_inputs(given.images, given.masks) if given.images else None
    tokens = [read_embedding(Path(file), token) for token, file in map(_token_and_file, wish.embeddings)]
    dtype = torch_dtype(wish.dtype) if wish.dtype else None
    prepared = prepare(wish.base, [option.path for option in wish.adapters], dtype, wish.rules, tokens)
    for warning in prepared.warnings:
        typer.echo(f"warning: {warning}", err=True)
    inputs = _fitted_inputs(prepared, wish.prompt, inputs)
    settings = _settings_for(prepared, wish.size, asked, inputs)
    _warn_of_long_prompts(prepared, [*(wish.prompt or ()), asked.negative_prompt], settings)
    return Begun(prepared, settings, inputs)


def _token_and_file(text: str) -> tuple[str, str]:
    """`FILE` or `TOKEN=FILE`; a file of that whole name goes first."""
    token, equals, file = text.partition("=")
    return (token, file) if equals and not Path(text).exists() else ("", text)


def _fitted_inputs(prepared: Prepared, prompt: Sequence[str] | None, inputs: Inputs) -> Inputs:
    """The pictures as the base takes them. Raises RecipeError for those it cannot take, and where it needs a prompt."""
    bundle = prepared.bundle
    if bundle.has_text and not prompt:
        raise RecipeError(f"{bundle.source} reads text: say what to draw with --prompt (an empty one is --prompt '')")
    if prompt:
        check_prompts(bundle, prompt)
    return None if inputs is None else [bundle.family.fitted_input(bundle, one) for one in inputs]


def _settings_for(
    prepared: Prepared, size: str | None, asked: SamplingSettings, inputs: Inputs = None
) -> SamplingSettings:
    """`asked`, in `size`, or in the size that comes of the first input, or in the size the base was made for."""
    bundle = prepared.bundle
    default = default_settings(bundle)
    own = bundle.family.drawn_size(bundle, inputs[0].image.size) if inputs else (default.width, default.height)
    width, height = parse_size(size) if size else own
    return replace(asked, width=width, height=height)


def _warn_of_long_prompts(prepared: Prepared, prompts: Sequence[str], settings: SamplingSettings) -> None:
    """Say on stderr which prompts are longer than the text encoder reads, unless they are encoded in chunks."""
    bundle = prepared.bundle
    if settings.long_prompts == "chunks":
        return
    for prompt in dict.fromkeys(prompts):
        if bundle.family.truncated(bundle, [prompt]):
            typer.echo(
                f"warning: the text encoder reads only the beginning of {prompt!r}: it is too long. "
                "--long-prompts chunks reads all of it.",
                err=True,
            )


def save_png(image: Image.Image, path: Path, facts: dict[str, str]) -> None:
    """Write a PNG atomically, `facts` as its text chunks."""
    chunks = PngInfo()
    for key, value in facts.items():
        chunks.add_itxt(key, value)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=chunks))


def facts_of(
    base: str, settings: SamplingSettings, rules: Sequence[str] = (), embeddings: Sequence[str] = ()
) -> dict[str, str]:
    """What every picture of a command has in common, for its PNG."""
    return {
        "base": base,
        "negative_prompt": settings.negative_prompt,
        "steps": str(settings.steps),
        "guidance": f"{settings.guidance:g}",
        "sampler": settings.sampler,
        **({"eta": f"{settings.eta:g}"} if settings.eta else {}),
        "size": f"{settings.width}x{settings.height}",
        "long_prompts": settings.long_prompts,
        **({"scale_rules": json.dumps(rules)} if rules else {}),
        **({"embeddings": json.dumps([_shown_embedding(text) for text in embeddings])} if embeddings else {}),
    }


def _shown_embedding(text: str) -> str:
    """The option without the folder."""
    token, file = _token_and_file(text)
    return f"{token}={Path(file).name}" if token else Path(file).name
