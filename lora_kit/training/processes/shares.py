"""Which process does what after a step: with whole networks the main one measures and writes, while the others wait;
sharded networks run in all processes or in none, and still only the main one writes."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lora_kit.training.folder import RunFolder
from lora_kit.training.objects import Run

_MACHINES_OWN = {"model": {"base", "tokenizer"}, "data": {"sources", "cache_dir"}, "output_dir": True}
"""Paths may differ between machines; what is found there may not."""


def takes_part(run: Run) -> bool:
    """Whether this process runs validations and gathers checkpoints."""
    return run.accelerator.is_main_process or run.is_sharded


@contextmanager
def written_by_main(run: Run, folder: RunFolder) -> Generator[RunFolder]:
    """The run's folder in the main process. In others one that is gone afterwards: their pictures are the same."""
    if run.accelerator.is_main_process:
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        yield RunFolder(Path(place))


def common_facts(run: Run) -> dict[str, str]:
    """What must be the same in every process for their steps to be one step."""
    held_out = run.prepared.held_out
    recipe = run.recipe.model_dump_json(exclude=_MACHINES_OWN)
    return {
        "recipe": hashlib.sha256(recipe.encode()).hexdigest(),
        "targets": hashlib.sha256(json.dumps(run.plan_document).encode()).hexdigest(),
        "base": run.base_hash,
        "pictures or captions": run.data.fingerprint,
        "held-out pictures or captions": held_out.fingerprint if held_out is not None else "",
    }
