"""Start several processes as torchrun does, but in no time: they are forked from a server that has torch loaded."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from waveletgpt.data import TokenStore
from waveletgpt.training.recipe import Recipe

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["waveletgpt.training.trainer", "waveletgpt.cli.commands", "tests.helpers"])


def launch(
    folder: Path, work: Callable[..., object], *arguments: Any, processes: int = 2, timeout: float = 120
) -> list[tuple[int, str, str]]:
    """Run `work(*arguments)` in processes of one run, each in its working folder if `folder/RANK` is there.

    Returns exit code, standard output and standard error of each; a process that does not end fails the test.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running: list[Any] = [
        _CONTEXT.Process(target=_child, args=(rank, processes, port, folder, work, arguments))
        for rank in range(processes)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout)
    stuck = [rank for rank, process in enumerate(running) if process.exitcode is None]
    for process in running:
        process.kill()
    told = [tuple((folder / f"{name}{rank}").read_text() for name in ("out", "err")) for rank in range(processes)]
    assert not stuck, f"processes {stuck} did not end: {told}"
    return [(process.exitcode, *texts) for process, texts in zip(running, told, strict=True)]


def _child(
    rank: int, processes: int, port: int, folder: Path, work: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"
    if (folder / str(rank)).is_dir():
        os.chdir(folder / str(rank))
    with (
        open(folder / f"out{rank}", "w", buffering=1) as out,
        open(folder / f"err{rank}", "w", buffering=1) as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        work(*arguments)
    sys.exit(0)


def train_until(
    recipe: Recipe, store: TokenStore, out: Path, resume: bool = False, hit: tuple[int, int, int] | None = None
) -> None:
    """Train; `hit` is (rank, step, signal): what that process then sends itself."""
    from waveletgpt.cli.main import plain_errors
    from waveletgpt.training import processes
    from waveletgpt.training.trainer import Recorder, train

    original = Recorder.on_step_end

    def on_step_end(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hit and (processes.rank(), state.global_step) == hit[:2]:
            os.kill(os.getpid(), hit[2])
        original(self, args, state, control, **kwargs)

    Recorder.on_step_end = on_step_end  # type: ignore[method-assign]
    try:
        with plain_errors():
            train(recipe, store, out, data="words.txt", resume=resume, show_progress=False)
    finally:
        Recorder.on_step_end = original  # type: ignore[method-assign]
