"""Start the processes of one run as torchrun does, but in no time."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.processes import begin
from waveletgpt.data import TokenStore
from waveletgpt.training.recipe import Recipe


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
    running = []
    for rank in range(processes):
        environment = {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        environment |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        files = {"out": folder / f"out{rank}", "err": folder / f"err{rank}"}
        own = folder / str(rank)
        cwd = own if own.is_dir() else None
        running.append(begin(work, *arguments, **files, cwd=cwd, environment={**environment, "OMP_NUM_THREADS": "1"}))
    for process in running:
        process.join(timeout)
    stuck = [rank for rank, process in enumerate(running) if process.exitcode is None]
    for process in running:
        process.kill()
    told = [tuple((folder / f"{name}{rank}").read_text() for name in ("out", "err")) for rank in range(processes)]
    assert not stuck, f"processes {stuck} did not end: {told}"
    return [(process.exitcode, *texts) for process, texts in zip(running, told, strict=True)]


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
