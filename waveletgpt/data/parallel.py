"""Work on all cores, with the results in order and in bounded memory.

Threads are enough: NumPy, tokenizers and files, where the time goes, let other threads run. They start within a
millisecond, share memory, and stop with the caller.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Sized(Protocol):
    @property
    def data(self) -> bytes: ...


_Data = TypeVar("_Data", bound=_Sized)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    work: Callable[[_Item], _Result], items: Iterable[_Item], quick: bool = False
) -> Iterator[tuple[_Item, _Result]]:
    """Each item with `work(item)`, in the order of the items; at most two items per core are held at a time.

    `items` are read, and results given, in the caller's thread. An error in `work` or `items` is raised there too, at
    its place in the order. Then, and if the caller stops early, running work is waited for and no more begins.

    Args:
        quick: `work` takes less time than handing it to another thread, so it is done in the caller's.
    """
    if quick:
        yield from ((item, work(item)) for item in items)
        return
    waiting: deque[tuple[_Item, Future[_Result]]] = deque()
    most = 2 * cores()
    pool = ThreadPoolExecutor(cores(), thread_name_prefix="waveletgpt-data")
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) == most:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches(items: Iterable[_Data], size: int) -> Iterator[list[_Data]]:
    """The items in lists of about `size` bytes of `data`; no list is empty."""
    batch: list[_Data] = []
    gathered = 0
    for item in items:
        batch.append(item)
        gathered += len(item.data) + 1
        if gathered >= size:
            yield batch
            batch, gathered = [], 0
    if batch:
        yield batch
