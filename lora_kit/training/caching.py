"""What a run keeps on disk: which entries a recipe needs, filling them, and reading them back.

A run opens its cache before adapters are injected, as they are no part of what the keys stand for, and before anything
is on the device: with every entry there, neither the VAE nor the text encoder is moved to it.
"""

from __future__ import annotations

import os
import zlib
from typing import NamedTuple

from accelerate import Accelerator

from lora_kit.data import TrainingSet, open_training_set, plain_section
from lora_kit.data.buckets import fills
from lora_kit.data.cache import (
    CacheStore,
    DiskLatents,
    DiskTexts,
    Encode,
    Facts,
    FillShare,
    LatentJob,
    PictureHints,
    SectionViews,
    TextEncode,
    fill_latents,
    fill_texts,
    known_size,
    read_facts,
    text_key,
)
from lora_kit.data.records import MAX_NAMED, Flaw, settle_flaws
from lora_kit.data.scan import tell_findings
from lora_kit.data.split import open_parted_sets
from lora_kit.models import ModelBundle
from lora_kit.models.fingerprints import text_encoder_fingerprint, tokenizer_fingerprint, vae_fingerprint
from lora_kit.models.first_stage import vae_factor
from lora_kit.progress import ProgressBar
from lora_kit.recipe import Recipe
from lora_kit.recipe.cache import cache_folder
from lora_kit.recipe.without_text import without_captions
from lora_kit.training.encoders import latent_encoder, load_encoders, text_encoder, trains_text_encoder

ENCODE_BATCH = 8
MOST_CAPTIONS = 16
"""A picture's captions are kept if there are no more: 3.6 MB of disk for SD 1.x in fp32."""


class Cache(NamedTuple):
    """A recipe's cache, open, with the fingerprints that its keys are made of."""

    store: CacheStore
    hints: PictureHints
    vae: str
    text_encoder: str
    tokenizer: str
    text_options: dict[str, str | int]
    """What else decides a caption's states."""
    keeps_texts: bool
    """Whether the text encoder is frozen, so that captions' states stay the same."""

    def text_key(self, caption: str) -> bytes:
        """The key of a caption's states."""
        return text_key(caption, self.text_encoder, self.tokenizer, self.text_options)


class FilledCache(NamedTuple):
    """What filling did for one data set, and how to read it."""

    latents: DiskLatents | None
    """None if the section crops at random."""
    texts: DiskTexts | None
    facts: list[Facts]
    """Of each record's picture; empty if `latents` is None."""
    encoded: int
    """Views of pictures that this process encoded."""
    captions_encoded: int


def open_cache(recipe: Recipe, bundle: ModelBundle, trains_text: bool) -> Cache:
    """The recipe's cache for these networks, before adapters are injected. Hashes the encoders: 1 s for SD 1.x."""
    folder = cache_folder(recipe.data)
    return Cache(
        store=CacheStore(folder),
        hints=PictureHints(folder),
        vae=vae_fingerprint(bundle),
        text_encoder=text_encoder_fingerprint(bundle) if bundle.has_text else "",
        tokenizer=tokenizer_fingerprint(bundle) if bundle.has_text else "",
        text_options={"autocast": recipe.train.mixed_precision, "long": recipe.data.captions.long},
        keeps_texts=bundle.has_text and not trains_text,
    )


def fill_cache(
    cache: Cache, data: TrainingSet, bundle: ModelBundle, accelerator: Accelerator, bar: ProgressBar
) -> FilledCache:
    """Encode and store what the cache lacks of a data set, shared among the launch's processes.

    Broken pictures are dropped from `data`, or named in a DataError, as `on_error` says. Afterwards every process
    sees every entry, and samples of `data` carry latents, unless the section crops at random.
    """
    facts, encoded = list[Facts](), 0
    if data.section.crop == "center":
        job = latent_job(cache, data, latent_encoder(bundle, accelerator.device))
        facts, own_keys, encoded = _fill_pictures(cache, data, job, accelerator, bar)
        data.latents = DiskLatents(cache.store, _keys_of_places(data, own_keys))
    texts = {caption: cache.text_key(caption) for caption in captions_of(data)} if cache.keeps_texts else {}
    encode = text_encoder(bundle, accelerator, data.section.captions.long)
    captions_encoded = _fill_texts(cache, texts, encode, accelerator, bar)
    return FilledCache(
        latents=data.latents if isinstance(data.latents, DiskLatents) else None,
        texts=DiskTexts(cache.store, texts) if texts else None,
        facts=facts,
        encoded=encoded,
        captions_encoded=captions_encoded,
    )


def wanted_keys(recipe: Recipe, bar: ProgressBar) -> set[bytes]:
    """The keys of all that a run of this recipe would read, whether or not it is there, for pruning.

    Loads VAE and text encoder for their fingerprints, and reads pictures that there is no hint for. Broken ones need
    nothing.
    """
    bundle = load_encoders(recipe)
    cache = open_cache(recipe, bundle, trains_text_encoder(recipe, bundle))
    wanted = set[bytes]()
    for data in data_sets(recipe, cache.hints, bar, vae_factor(bundle), bundle.has_text):
        if data.section.crop == "center":
            job = latent_job(cache, data, latent_encoder(bundle, bundle.vae.device))
            facts = read_facts(data.records, cache.hints, data.section.workers, bar)
            found = zip(data.records, facts, strict=True)
            wanted.update(key for record, fact in found if fact is not None for key in job.keys(record, fact))
        if cache.keeps_texts:
            wanted.update(map(cache.text_key, captions_of(data)))
    return wanted


