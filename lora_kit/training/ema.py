"""Exponential moving average of the trained weights, by diffusers' EMAModel."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class WeightAverage:
    """Off when `decay` is None: every method then does nothing.

    The decay in force at step n is min(decay, (1 + n) / (10 + n)), so that a short run is not averaged with
    its random beginning.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float | None) -> None:
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._model = EMAModel(self._parameters, decay=decay) if decay is not None else None

    def update(self) -> None:
        """After an optimizer step."""
        if self._model is not None:
            self._model.step(self._parameters)

    def tensors(self) -> dict[str, Tensor]:
        """The averages as `ema.<name>`, for a checkpoint."""
        if self._model is None:
            return {}
        return {f"ema.{n}": t for n, t in zip(self._names, self._model.shadow_params, strict=True)}

    def resume_at(self, step: int) -> None:
        """Set the count of updates; the tensors were loaded in place."""
        if self._model is not None:
            self._model.optimization_step = step

    @contextmanager
    def applied(self) -> Generator[None]:
        """The averages stand in the model while inside."""
        if self._model is None:
            yield
            return
        self._model.store(self._parameters)
        self._model.copy_to(self._parameters)
        try:
            yield
        finally:
            self._model.restore(self._parameters)
