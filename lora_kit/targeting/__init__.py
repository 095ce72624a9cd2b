"""Rules that pick layers. Starts without torch."""

from lora_kit.targeting.globs import Pattern, compile_pattern
from lora_kit.targeting.names import canonical_name
from lora_kit.targeting.plan import ModuleInfo, PlanRule, Target, TargetPlan, plan_from_json, plan_to_json
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
    "make_plan",
    "module_tree",
    "plan_from_json",
    "plan_table",
    "plan_to_json",
    "preset_rules",
]
