"""A full disk, told as what it is."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lora_kit.errors import TrainingError

_FULL = {number for name in ("ENOSPC", "EDQUOT", "EFBIG") if (number := getattr(errno, name, None)) is not None}


@contextmanager
def full_disk_told(what: Path, saved: Callable[[], str]) -> Generator[None]:
    """Turn the errors of a full disk (or quota, or file size limit) while `what` is written into a TrainingError.

    saved: says what is whole, and how to go on. Other errors pass.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = full_disk_reason(error)
        if reason is None:
            raise
        raise TrainingError(f"{what} could not be written: {reason}. {saved()}Free some space, then go on.") from error


def full_disk_reason(error: BaseException) -> str | None:
    """The system's words for it, or None if the error is another one."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _FULL else None
    # safetensors' own error carries the system's number in its text alone.
    return next((os.strerror(number) for number in _FULL if f"os error {number})" in str(error)), None)
