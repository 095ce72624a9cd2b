"""metrics.jsonl, TensorBoard, trackers and the progress line of a run. Only the main process makes one."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_kit.files import write_text
from lora_kit.training.trackers import track_picture


class Metrics:
    """A line per logged step in metrics.jsonl, the same numbers in TensorBoard, and a bar on stderr.

    Lines of steps after `first_step` (left by a run that was killed after its last checkpoint) are dropped,
    since they are about to be run again.
    """

    def __init__(self, folder: Path, first_step: int, max_steps: int, accelerator: Accelerator | None = None) -> None:
        """accelerator: its trackers get the numbers and pictures too."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        _keep_lines_until(self.path, first_step)
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "logs"), purge_step=first_step + 1 if first_step else None)
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=max_steps, completed=first_step, note="")
        self._logged = (first_step, time.monotonic())
        self._accelerator = accelerator

    def __enter__(self) -> Metrics:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        self._board.close()
        self._file.close()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line for the user, on stderr."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def log_step(self, step: int, batch_size: float, values: dict[str, float]) -> None:
        """Log one optimizer step, with the speed since the last logged one at this mean batch size."""
        last_step, last_time = self._logged
        now = time.monotonic()
        speed = (step - last_step) * batch_size / max(now - last_time, 1e-9)
        self._logged = (step, now)
        note = f"loss {values['loss']:.4f}  {speed:.1f} pictures/s"
        self._bar.update(self._task, completed=step, note=note)
        if not self._console.is_terminal:
            self.say(f"step {step}  {note}")
        self.log(step, {**values, "samples_per_s": round(speed, 3)})

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl; its numbers go to TensorBoard and the trackers as well."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._accelerator is not None and self._accelerator.trackers and numbers:
            self._accelerator.log(numbers, step=step)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """A picture to TensorBoard and to the trackers that take pictures."""
        import numpy as np

        self._board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        if self._accelerator is not None:
            track_picture(self._accelerator, name, image, step)

    def restart_clock(self, step: int) -> None:
        """Leave what happened since the last logged step (validation, saving) out of the next speed."""
        self._logged = (step, time.monotonic())


class NoMetrics(Metrics):
    """Does nothing: for all processes but the main one."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def advance(self, step: int) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def log_step(self, step: int, batch_size: float, values: dict[str, float]) -> None:
        """Nothing."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Nothing."""

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Nothing."""

    def restart_clock(self, step: int) -> None:
        """Nothing."""


def _keep_lines_until(path: Path, step: int) -> None:
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) <= step] if step else []
    write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """The line's step; a torn last line (power cut) counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        print(f"metrics.jsonl: dropped a torn line: {line[:60]}", file=sys.stderr)  # noqa: T201
        return float("inf")
