"""How loader processes are started."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_HELD_BACK = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)}


def worker_options(workers: int) -> dict[str, Any]:
    """DataLoader's arguments for `workers` processes.

    They are started the platform's way: everything they get can be pickled, and they never touch a GPU, so
    forking is safe too. They need no seeds: what they compute is a pure function of the position.
    """
    if not workers:
        return {"num_workers": 0}
    return {"num_workers": workers, "persistent_workers": True, "worker_init_fn": leave_signals_to_parent}


def leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C and `timeout` signal the whole process group; the parent must still get its batches to finish a step.

    So workers leave the group. They must not ignore SIGTERM instead: the parent's exit ends them by it, and
    would wait forever.
    """
    if os.name == "posix":
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        # What reached the group before this process had left it is thrown away; PyTorch's own handler stays.
        while waiting := _HELD_BACK & signal.sigpending():
            signal.sigwait(waiting)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)


@contextmanager
def held_signals() -> Generator[None]:
    """Hold signals back while workers are started: one that comes before a worker has left the group would end it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
