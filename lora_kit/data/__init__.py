"""Pictures and captions: sources, the stream of samples, cached latents, loaders."""

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
