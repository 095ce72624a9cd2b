"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, exit with the signal's status."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

from lora_kit.errors import LoraKitError

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""SIGUSR1 is what clusters send ahead of the end (`sbatch --signal`); Windows has none."""
SAME_PRESS = 1.0
"""Seconds in which a second SIGINT is the same press: a launcher passes on what the terminal sent to all."""


class InterruptedRunError(LoraKitError):
    """The run was stopped by a signal, after it saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


class StopSignals:
    """While entered, the first signal sets `number`. Then a second Ctrl-C ends the process on the spot, and any other
    changes nothing: clusters send SIGTERM after SIGUSR1, when the run is stopping already."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0
        self._before: dict[int, signal._HANDLER] = {}  # pyright: ignore[reportPrivateUsage] (typeshed's name)

    def __enter__(self) -> StopSignals:
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            _say(f"{signal.Signals(number).name}: finishing the step, then saving. Ctrl-C again leaves at once.")
        elif number == signal.SIGINT and time.monotonic() - self._since >= SAME_PRESS:
            # Not an exception: nothing between here and the exit is to be waited for, and all that was saved has its
            # name only once it is whole. The escape shows the cursor that the progress bar hid.
            _say("\x1b[?25h" * os.isatty(2) + "Left at once. What was saved before is whole.")
            os._exit(128 + number)


def _say(text: str) -> None:
    """To stderr, from within a signal handler: past Python's buffers, which may be in the middle of a write."""
    os.write(2, f"\n{text}\n".encode())
