"""The training loop."""

from lora_kit.training.run import Outcome, train

__all__ = ["Outcome", "train"]
