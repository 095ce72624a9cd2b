"""Progress bars on stderr; nothing is drawn for work that takes under a second."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

PATIENCE_S = 1.0
LINE_EVERY_S = 15.0


class ProgressBar(Protocol):
    """`progress` or `no_progress`: hands the items through."""

    def __call__(self, items: Iterable[Item], what: str, total: int) -> Generator[Item, None, None]:
        """Yield every item of `items`, of which there are `total`, while telling how far `what` has come."""
        ...


def progress(items: Iterable[Item], what: str, total: int) -> Generator[Item, None, None]:
    """Hand `items` through: a bar on a terminal, else a line on stderr every 15 s (for log files)."""
    console = Console(stderr=True)
    return _with_bar(items, what, total, console) if console.is_terminal else _with_lines(items, what, total, console)


def no_progress(items: Iterable[Item], what: str, total: int) -> Generator[Item, None, None]:
    """Hand `items` through in silence: for processes other than the first."""
    yield from items


def _with_bar(items: Iterable[Item], what: str, total: int, console: Console) -> Generator[Item, None, None]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task(what, total=total)
    begin = time.monotonic()
    shown = False
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not shown and time.monotonic() - begin > PATIENCE_S:
                bar.start()
                shown = True
    finally:
        if shown:
            bar.stop()


def _with_lines(items: Iterable[Item], what: str, total: int, console: Console) -> Generator[Item, None, None]:
    last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last > LINE_EVERY_S:
            console.print(f"{what}: {done} of {total}", highlight=False)
            last = time.monotonic()
