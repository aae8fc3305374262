"""Several processes that are one run: they share what they find out, and none waits for one that has failed.

`torchrun` starts the processes and numbers them; process 0 is the first. What they tell each other here travels on the
CPU, through gloo, whatever they train on. With one process nothing is sent, and torch is not imported.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from waveletgpt.errors import UserError

T = TypeVar("T")


class Told(UserError):
    """A mistake that the first process tells the user, in the other processes."""


def count() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def first() -> bool:
    """Whether this process is the one that plans, writes and prints."""
    return rank() == 0


def join() -> None:
    """Meet the other processes, once; waits until all are there."""
    import torch

    if count() > 1 and not torch.distributed.is_initialized():
        # NCCL is set up when the first tensor of a GPU is sent, so this is right for training on CPUs, too.
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def gather(value: T) -> list[T]:
    """The value of every process, in their order; it must be picklable."""
    if count() == 1:
        return [value]
    import torch

    join()
    values: list[Any] = [None] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether the flag is set in one of the processes; cheap enough for every step."""
    if count() == 1:
        return flag
    import torch

    join()
    # A process group that was made elsewhere may have no gloo; then tensors must be on the GPU.
    on_cpu = "gloo" in torch.distributed.get_backend_config()
    value = torch.tensor(int(flag), device="cpu" if on_cpu else torch.cuda.current_device())
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return bool(value.item())


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A block that every process runs: an error in one of them is raised in all, and the first process prints it.

    Raises:
        UserError: in the first process, the error of the first that had one; `Told` in the others.
    """
    if count() == 1:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    try:
        errors = gather(None if mine is None else f"{mine}")
    except RuntimeError:
        if mine is not None:  # the others are gone, so it is raised here
            raise mine from None
        raise
    number = next((number for number, error in enumerate(errors) if error is not None), None)
    if number is None:
        return
    if first():
        if mine is not None:
            raise mine
        raise UserError(f"process {number} of {count()}: {errors[number]}")
    if mine is not None and not isinstance(mine, UserError | OSError):
        raise mine  # no mistake of the user's: its traceback is wanted
    raise Told(errors[number])


def from_first(make: Callable[[], T]) -> T:
    """Call `make` in the first process only, and return its result in all of them; the others wait.

    Raises:
        Exception: what it raises, in the first process; `Told` in the others.
    """
    made: T | None = None
    with agreed():
        if first():
            made = make()
    return gather(made)[0]  # type: ignore[return-value]


def check_shared(folder: Path) -> None:
    """Whether all processes see the folder of the first: it leaves a file there, and the others look for it.

    Raises:
        UserError: one of them does not.
    """
    if count() == 1:
        return

    def leave() -> tuple[str, bool, str]:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        name = f".shared-{secrets.token_hex(8)}"
        (folder / name).touch()
        return name, made, socket.gethostname()

    name, made, host = from_first(leave)
    try:
        with agreed():
            deadline = time.monotonic() + 5  # a file on the network may show a moment later
            while not (folder / name).exists():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{folder} on {socket.gethostname()} is not the folder of process 0 on {host}; "
                        "name a folder that all machines share"
                    )
                time.sleep(0.05)
    finally:
        if first():
            (folder / name).unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()


def lost(error: BaseException) -> bool:
    """Whether an error says that another process of the run is no longer there."""
    if count() == 1:
        return False
    import torch

    kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "gloo" in str(error))
