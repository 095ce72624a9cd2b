"""Ctrl-C and SIGTERM: finish the step, save, exit with the signal's status."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from lora_kit.errors import LoraKitError


class InterruptedRunError(LoraKitError):
    """The run was stopped by a signal, after it saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


class StopSignals:
    """While entered, the first SIGINT or SIGTERM only sets `number`; a second one acts as usual."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, signal._HANDLER] = {}  # pyright: ignore[reportPrivateUsage] (typeshed's name)

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
