"""Processes of their own in no time: forked from a server that has torch and this package loaded.

Each has its own signals, environment, working folder, outputs and end, as one started from a shell; only the seconds of
importing are saved.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["waveletgpt.training.trainer", "waveletgpt.cli.commands", "waveletgpt.report", "tests.helpers"]
)


def begin(
    work: Callable[..., object],
    *arguments: Any,
    out: Path,
    err: Path,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """A process that has begun with `work(*arguments)`: a `multiprocessing.Process`.

    Args:
        out, err: files for its standard output and error.
        environment: more variables, besides those of this process.
    """
    variables = {**os.environ, **(environment or {})}
    process: Any = _CONTEXT.Process(target=_child, args=(work, arguments, out, err, cwd or Path.cwd(), variables))
    process.start()
    return process


def _child(
    work: Callable[..., object],
    arguments: tuple[Any, ...],
    out: Path,
    err: Path,
    cwd: Path,
    variables: dict[str, str],
) -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        with open(file, "wb") as opened:
            os.dup2(opened.fileno(), stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    work(*arguments)
    sys.exit(0)
