"""A base with live adapters, ready to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kit.adapters import AdapterState, apply_scales, family_of, load_adapter, read_raw
from lora_kit.adapters.state import adaptable_modules
from lora_kit.adapters.token_files import Embedding
from lora_kit.adapters.tokens import add_tokens, check_tokens
from lora_kit.inference.schedules import follow_schedules, settle_prediction
from lora_kit.inference.settings import SamplingSettings
from lora_kit.merging.other_family import fitted_to
from lora_kit.models import ModelBundle, base_hash, load_bundle
from lora_kit.models.first_stage import vae_factor
from lora_kit.recipe import ModelSection
from lora_kit.targeting import module_tree
from lora_kit.targeting.block_scales import check_depth, module_scales


class Prepared(NamedTuple):
    """A bundle whose adapters are injected."""

    bundle: ModelBundle
    adapters: tuple[str, ...]
    """Names of the adapters within the bundle, in the order of the files."""
    warnings: tuple[str, ...]
    shares: Mapping[str, float]
    """Adapted module → what every adapter's strength is multiplied by there."""


def prepare(
    base: str | ModelSection,
    files: Sequence[Path],
    dtype: torch.dtype | None = None,
    rules: Sequence[str] = (),
    embeddings: Sequence[Embedding] = (),
) -> Prepared:
    """Load `base` and put the adapter files' layers in, all at strength 1 until `scale_adapters`.

    On the GPU if there is one. `dtype` None: fp16 on a GPU, fp32 on a CPU; the VAE is fp32 always (SD's overflows
    in fp16). Warns about files that say they were trained on another family or base; that is allowed where the
    shapes fit. What a header says of prediction and zero terminal SNR is followed, with a warning, unless the
    base's section says what is predicted. `rules`: strengths per module for all files alike, `glob=number` or block
    weights (`targeting.block_scales`). embeddings: learned tokens that prompts may say, whatever the strengths.
    Raises ModelError, AdapterFileError, or RecipeError for a rule that is wrong or matches no adapted module.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    raws = [read_raw(path) for path in files]
    section = ModelSection(base=base) if isinstance(base, str) else base
    asked = section.prediction_type is not None
    section, warnings = settle_prediction(section, files, [raw.metadata for raw in raws])
    bundle = load_bundle(section, dtype or (torch.float16 if device == "cuda" else torch.float32))
    if bundle.prediction_type != (said := bundle.scheduler_config.get("prediction_type", "epsilon")):
        warnings.append(f"{section.base} says that it predicts {said}; drawn as {bundle.prediction_type}, as asked")
    modules = adaptable_modules(bundle.components)
    called, family = section.base, bundle.family.name
    states = [fitted_to(path, raw, modules, called, family) for path, raw in zip(files, raws, strict=True)]
    warnings += _mismatches(files, states, bundle)
    shares = _shares(bundle, states, rules)
    warnings += follow_schedules(bundle, files, [state.metadata for state in states], asked)
    for network in bundle.networks:
        network.to(device)
    names = tuple(f"adapter_{index}" for index in range(len(files)))
    for name, state in zip(names, states, strict=True):
        load_adapter(bundle, state, name)
    _add_embeddings(bundle, embeddings)
    return Prepared(bundle, names, tuple(warnings), shares)


def _add_embeddings(bundle: ModelBundle, embeddings: Sequence[Embedding]) -> None:
    """Put tokens from files of their own in, one after the other, so that two of a name are refused."""
    for index, (token, vectors) in enumerate(embeddings):
        check_tokens(bundle, bundle.components, {token: vectors})
        add_tokens(bundle, bundle.components, f"embedding_{index}", {token: vectors})


def _shares(bundle: ModelBundle, states: Sequence[AdapterState], rules: Sequence[str]) -> dict[str, float]:
    """A rule has to match a module of one of the files, not of every one."""
    modules = [module.name for module in module_tree(bundle.components)]
    check_depth(modules, rules)
    return module_scales([name for name in modules if any(name in state.updates for state in states)], 1.0, rules)


def _mismatches(files: Sequence[Path], states: Sequence[AdapterState], bundle: ModelBundle) -> list[str]:
    """Where headers say that an adapter belongs to another base. Ask before anything is injected."""
    warnings: list[str] = []
    own_hash = ""
    for path, state in zip(files, states, strict=True):
        family, recorded = family_of(state.metadata), state.metadata.get("lora_kit.base_hash")
        if family is not None and family != bundle.family.name:
            warnings.append(f"{path}: was trained for {family}; this base is {bundle.family.name}")
        elif recorded:
            own_hash = own_hash or base_hash(bundle)
            if recorded != own_hash:
                warnings.append(
                    f"{path}: was trained on another base than {bundle.source} (or on the same in another "
                    "precision); its effect may differ"
                )
    return warnings


def default_settings(bundle: ModelBundle) -> SamplingSettings:
    """Pictures of the size the base was made for."""
    config: Any = bundle.unet.config
    side = int(config.sample_size or 64) * vae_factor(bundle)
    return SamplingSettings(width=side, height=side)


def scale_adapters(prepared: Prepared, scales: Sequence[float]) -> None:
    """Set each adapter's strength, in the order of the files, times the rules' numbers; 0 turns it off wholly."""
    apply_scales(
        prepared.bundle.components,
        {
            name: {module: scale * share for module, share in prepared.shares.items()}
            for name, scale in zip(prepared.adapters, scales, strict=True)
        },
    )
