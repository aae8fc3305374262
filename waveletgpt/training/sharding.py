"""A run in whose processes each holds a part of the model and of the optimiser's state (FSDP 2).

Its checkpoints have the weights in one file, which loads anywhere. The optimiser's state, twice as large and needed for
resuming only, is in the folder `optimizer`: each process writes its part (torch.distributed.checkpoint), and any number
of processes can read it. A single process that resumes such a run holds all of it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from waveletgpt.runs.folder import broken_checkpoint
from waveletgpt.training import processes

FOLDER = "optimizer"
"""The folder in a checkpoint with the parts of the optimiser's state."""


def tell_accelerate() -> None:
    """Let accelerate shard on CPUs as it does on GPUs.

    It looks at its FSDP plugin only where the processes are of a kind that has accelerators
    (`AcceleratorState.__init__`), and trains copies (DDP) otherwise, without a word. FSDP 2 itself runs on CPUs. So the
    processes are called those of GPUs between their start (`TrainingArguments.device`) and the accelerator's; what they
    compute on is kept elsewhere. The next run's `TrainingArguments` finds out for itself.
    """
    state = PartialState._shared_state
    if state["distributed_type"] == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Give a sharded model the weights of a checkpoint; each process takes its part of the file."""
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    # Tied weights are in the file once.
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def save_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the optimiser's state into a checkpoint; every process does its part.

    Raises:
        OSError: one of them can't write.
    """
    state = get_optimizer_state_dict(model, optimizer)
    with processes.agreed(), _quiet():
        try:
            checkpoint.save(state, checkpoint_id=folder / FOLDER, no_dist=processes.count() == 1)
        except checkpoint.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take the optimiser's state from a checkpoint, whatever number of processes wrote it.

    Raises:
        UserError: its files are damaged.
    """
    state = get_optimizer_state_dict(model, optimizer)
    with processes.agreed(), _quiet():
        try:
            checkpoint.load(state, checkpoint_id=folder / FOLDER, no_dist=processes.count() == 1)
        except checkpoint.CheckpointException as error:
            failure, _ = next(iter(error.failures.values()))
            raise broken_checkpoint(folder, f"{FOLDER}: {failure}") from None
    set_optimizer_state_dict(model, optimizer, state)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning that a run of one process may have been meant for several."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def problem(folder: Path) -> str | None:
    """Why a checkpoint's parts of the optimiser's state can't be read, or None; checks which files there are, not
    their content."""
    parts = folder / FOLDER
    try:
        metadata = checkpoint.FileSystemReader(parts).read_metadata()
        ends: dict[str, int] = {}
        for piece in metadata.storage_data.values():
            ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    except Exception:  # a pickle that is cut short raises half a dozen kinds
        return f"{FOLDER}/.metadata is missing or cut short"
    for name, end in sorted(ends.items()):
        file = parts / name
        if not file.is_file() or file.stat().st_size < end:
            return f"{FOLDER}/{name} is missing or cut short"
    return None
