"""What a run leaves: adapter.safetensors, or a diffusers folder after a full fine-tune."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora_kit.adapters import (
    AdapterState,
    CaptionFacts,
    TrainingFacts,
    adapter_state,
    public_recipe,
    training_metadata,
    write_adapter,
)
from lora_kit.adapters.formats.header import tool_version
from lora_kit.adapters.token_files import write_embedding
from lora_kit.files import sync_folder, sync_tree
from lora_kit.models import pipeline
from lora_kit.models.pipeline_index import parts_of
from lora_kit.recipe.tokens import file_stem
from lora_kit.targeting import plan_to_json
from lora_kit.targeting.rates import rate_of_text_encoder
from lora_kit.training.folder import RunFolder
from lora_kit.training.objective import schedule_facts
from lora_kit.training.objects import ADAPTER, Run
from lora_kit.training.precision import DTYPES
from lora_kit.training.prepared import visiting
from lora_kit.training.processes.sharding import whole_network

SAVE_DTYPES = {**DTYPES, "fp32": DTYPES["no"]}


def write_result(run: Run, folder: RunFolder, step: int, beside: bool = False) -> list[Path]:
    """Write the run's result, and beside it the moving average where the recipe keeps one; return their paths.

    step: whose weights are in the networks. beside: under the names of the best, next to the last's.
    """
    written: list[Path] = []
    for average in (False, True) if run.average.is_moving else (False,):
        marks = [*(["best"] if beside else []), *(["ema"] if average else [])]
        with run.average.final(moving=average):
            if run.is_full:
                written.append(folder.root / "_".join(["model", *marks]))
                _write_model(run, written[-1])
                continue
            parts = _adapter_parts(run, folder, marks, step)
        written += parts
    return written


def _adapter_parts(run: Run, folder: RunFolder, marks: list[str], step: int) -> list[Path]:
    """Write adapter and learned tokens, as far as there are any, with the weights that are in the networks now."""
    written: list[Path] = []
    weights = run.average.describe(moving="ema" in marks)
    if run.has_adapter:
        suffix = "" if run.layout == "peft" else ".safetensors"
        written.append(folder.root / f"{'.'.join(['adapter', *marks])}{suffix}")
    if run.tokens is not None:
        place = folder.root / ".".join(["embeddings", *marks])
        written += [place / f"{file_stem(token)}.safetensors" for token in run.tokens.sizes]
    if run.accelerator.is_main_process:
        if run.has_adapter:
            _write_adapter(run, written[0], step, weights)
        if run.tokens is not None:
            for path, embedding in zip(written[run.has_adapter :], run.tokens.embeddings(), strict=True):
                write_embedding(
                    path, embedding, _token_facts(run, embedding.token, step) | {"lora_kit.weights": weights}
                )
    return written


def _token_facts(run: Run, token: str, step: int) -> dict[str, str]:
    """An embedding file's header."""
    return {
        "lora_kit.version": tool_version(),
        "lora_kit.token": token,
        "lora_kit.base_hash": run.base_hash,
        "lora_kit.family": run.bundle.family.name,
        "lora_kit.step": str(step),
    }


def training_facts(run: Run, step: int) -> TrainingFacts:
    """What the adapter's header says of the run."""
    plan = run.plan
    # How the run was started is no part of what it made: a resumed run writes the same file.
    recipe = run.recipe.model_copy(
        update={"train": run.recipe.train.model_copy(update={"resume": None, "overwrite": False})}
    )
    trains_text = any(target.module.component == "text_encoder" for target in plan.targets)
    (rank, alpha), _ = Counter((target.rank, target.effective_alpha) for target in plan.targets).most_common(1)[0]
    return TrainingFacts(
        family=run.bundle.family.name,
        prediction_type=run.bundle.prediction_type,
        objective=recipe.objective,
        scheduler=schedule_facts(run.bundle),
        recipe=public_recipe(recipe, folder_names=recipe.save.captions),
        plan=json.dumps(plan_to_json(plan), sort_keys=True),
        base_hash=run.base_hash,
        base_name=Path(recipe.model.base).name,
        output_name=Path(recipe.output_dir).name,
        learning_rate=recipe.optimizer.lr,
        text_encoder_lr=rate_of_text_encoder(recipe.optimizer) if trains_text else None,
        rank=rank,
        alpha=alpha,
        methods=tuple(sorted({target.method for target in plan.targets})),
        resolution=recipe.data.resolution,
        train_images=run.data.record_count,
        epoch=run.data.order.epochs_before(step),
        step=step,
        max_steps=recipe.train.max_steps,
        seed=recipe.seed,
        trigger=recipe.data.trigger,
        captions=_caption_facts(run) if recipe.save.captions else None,
    )


