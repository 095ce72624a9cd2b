"""What a PEFT config says about the tensors beside it: alpha and rank of each module, and which method they are.

Both PEFT's `adapter_config.json` and the header of diffusers' files hold such a config. Values per module are found
by PEFT's own rule (`peft.utils.other.get_pattern_key`): each key of a pattern is a regular expression for the end of
a module's name, from a dot on, and the first that matches decides.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from lora_kit.errors import AdapterFileError

METHODS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
_ELSEWHERE = {
    "OFT": "PEFT's OFT turns the inputs, LyCORIS's the outputs of a layer",
    "BOFT": "PEFT's BOFT turns the inputs, LyCORIS's the outputs of a layer",
    "IA3": "PEFT's IA3 scales the bias too and is stored as the factor itself, LyCORIS's as factor − 1",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_REFUSED = (
    "lora_bias",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
    "target_parameters",
    "trainable_token_indices",
    "modules_to_save",
)
"""Options that make more of an adapter than ΔW = scale · up · down, so that the rest of it would be lost."""
_Number = TypeVar("_Number", int, float)

_MAX_PATTERNS = 1 << 12
_MAX_PATTERN_LENGTH = 1 << 10
_MAX_GROUPS = 2
# A hostile expression can take exponential time: repeated groups, back references and look-around are not needed.
_COSTLY = re.compile(r"\)[*+{]|\\\d|\(\?(?!:)")
_START = r"(.*\.)?"
_EFFORT = (1, 50, 5000)
"""By the count of repeats in an expression: how many of the shortest matches a failing one on a long name is worth."""
_MAX_EFFORT = 10_000_000


@dataclass(frozen=True)
class PeftRules:
    """One component's config, as far as it changes what the tensors mean."""

    method: str
    """`lora`, `loha` or `lokr`."""
    rank: int | None
    alpha: float | None
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...] = ()
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...] = ()
    rslora: bool = False
    """Rank-stabilised: the scale is alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732)."""

    def rank_of(self, module: str) -> int | None:
        """The rank that the config gives the module (name without the component); None if it says none."""
        return next((rank for pattern, rank in self.rank_pattern if pattern.match(module)), self.rank)

    def alpha_of(self, module: str, rank: int) -> float | None:
        """Alpha such that the scale is alpha / rank, whatever the config calls it; None if it says none."""
        alpha = next((alpha for pattern, alpha in self.alpha_pattern if pattern.match(module)), self.alpha)
        return alpha if alpha is None or not self.rslora else alpha * math.sqrt(rank)

    def disagreements(self, ranks: Mapping[str, int]) -> list[str]:
        """Modules whose tensors have another rank than the config says: PEFT would not load them either."""
        said = {module: self.rank_of(module) for module in ranks}
        return [
            f"{module}: its tensors have rank {rank}, its config says {said[module]}"
            for module, rank in ranks.items()
            if said[module] not in (None, rank)
        ]


def rules_from(config: Mapping[str, Any], source: str) -> PeftRules:
    """Rules of one config.

    source: what to call it in a message. Raises AdapterFileError for a config whose tensors mean something else
    than lora_kit can hold, or whose values are of the wrong kind.
    """
    kind = config.get("peft_type") or "LORA"
    if kind not in METHODS:
        why = f" ({_ELSEWHERE[str(kind)]})" if str(kind) in _ELSEWHERE else ""
        raise AdapterFileError(f"{source}: PEFT's {str(kind)[:40]} cannot be read{why}; allowed: {', '.join(METHODS)}.")
    _refuse_extras(config, source)
    return PeftRules(
        METHODS[kind],
        _rank(config.get("r"), source),
        _alpha(config.get("lora_alpha" if kind == "LORA" else "alpha"), source),
        _patterns(config, "rank_pattern", _rank, source),
        _patterns(config, "alpha_pattern", _alpha, source),
        bool(config.get("use_rslora")),
    )


