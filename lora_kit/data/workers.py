"""How loader processes are started."""

from __future__ import annotations

import os
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
    """Ctrl-C and `timeout` signal the whole process group; the parent must still get its batches to finish a step.

    So workers leave the group. They must not ignore SIGTERM instead: the parent's exit ends them by it, and
    would wait forever.
    """
    if os.name == "posix":
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
