"""The header of an adapter file: what sd-scripts' readers expect (`ss_*`, `modelspec.*`), and our own facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath

from lora_kit.adapters.formats.objective_header import modelspec_prediction, objective_metadata
from lora_kit.recipe import ObjectiveSection, Recipe, SourceSection, dump_recipe

LEFT_OUT = "(left out)"

# (family, v-prediction) → sd-scripts' name of the base, and the architecture of the ModelSpec (1.0.1).
_BASES = {
    ("sd1", False): ("sd_v1", "stable-diffusion-v1/lora"),
    ("sd1", True): ("sd_v1_v", "stable-diffusion-v1/lora"),
    ("sd2", False): ("sd_v2", "stable-diffusion-v2-512/lora"),
    ("sd2", True): ("sd_v2_v", "stable-diffusion-v2-768-v/lora"),
}
INPAINTING = "-inpainting"
"""Behind a family's name. Other tools know no name for these: the file is loaded as the plain family's, whose module
names it has; `lora_kit.family` tells them apart."""


@dataclass(frozen=True, kw_only=True)
class CaptionFacts:
    """What `save.captions: true` publishes about the training set."""

    tag_frequency: Mapping[str, Mapping[str, int]]
    """Folder name → caption tag → how often."""
    dataset_dirs: Mapping[str, Mapping[str, int]]
    """Folder name → {"n_repeats": …, "img_count": …}."""


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """Plain values that describe a run. No time stamp unless `date` is given: equal runs make equal files."""

    family: str
    """`sd1` or `sd2`; another name is written as it is."""
    prediction_type: str
    """`epsilon`, `v_prediction` or `sample`."""
    recipe: str
    """The resolved recipe, YAML, as `public_recipe` makes it."""
    plan: str
    """The resolved plan, JSON."""
    base_hash: str
    base_name: str
    output_name: str
    learning_rate: float
    text_encoder_lr: float | None = None
    """None: the text encoder is not trained."""
    rank: int
    """The most frequent rank of the plan, for readers that know one number only."""
    alpha: float
    """The alpha that goes with `rank`."""
    methods: tuple[str, ...] = ("lora",)
    """The plan's, each once."""
    resolution: int
    """Side of the training pictures, pixels."""
    train_images: int
    epoch: int
    step: int
    """Optimizer steps done."""
    max_steps: int
    seed: int
    trigger: str = ""
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    scheduler: Mapping[str, object] = field(default_factory=dict[str, object])
    """What a sampler's config must have for the adapter: prediction_type, and more where the schedule was changed."""
    captions: CaptionFacts | None = None
    """None: nothing of the captions or folder names is written."""
    date: str | None = None
    """ISO 8601."""


def training_metadata(facts: TrainingFacts) -> dict[str, str]:
    """The header's metadata: strings only, sorted by key.

    Keys as in sd-scripts' train_network.py and the ModelSpec 1.0.1; ours start with `lora_kit.`.
    """
    told = objective_metadata(facts.objective, facts.scheduler)
    return dict(sorted((_ss(facts) | _modelspec(facts) | _own(facts) | told).items()))


def _ss(facts: TrainingFacts) -> dict[str, str]:
    sd_name, _ = _base_names(facts)
    values: dict[str, object] = {
        "ss_base_model_version": sd_name,
        "ss_v2": facts.family.removesuffix(INPAINTING) == "sd2",
        "ss_sd_model_name": facts.base_name,
        **_network(facts.methods),
        "ss_network_dim": facts.rank,
        "ss_network_alpha": facts.alpha,
        "ss_learning_rate": facts.learning_rate,
        "ss_unet_lr": facts.learning_rate,
        "ss_text_encoder_lr": facts.text_encoder_lr,
        "ss_resolution": f"({facts.resolution}, {facts.resolution})",
        "ss_num_train_images": facts.train_images,
        "ss_epoch": facts.epoch,
        "ss_steps": facts.step,
        "ss_max_train_steps": facts.max_steps,
        "ss_seed": facts.seed,
        "ss_output_name": facts.output_name,
    }
    if facts.captions is not None:
        values["ss_tag_frequency"] = _json(facts.captions.tag_frequency)
        values["ss_dataset_dirs"] = _json(facts.captions.dataset_dirs)
    return {key: str(value) for key, value in values.items()}