def data_sets(
    recipe: Recipe, hints: PictureHints | None, bar: ProgressBar, latent_factor: int = 8, has_text: bool = True
) -> list[TrainingSet]:
    """The training set and, if there is one, the held-out set. Only with buckets, and only where there is no hint, are
    pictures' headers read. latent_factor: as TrainingSet's. has_text: whether the base reads captions."""
    if not has_text:
        sets = data_sets(without_captions(recipe), hints, bar, latent_factor)
        ignored = sum(data.ignore_captions() for data in sets)
        if ignored:
            sets[0].notices.append(f"The base reads no text: the captions of {ignored} pictures are ignored.")
        return sets
    held_out, split = recipe.validation.source, recipe.validation.split
    if split is not None:
        return open_parted_sets(recipe.data, split, recipe.seed, bar, hints, latent_factor)
    sections = [recipe.data, *([plain_section(recipe.data, [held_out])] if held_out else [])]
    known = known_size(hints) if hints else None
    return [
        open_training_set(section, recipe.seed, bar=bar, known=known, latent_factor=latent_factor)
        for section in sections
    ]


def captions_of(data: TrainingSet) -> list[str]:
    """Every caption that a sample may have, each once; without those of records that have too many.

    Shuffled tags give more captions than anyone could keep; such are encoded anew in each step.
    """
    captions = dict.fromkeys([""] if data.section.caption_dropout else [])
    for record in range(data.record_count):
        captions |= dict.fromkeys(data.possible_captions(record, MOST_CAPTIONS) or [])
    return list(captions)


def latent_job(cache: Cache, data: TrainingSet, encode: Encode) -> LatentJob:
    """What is stored of a data set's pictures."""
    section = data.section
    return LatentJob(
        views=SectionViews(section, data.latent_factor),
        encode=encode,
        vae=cache.vae,
        stored=section.cache_dtype,
        micro_batch=ENCODE_BATCH,
        workers=section.workers,
        raises=section.on_error == "raise",
    )


def _keys_of_places(data: TrainingSet, of_records: list[list[bytes]]) -> list[list[bytes]]:
    """Of each place, the key of the picture and, with `flip`, of its mirror image."""
    versions = 2 if data.section.flip else 1
    keys = [key for own in of_records for key in own]
    assert len(keys) == versions * len(data.places.record)
    return [keys[start : start + versions] for start in range(0, len(keys), versions)]


def _fill_pictures(
    cache: Cache, data: TrainingSet, job: LatentJob, accelerator: Accelerator, bar: ProgressBar
) -> tuple[list[Facts], list[list[bytes]], int]:
    """The facts and keys of the pictures that remain, and how many views this process encoded.

    Each process fills its share and then, once all have met, what is still missing: where they share no disk.
    """
    encoded, facts, keys = 0, list[Facts | None](), list[list[bytes] | None]()
    broken, notes = dict[int, str](), dict[int, str]()
    for share in _shares(accelerator):
        filled = fill_latents(cache.store, cache.hints, data.records, job, share, bar)
        facts, keys, broken = filled.facts, filled.keys, filled.broken
        encoded, notes = encoded + filled.encoded, notes | filled.notes
        flaws = [Flaw(data.records[index].id, reason) for index, reason in broken.items()]
        remaining = len(data.records) - len(flaws)
        settle_flaws(flaws, remaining, data.section.on_error, all_known=len(flaws) < MAX_NAMED)
        _meet(cache, accelerator)
    told = {data.records[index].id: note for index, note in notes.items() if index not in broken}
    data.drop(broken)
    data.checked = True
    whole = [fact for fact in facts if fact is not None]
    animated = [record.id for record, fact in zip(data.records, whole, strict=True) if fact.animated]
    enlarged = [
        record.id
        for index, (record, fact) in enumerate(zip(data.records, whole, strict=True))
        if not all(fills((fact.width, fact.height), size) for size in data.places.sizes_of(index))
    ]
    tell_findings(data, animated, enlarged, told)
    return whole, [own for own in keys if own is not None], encoded


def _fill_texts(
    cache: Cache, texts: dict[str, bytes], encode: TextEncode, accelerator: Accelerator, bar: ProgressBar
) -> int:
    encoded = 0
    for share in _shares(accelerator):
        part = list(texts.items())[share.rank :: share.world]
        encoded += fill_texts(cache.store, part, encode, ENCODE_BATCH, bar)
        _meet(cache, accelerator)
    return encoded


def _shares(accelerator: Accelerator) -> list[FillShare]:
    """One process alone begins somewhere of its own: another may be filling the same cache."""
    if accelerator.num_processes == 1:
        return [FillShare(start=zlib.crc32(str(os.getpid()).encode()) / 2**32)]
    return [FillShare(accelerator.process_index, accelerator.num_processes), FillShare()]


def _meet(cache: Cache, accelerator: Accelerator) -> None:
    accelerator.wait_for_everyone()
    cache.store.refresh()
    cache.hints.refresh()
