"""Pictures and captions: sources, the stream of samples, cached latents, loaders.

Names are imported when they are first used (PEP 562): `lora-kit plan` reads records and sizes alone, and needs no
torch, whose import takes longer than all of a plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kit.first_use import imported_on_first_use

if TYPE_CHECKING:
    from lora_kit.data.batch import Batch
    from lora_kit.data.latents import cache_latents
    from lora_kit.data.loader import make_batch_loader, make_loader, process_share
    from lora_kit.data.records import Flaw, Record, Records
    from lora_kit.data.sampler import Share, StepSampler, micro_batches
    from lora_kit.data.samples import KeptLatents, Latent, Sample, collate
    from lora_kit.data.scan import check_pictures
    from lora_kit.data.sources import count_records, open_records
    from lora_kit.data.training_set import TrainingSet, open_training_set, plain_section

__all__ = [
    "Batch",
    "Flaw",
    "KeptLatents",
    "Latent",
    "Record",
    "Records",
    "Sample",
    "Share",
    "StepSampler",
    "TrainingSet",
    "cache_latents",
    "check_pictures",
    "collate",
    "count_records",
    "make_batch_loader",
    "make_loader",
    "micro_batches",
    "open_records",
    "open_training_set",
    "plain_section",
    "process_share",
]

_HOMES = {
    "Batch": "batch",
    "Flaw": "records",
    "KeptLatents": "samples",
    "Latent": "samples",
    "Record": "records",
    "Records": "records",
    "Sample": "samples",
    "Share": "sampler",
    "StepSampler": "sampler",
    "TrainingSet": "training_set",
    "cache_latents": "latents",
    "check_pictures": "scan",
    "collate": "samples",
    "count_records": "sources",
    "make_batch_loader": "loader",
    "make_loader": "loader",
    "micro_batches": "sampler",
    "open_records": "sources",
    "open_training_set": "training_set",
    "plain_section": "training_set",
    "process_share": "loader",
}

__getattr__ = imported_on_first_use(__name__, _HOMES)