def json_object(text: str | bytes, source: str) -> dict[str, Any]:
    """JSON text → object. Raises AdapterFileError naming `source`."""
    value = _json(text, source)
    if not isinstance(value, dict):
        raise AdapterFileError(f"{source} is not a JSON object")
    return cast("dict[str, Any]", value)


def json_list(text: str, source: str) -> list[Any]:
    """JSON text → list. Raises AdapterFileError naming `source`."""
    value = _json(text, source)
    if not isinstance(value, list):
        raise AdapterFileError(f"{source} is not a JSON list")
    return cast("list[Any]", value)


def _json(text: str | bytes, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{source} is not JSON ({error})") from error


def check_effort(rules: Iterable[PeftRules], modules: int, source: str) -> None:
    """Bound the time that matching takes. Raises AdapterFileError."""
    patterns = [pattern for one in rules for pattern, _ in (*one.rank_pattern, *one.alpha_pattern)]
    effort = modules * sum(_EFFORT[_repeats(pattern.pattern) - _OWN_REPEATS] for pattern in patterns)
    if effort > _MAX_EFFORT:
        raise AdapterFileError(
            f"{source}: has {len(patterns)} patterns for {modules} modules; matching them would take for ever"
        )


def _refuse_extras(config: Mapping[str, Any], source: str) -> None:
    found = [name for name in _REFUSED if config.get(name)]
    if config.get("bias") not in (None, "none"):
        found.append("bias")
    if found:
        raise AdapterFileError(
            f"{source}: uses {', '.join(found)}; lora_kit reads updates of weights only, and would lose that part. "
            "Merge it into its base with PEFT instead."
        )
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGED_BASE):
        raise AdapterFileError(
            f"{source}: init_lora_weights is {start[:40]!r}, which changed the base's own weights, so the file is no "
            "update of the base. Save it with PEFT's path_initial_model_for_weight_conversion."
        )


def _patterns(
    config: Mapping[str, Any], name: str, convert: Callable[[Any, str], _Number | None], source: str
) -> tuple[tuple[re.Pattern[str], _Number], ...]:
    found = config.get(name) or {}
    if not isinstance(found, dict) or len(cast("dict[str, Any]", found)) > _MAX_PATTERNS:
        raise AdapterFileError(f"{source}: {name} is no object of at most {_MAX_PATTERNS} entries")
    entries = cast("dict[str, Any]", found)
    converted = {key: convert(value, source) for key, value in entries.items()}
    return tuple((_compiled(key, name, source), value) for key, value in converted.items() if value is not None)


def _compiled(key: str, name: str, source: str) -> re.Pattern[str]:
    costly = _repeats(key) >= len(_EFFORT) or key.count("(") > _MAX_GROUPS or _COSTLY.search(key)
    if len(key) > _MAX_PATTERN_LENGTH or costly:
        raise AdapterFileError(f"{source}: {name} has an expression that could take for ever: {key[:60]!a}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what `[[` may mean one day; PEFT takes it as it is
            return re.compile(f"{_START}({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterFileError(f"{source}: {name} has no regular expression: {key[:60]!a} ({error})") from error


def _repeats(expression: str) -> int:
    return sum(expression.replace("(?:", "(").count(mark) for mark in "*+{?")


_OWN_REPEATS = _repeats(_START)


def _rank(value: Any, source: str) -> int | None:
    if value is None or (type(value) is int and 0 < value < 1 << 31):
        return value
    raise AdapterFileError(f"{source}: a rank is {ascii(value)[:60]}; allowed: whole numbers from 1 on")


def _alpha(value: Any, source: str) -> float | None:
    if value is None:
        return None
    # Bounded before it is converted: float() raises for an integer above 1.8e308.
    if type(value) in (int, float) and abs(value) < 1e30:  # NaN is not less than it either
        return float(value)
    raise AdapterFileError(f"{source}: an alpha is {ascii(value)[:60]}; allowed: finite numbers")
