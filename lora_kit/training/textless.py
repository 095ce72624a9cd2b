"""Data for a model that reads no text: captions are not needed, and those that are there are ignored."""

from __future__ import annotations

from dataclasses import replace

from lora_kit.data import TrainingSet
from lora_kit.recipe import Recipe, SourceSection


def without_captions(recipe: Recipe) -> Recipe:
    """The recipe with a picture without caption as good as any, in all of its sources."""
    data = recipe.data.model_copy(update={"sources": [_captionless(source) for source in recipe.data.sources]})
    validation = recipe.validation
    if isinstance(validation.held_out, SourceSection):
        validation = validation.model_copy(update={"held_out": _captionless(validation.held_out)})
    return recipe.model_copy(update={"data": data, "validation": validation})


def ignore_captions(data: TrainingSet) -> None:
    """Take the captions from a data set's records, and say so once if there were any."""
    count = sum(bool(record.caption) for record in data.records)
    if count:
        data.notices.append(f"The base reads no text: the captions of {count} pictures are ignored.")
    data.records = [replace(record, caption="", captions=()) for record in data.records]


def _captionless(source: SourceSection) -> SourceSection:
    return source.model_copy(update={"caption_fallback": ""})
