"""The weights that stand for a run in validation and results: as trained, or averaged."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_kit.recipe import TrainSection
from lora_kit.training.processes.sharding import is_sharded

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


class WeightAverage:
    """An exponential moving average by diffusers' EMAModel, or a schedule-free optimizer's own average; or neither,
    and every method then does nothing.

    The moving average's decay rises with the updates up to `ema_decay` (see `train.ema_warmup`), so that a short run
    is not averaged with its random beginning.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], section: TrainSection, optimizer: Any = None) -> None:
        """optimizer: asked for its own average if it has the modes `train()` and `eval()`, as schedulefree's have."""
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._section = section
        self._model = _ema_model(self._parameters, section) if section.ema_decay is not None else None
        modes = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
        self._optimizer = optimizer if modes else None

    @property
    def is_moving(self) -> bool:
        """Whether there is a moving average, beside the weights as trained."""
        return self._model is not None

    @property
    def updates(self) -> int:
        """Optimizer steps averaged over."""
        return self._model.optimization_step if self._model is not None else 0

    @updates.setter
    def updates(self, count: int) -> None:
        """When the tensors were restored in place."""
        if self._model is not None:
            self._model.optimization_step = count

    def restart(self) -> None:
        """Begin at the weights as they are now."""
        with torch.no_grad():
            for average, parameter in zip(self.tensors().values(), self._parameters, strict=False):
                average.copy_(parameter)

    def update(self) -> None:
        """After an optimizer step."""
        if self._model is not None:
            self._model.step(self._parameters)

    def tensors(self) -> dict[str, Tensor]:
        """The moving averages by their parameters' names, for a checkpoint."""
        if self._model is None:
            return {}
        return dict(zip(self._names, self._model.shadow_params, strict=True))

    def describe(self, moving: bool = True) -> str:
        """What `applied` (or `final`) puts in the model, for headers and logs."""
        if self._model is not None and moving:
            return f"exponential moving average, decay {self._section.ema_decay:g}"
        return "average of the schedule-free optimizer" if self._optimizer is not None else "as trained"

    @contextmanager
    def applied(self) -> Generator[None]:
        """The averages stand in the model while inside. Leaving gives the trained weights back bit for bit."""
        if self._model is None and self._optimizer is None:
            yield
            return
        # A copy, not the optimizer's own way back: that would round, and a validation would change the run.
        trained = [_kept(parameter) for parameter in self._parameters]
        if self._model is not None:
            self._model.copy_to(self._parameters)
        if self._optimizer is not None:
            self._optimizer.eval()
        try:
            yield
        finally:
            if self._optimizer is not None:
                self._optimizer.train()
            with torch.no_grad():
                for parameter, own in zip(self._parameters, trained, strict=True):
                    parameter.copy_(own)

    @contextmanager
    def final(self, moving: bool) -> Generator[None]:
        """The weights of one result: the moving average, or else what the optimizer leaves (its average, if it has
        one)."""
        if self.is_moving and not moving:
            yield
            return
        with self.applied():
            yield


def _kept(parameter: nn.Parameter) -> Tensor:
    """A copy on the CPU; of a sharded weight, which is a part only, where it is."""
    own = parameter.detach()
    return own.clone() if is_sharded(own) else own.to("cpu", copy=True)


def _ema_model(parameters: list[nn.Parameter], section: TrainSection) -> EMAModel:
    from diffusers.training_utils import EMAModel  # here: it imports torchvision and DeepSpeed where they are installed

    assert section.ema_decay is not None
    if section.ema_warmup is None:
        return EMAModel(parameters, decay=section.ema_decay)
    return EMAModel(parameters, decay=section.ema_decay, use_ema_warmup=True, power=section.ema_warmup)
