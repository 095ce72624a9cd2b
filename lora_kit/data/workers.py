"""How loader processes are started."""

from __future__ import annotations

import signal
from typing import Any


def worker_options(workers: int) -> dict[str, Any]:
    """DataLoader's arguments for `workers` processes.

    They are started the platform's way: everything they get can be pickled, and they never touch a GPU, so
    forking is safe too. They need no seeds: what they compute is a pure function of the position.
    """
    if not workers:
        return {"num_workers": 0}
    return {"num_workers": workers, "persistent_workers": True, "worker_init_fn": leave_signals_to_parent}


def leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C and `timeout` signal the whole process group; the parent must still get its batches to finish the step.

    The parent ends its workers itself, and they notice when it is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
