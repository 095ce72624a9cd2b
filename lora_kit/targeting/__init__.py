"""Rules that pick layers. Starts without torch.

Names are imported when they are first used (PEP 562): plans need pydantic and the recipe's sections, globs and module
names do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kit.first_use import imported_on_first_use

if TYPE_CHECKING:
    from lora_kit.targeting.block_scales import ldm_block, module_scales
    from lora_kit.targeting.globs import Pattern, compile_pattern
    from lora_kit.targeting.modules import ModuleInfo
    from lora_kit.targeting.names import canonical_name
    from lora_kit.targeting.plan import PlanRule, Target, TargetPlan, plan_from_json, plan_to_json
    from lora_kit.targeting.presets import preset_rules
    from lora_kit.targeting.resolve import make_plan
    from lora_kit.targeting.table import plan_table
    from lora_kit.targeting.tree import module_tree

__all__ = [
    "ModuleInfo",
    "Pattern",
    "PlanRule",
    "Target",
    "TargetPlan",
    "canonical_name",
    "compile_pattern",
    "ldm_block",
    "make_plan",
    "module_scales",
    "module_tree",
    "plan_from_json",
    "plan_table",
    "plan_to_json",
    "preset_rules",
]

_HOMES = {
    "ModuleInfo": "modules",
    "Pattern": "globs",
    "PlanRule": "plan",
    "Target": "plan",
    "TargetPlan": "plan",
    "canonical_name": "names",
    "compile_pattern": "globs",
    "ldm_block": "block_scales",
    "make_plan": "resolve",
    "module_scales": "block_scales",
    "module_tree": "tree",
    "plan_from_json": "plan",
    "plan_table": "table",
    "plan_to_json": "plan",
    "preset_rules": "presets",
}

__getattr__ = imported_on_first_use(__name__, _HOMES)
