"""The header of an extracted adapter."""

from __future__ import annotations

import json
from pathlib import Path

from lora_kit.adapters.formats.header import tool_version
from lora_kit.adapters.formats.objective_header import SCHEDULER_KEY
from lora_kit.algebra.extract import Extracted, ExtractOptions
from lora_kit.algebra.lowrank_header import base_facts, network_facts
from lora_kit.merging.base import open_base
from lora_kit.merging.schedule import said_schedule
from lora_kit.models.schedules import ZERO_TERMINAL_SNR


def extracted_metadata(found: Extracted, base: Path, tuned: Path, options: ExtractOptions) -> dict[str, str]:
    """What readers look up, and from what and how the adapter was made."""
    schedule = said_schedule(open_base(tuned)) or said_schedule(open_base(base)) or {}
    predicts = schedule.get("prediction_type", "epsilon") if schedule else None
    record = {
        "base": base.name,
        "tuned": tuned.name,
        "rank": options.budget.rank,
        "keep": options.budget.keep,
        "seed": options.seed,
    }
    own = {"lora_kit.extracted": json.dumps(record, sort_keys=True), "lora_kit.version": tool_version()}
    title = {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": tuned.stem}
    if predicts:
        zero = ZERO_TERMINAL_SNR if schedule.get("rescale_betas_zero_snr") else {}
        own[SCHEDULER_KEY] = json.dumps({"prediction_type": predicts, **zero}, sort_keys=True)
    return dict(sorted((base_facts(found.family, predicts) | network_facts(found.updates) | title | own).items()))
