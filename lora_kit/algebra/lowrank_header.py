"""Headers of adapters that were made from other files: what readers look up, and what was done."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from lora_kit.adapters.formats.header import INPAINTING, base_names, tool_version
from lora_kit.adapters.formats.objective_header import modelspec_prediction
from lora_kit.adapters.updates import LoraUpdate, Update
from lora_kit.models.family.family_names import PIPELINE_FAMILIES

_BASE_KEYS = (
    "ss_base_model_version",
    "ss_v2",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "modelspec.architecture",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "lora_kit.family",
    "lora_kit.base_hash",
    "lora_kit.scheduler",
    "ss_zero_terminal_snr",
)
_STALE = ("lora_kit.plan", "sshs_model_hash", "sshs_legacy_hash", "lora_adapter_metadata", "ss_network_args")
"""Facts of the old ranks: the file written has others, and would be misread by them."""


def derived_metadata(
    sources: Sequence[Mapping[str, str]], updates: Mapping[str, Update], action: str, record: object
) -> dict[str, str]:
    """Metadata of a file made from files with the metadata `sources`.

    One source: all it says, but for what the new ranks make untrue. Several: what they agree on about the base.
    `record` goes in as JSON under `lora_kit.<action>`.
    """
    if len(sources) == 1:
        carried = {key: value for key, value in sources[0].items() if key not in _STALE}
    else:
        carried = {
            key: sources[0][key]
            for key in _BASE_KEYS
            if all(source.get(key) == sources[0].get(key) is not None for source in sources)
        }
    own = {f"lora_kit.{action}": json.dumps(record, sort_keys=True), "lora_kit.version": tool_version()}
    return dict(sorted((carried | network_facts(updates) | own).items()))


def network_facts(updates: Mapping[str, Update]) -> dict[str, str]:
    """sd-scripts' name of the network with its commonest rank and alpha, for readers that know one number only."""
    common = Counter((update.rank, update.alpha) for update in updates.values() if isinstance(update, LoraUpdate))
    if not common:
        return {}
    (rank, alpha), _ = common.most_common(1)[0]
    return {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}


def base_facts(family: str, predicts: str | None) -> dict[str, str]:
    """What readers are told of a base that is known by its modules (`sd1`, `sd2-inpainting`), and of what it predicts
    (None: it does not say, and then its name, which would say it too, is left out); nothing for unknown ones."""
    if family in PIPELINE_FAMILIES.values():
        return {"lora_kit.family": family}
    generation = family.removesuffix(INPAINTING)
    if generation not in ("sd1", "sd2"):
        return {}
    facts = {"ss_v2": str(generation == "sd2")} | ({} if family == generation else {"lora_kit.family": family})
    if predicts is None:
        return facts | {"modelspec.architecture": f"stable-diffusion-{generation.replace('sd', 'v')}/lora"}
    version, architecture = base_names(generation, predicts == "v_prediction")
    prediction = {"modelspec.prediction_type": modelspec_prediction(predicts)}
    return facts | {"ss_base_model_version": version, "modelspec.architecture": architecture} | prediction
