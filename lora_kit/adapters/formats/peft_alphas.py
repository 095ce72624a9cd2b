"""Alpha of each module of a file whose header or config holds PEFT's rules for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lora_kit.adapters.formats.layout import RawUpdate
from lora_kit.adapters.formats.peft_rules import PeftRules, check_effort
from lora_kit.errors import AdapterFileError

_SHOWN = 10


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
        rank = _rank(update)
        if rules_here is None or rank is None:
            continue
        problems += rules_here.disagreements({inner: rank})
        alpha = rules_here.alpha_of(inner, rank)
        if alpha is not None:
            found[module] = alpha
    if problems:
        more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listed = "\n  ".join(problems[:_SHOWN])
        raise AdapterFileError(f"{source}: the tensors are not those that it describes:\n  {listed}{more}")
    return found


def _rank(update: RawUpdate) -> int | None:
    return update.down.shape[0] if update.down is not None and update.down.ndim else None
