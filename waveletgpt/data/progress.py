"""A progress bar in bytes on standard error, with speed and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(description: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar up to `total` bytes (0: unknown); yields a function that takes how many are done."""
    if not shown:
        yield lambda done: None
        return
    from rich import progress as rich
    from rich.console import Console

    speed, left = rich.TransferSpeedColumn(), rich.TimeRemainingColumn()
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.DownloadColumn(), speed, left)
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total or None)
        yield lambda done: progress.update(task, completed=done)