def _write_adapter(run: Run, path: Path, step: int, weights: str) -> None:
    updates = adapter_state(run.bundle.components, ADAPTER)
    metadata = training_metadata(training_facts(run, step)) | {"lora_kit.weights": weights}
    embeddings: dict[str, Tensor] = {}
    if run.tokens is not None:
        metadata["lora_kit.tokens"] = json.dumps(run.tokens.sizes, sort_keys=True)
        if run.recipe.save.bundle_tokens:
            embeddings = dict(run.tokens.embeddings())
    if run.quantised is not None:  # the hash is of the true base
        metadata["lora_kit.base_quantized"] = run.quantised.kind
    state = AdapterState(updates, dict(sorted(metadata.items())), embeddings)
    write_adapter(path, state, run.layout, _dtype(run))


def _caption_facts(run: Run) -> CaptionFacts:
    """Comma-separated tags and their counts, as sd-scripts writes them, under the run's one set."""
    captions = run.data.captions()
    tags = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
    # The sources as they were read: those of a data-set TOML, and with the repeats that weights came to.
    names = [Path(source.path).name for source in run.data.section.sources]
    # Two folders that are called alike get their numbers behind their names, as in the records' ids.
    names = [f"{name}@{index}" if names.count(name) > 1 else name for index, name in enumerate(names)]
    directories: dict[str, dict[str, int]] = {}
    for record in run.data.records:
        own = directories.setdefault(names[record.source], {"n_repeats": 0, "img_count": 0})
        own["n_repeats"] = max(own["n_repeats"], record.repeats)
        own["img_count"] += 1
    return CaptionFacts(tag_frequency={"+".join(directories): dict(tags)}, dataset_dirs=directories)


def _dtype(run: Run) -> torch.dtype:
    return SAVE_DTYPES[run.recipe.save.dtype]


def _write_model(run: Run, path: Path) -> None:
    """The whole base with its trained networks, in `save.dtype`, as a diffusers folder. Every process takes part in
    gathering sharded networks, and the main one writes."""
    keeps = run.accelerator.is_main_process
    with visiting(run.bundle):
        parts = {**run.bundle.components, "vae": run.bundle.vae}  # cast copies: figures are of the weights as trained
        networks = {name: whole_network(network, keeps, _dtype(run)) for name, network in parts.items()}
    if not keeps:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe = pipeline(replace(run.bundle, **networks))
    if run.bundle.has_text:
        # As read: not with the padding of the last batch.
        pipe.tokenizer.backend_tokenizer.no_padding()
        pipe.tokenizer.backend_tokenizer.no_truncation()
    pipe.save_pretrained(temporary, safe_serialization=True)
    if run.bundle.has_text:
        folder = parts_of(run.bundle.family.pipeline_name)["text_encoder"].folder
        _name_no_half_precision(temporary / folder / "config.json")
    sync_tree(temporary)
    if path.exists():
        shutil.rmtree(path)
    temporary.rename(path)
    sync_folder(path.parent)


def _name_no_half_precision(config: Path) -> None:
    """transformers holds a text encoder as its config says, diffusers a U-Net in fp32 unless told: a folder of fp16
    files whose config names fp16 cannot be sampled without naming a dtype. Stable Diffusion's own say fp32."""
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
