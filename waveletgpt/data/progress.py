"""A progress bar on standard error, in bytes or another unit, with speed and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(description: str, total: int, shown: bool, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A bar up to `total` (0: unknown). Yields a function to call with the number done."""
    if not shown:
        yield lambda done: None
        return
    from rich import progress as rich
    from rich.console import Console

    figures: tuple[rich.ProgressColumn, ...]
    if unit == "bytes":
        figures = (rich.DownloadColumn(), rich.TransferSpeedColumn())
    else:
        figures = (rich.MofNCompleteColumn(), rich.TextColumn(unit))
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), *figures, rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total or None)
        yield lambda done: progress.update(task, completed=done)
