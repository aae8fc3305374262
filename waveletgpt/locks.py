"""One process at a time: a lock that the system frees when its holder dies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import lock_descriptor


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of an existing file or folder; where it cannot be locked (a folder on Windows, some network file
    systems) nothing is held.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    with contextlib.ExitStack() as ours:
        free = True
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            ours.callback(os.close, descriptor)
            free = lock_descriptor(descriptor, blocking=wait)
        if not free:
            raise BlockingIOError(f"another process holds {path}")
        yield