def _network(methods: tuple[str, ...]) -> dict[str, object]:
    """sd-scripts' module and arguments; LyCORIS's where the file holds more than LoRA. It names one algorithm, and
    loads what others the keys tell."""
    if set(methods) <= {"lora", "rslora"}:
        return {"ss_network_module": "networks.lora"}
    named = next((method for method in methods if method not in ("lora", "rslora")), "lora")
    algorithm = {"dora": "lora", "diff": "full", "oft": "diag-oft"}.get(named, named)
    arguments = {"algo": algorithm} | ({"dora_wd": "True"} if "dora" in methods else {})
    return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}


def _json(value: Mapping[str, Mapping[str, int]]) -> str:
    return json.dumps({key: dict(inner) for key, inner in value.items()}, sort_keys=True, ensure_ascii=False)


def _modelspec(facts: TrainingFacts) -> dict[str, str]:
    _, architecture = _base_names(facts)
    values = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": facts.output_name,
        "modelspec.resolution": f"{facts.resolution}x{facts.resolution}",
        "modelspec.prediction_type": modelspec_prediction(facts.prediction_type),
    }
    if facts.trigger:
        values["modelspec.trigger_phrase"] = facts.trigger
    if facts.date is not None:
        values["modelspec.date"] = facts.date
    return values


def _own(facts: TrainingFacts) -> dict[str, str]:
    return {
        "lora_kit.version": tool_version(),
        "lora_kit.family": facts.family,
        "lora_kit.base_hash": facts.base_hash,
        "lora_kit.recipe": facts.recipe,
        "lora_kit.plan": facts.plan,
        "lora_kit.trigger": facts.trigger,
    }


def _base_names(facts: TrainingFacts) -> tuple[str, str]:
    return base_names(facts.family, facts.prediction_type == "v_prediction")


def base_names(family: str, predicts_v: bool) -> tuple[str, str]:
    """sd-scripts' name of the base, and the ModelSpec's architecture; an inpainting model's are its generation's, and
    other families' their name as it is."""
    return _BASES.get((family.removesuffix(INPAINTING), predicts_v), (family, f"{family}/lora"))


def tool_version() -> str:
    """lora_kit's version; `unknown` when it runs from a folder that was never installed."""
    try:
        return version("lora_kit")
    except PackageNotFoundError:
        return "unknown"


def public_recipe(recipe: Recipe, folder_names: bool) -> str:
    """The recipe as YAML for a file that will be shared: no path of this machine.

    Absolute paths shrink to their last name; without `folder_names` (`save.captions: false`) the data sources'
    paths are left out altogether.
    """
    held_out = recipe.validation.source
    measured = {"held_out": _shared_source(held_out, folder_names)} if held_out else {}
    shared = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(
                update={
                    "base": _last_name(recipe.model.base),
                    "adapter": recipe.model.adapter and _last_name(recipe.model.adapter),
                }
            ),
            "output_dir": _last_name(recipe.output_dir),
            "data": recipe.data.model_copy(
                update={"sources": [_shared_source(source, folder_names) for source in recipe.data.sources]}
            ),
            "validation": recipe.validation.model_copy(update=measured),
            # May hold keys and names of people.
            "train": recipe.train.model_copy(update={"tracker_options": {}}),
        }
    )
    return dump_recipe(shared)


def _shared_source(source: SourceSection, folder_names: bool) -> SourceSection:
    paths = {"path": source.path, "metadata_file": source.metadata_file, "mask_folder": source.mask_folder}
    shared = {name: _last_name(path) if folder_names else LEFT_OUT for name, path in paths.items() if path is not None}
    return source.model_copy(update=shared)


def _last_name(path: str) -> str:
    return PurePath(path).name if PurePath(path).is_absolute() else path
