"""Alpha of each module of a file whose header or config holds PEFT's rules for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lora_kit.adapters.formats.layout import RawUpdate
from lora_kit.adapters.formats.peft_rules import PeftRules, check_effort
from lora_kit.errors import AdapterFileError

_SHOWN = 10
_RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""The parts whose first side is the rank."""
_PARTS_OF = {"lora": ("down", "up", "magnitude"), "loha": ("hada_",), "lokr": ("lokr_",)}
_MAGNITUDE = ".lora_magnitude_vector"


def alphas_of(
    updates: Mapping[str, RawUpdate], rules_for: Callable[[str], tuple[PeftRules | None, str]], source: str
) -> dict[str, float]:
    """The file's module spelling → alpha, for every module that a rule speaks of.

    rules_for: spelling → its component's rules, and its name without the component. source: what to call the config.
    Raises AdapterFileError listing every module whose tensors have another rank than the config says.
    """
    found: dict[str, float] = {}
    problems: list[str] = []
    rules = [rules_for(module)[0] for module in updates]
    check_effort({id(one): one for one in rules if one is not None}.values(), len(updates), source)
    for module, update in updates.items():
        rules_here, inner = rules_for(module)
        if rules_here is None:
            continue
        rank = _rank(update)
        problems += _problems(rules_here, inner, update, rank)
        alpha = None if rank is None else rules_here.alpha_of(inner, rank)
        if alpha is not None:
            found[module] = alpha
    if problems:
        more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listed = "\n  ".join(problems[:_SHOWN])
        raise AdapterFileError(f"{source}: the tensors are not those that it describes:\n  {listed}{more}")
    return found


def _problems(rules: PeftRules, module: str, update: RawUpdate, rank: int | None) -> list[str]:
    """Where the tensors and the config contradict each other, or together say what the neutral form cannot."""
    if not any(part.startswith(_PARTS_OF[rules.method]) for part in update.parts):
        return [f"{module}: its tensors are not those of the config's method, {rules.method}"]
    if rank is not None:
        return rules.disagreements({module: rank})
    said = rules.rank_of(module)
    if rules.method == "lokr" and said is not None and rules.alpha_of(module, said) not in (None, said):
        return [f"{module}: both factors are whole, so only alpha = rank can be held (PEFT scales by alpha / r)"]
    return []


def _rank(update: RawUpdate) -> int | None:
    found = (update.parts[name] for name in _RANKED if name in update.parts)
    return next((part.shape[0] for part in found if part.ndim), None)


def outputs_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's DoRA magnitudes of convolutions, [1, out, 1, 1], as [out, 1, 1, 1]: the other order means the inputs."""
    return {
        key: tensor.transpose(0, 1).contiguous() if tensor.ndim == 4 and _MAGNITUDE in key else tensor
        for key, tensor in tensors.items()
    }
