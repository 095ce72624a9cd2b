"""Pictures from a base and scaled adapters."""

from lora_kit.inference.generate import Picture, generate, generate_columns, grid
from lora_kit.inference.grids import compose_grid
from lora_kit.inference.prepare import Prepared, default_settings, prepare, scale_adapters
from lora_kit.inference.sampling import draw
from lora_kit.inference.settings import SamplingSettings
from lora_kit.models.family.picture_inputs import PictureInputs

__all__ = [
    "Picture",
    "PictureInputs",
    "Prepared",
    "SamplingSettings",
    "compose_grid",
    "default_settings",
    "draw",
    "generate",
    "generate_columns",
    "grid",
    "prepare",
    "scale_adapters",
]
