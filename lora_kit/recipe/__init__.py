"""Recipes: what to train, on what, and how. Imports no torch."""

from lora_kit.recipe.kohya import expand_sources
from lora_kit.recipe.load import dump_recipe, load_recipe, recipe_schema
from lora_kit.recipe.paths import describe_lookup, is_pattern
from lora_kit.recipe.sections import (
    BucketSection,
    CaptionRules,
    CaptionSection,
    DataSection,
    EarlyStopSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    PresetRules,
    Recipe,
    SaveSection,
    ScheduleSection,
    SourceSection,
    SplitSection,
    TargetRule,
    TimestepSection,
    TokenSection,
    TrainSection,
    ValidationSection,
)

__all__ = [
    "BucketSection",
    "CaptionRules",
    "CaptionSection",
    "DataSection",
    "EarlyStopSection",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "PresetRules",
    "Recipe",
    "SaveSection",
    "ScheduleSection",
    "SourceSection",
    "SplitSection",
    "TargetRule",
    "TimestepSection",
    "TokenSection",
    "TrainSection",
    "ValidationSection",
    "describe_lookup",
    "dump_recipe",
    "expand_sources",
    "is_pattern",
    "load_recipe",
    "recipe_schema",
]
