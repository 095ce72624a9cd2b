"""The cache on disk: what the VAE and the text encoder made of pictures and captions, once and for all runs."""

from lora_kit.data.cache.fill import (
    Encode,
    Filled,
    FillShare,
    LatentJob,
    TextEncode,
    fill_latents,
    fill_texts,
    missing_pictures,
)
from lora_kit.data.cache.hints import PictureHints
from lora_kit.data.cache.keys import View, latent_key, text_key
from lora_kit.data.cache.latents import DiskLatents, DiskTexts
from lora_kit.data.cache.maintenance import Pruning, Verified, plan_pruning, prune, verify_hints, verify_store
from lora_kit.data.cache.pictures import Views, known_size, read_facts, survey
from lora_kit.data.cache.store import CacheStore
from lora_kit.data.cache.views import Facts, SectionViews, render, view_of

__all__ = [
    "CacheStore",
    "DiskLatents",
    "DiskTexts",
    "Encode",
    "Facts",
    "FillShare",
    "Filled",
    "LatentJob",
    "PictureHints",
    "Pruning",
    "SectionViews",
    "TextEncode",
    "Verified",
    "View",
    "Views",
    "fill_latents",
    "fill_texts",
    "known_size",
    "latent_key",
    "missing_pictures",
    "plan_pruning",
    "prune",
    "read_facts",
    "render",
    "survey",
    "text_key",
    "verify_hints",
    "verify_store",
    "view_of",
]
