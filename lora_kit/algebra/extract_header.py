"""The header of an extracted adapter."""

from __future__ import annotations

import json
from pathlib import Path

from lora_kit.adapters.formats.header import tool_version
from lora_kit.algebra.extract import Extracted, ExtractOptions
from lora_kit.algebra.lowrank_header import base_facts, network_facts


def extracted_metadata(found: Extracted, base: Path, tuned: Path, options: ExtractOptions) -> dict[str, str]:
    """What readers look up, and from what and how the adapter was made."""
    record = {
        "base": base.name,
        "tuned": tuned.name,
        "rank": options.budget.rank,
        "keep": options.budget.keep,
        "seed": options.seed,
    }
    own = {"lora_kit.extracted": json.dumps(record, sort_keys=True), "lora_kit.version": tool_version()}
    title = {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": tuned.stem}
    return dict(sorted((base_facts(found.family) | network_facts(found.updates) | title | own).items()))
