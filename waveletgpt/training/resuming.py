"""Whether a run may begin or continue in an output folder; if not, an error that says why."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waveletgpt.errors import UserError
from waveletgpt.locks import locked
from waveletgpt.runs.folder import STAGING, RunFolder, broken_checkpoint, disk_errors, find_runs, is_unfinished
from waveletgpt.training import processes
from waveletgpt.training.recipe import Recipe


def check_run_folder(run: RunFolder, resume: bool) -> None:
    """Whether a run may begin or go on in this folder; cheap enough to be asked before the data is prepared.

    Raises UserError for a folder that holds other things, or a run and it was not asked to resume.
    """
    _refuse_file(run.path)
    if not run.exists():
        there = [child.name for child in run.path.iterdir()] if run.path.is_dir() else []
        if any(name not in (STAGING, "tensorboard") and not is_unfinished(name) for name in there):
            raise UserError(f"`out={run.path}` is not empty and holds no run; name another folder")
    elif not resume:
        raise UserError(
            f"`out={run.path}` already holds a run ({run.info['status']}); add `resume=True` to go on with it, "
            "or name another folder"
        )


def check_comparison_folder(out: Path, runs: set[str], resume: bool) -> None:
    """Whether a comparison whose run folders have the names `runs` may begin or go on in `out`.

    Raises UserError for a folder that holds other things, or a comparison and it was not asked to resume.
    """
    _refuse_file(out)
    if not out.exists():
        return
    there = sorted(child.name for child in out.iterdir() if not is_unfinished(child.name))
    begun = any(find_runs(out))
    if there and not resume:
        what = "a comparison" if begun else "other files"
        raise UserError(f"`out={out}` already holds {what}; add `resume=True` to go on with it, or name another folder")
    foreign = [name for name in there if name not in runs]
    if foreign and not begun:
        raise UserError(f"`out={out}` holds no comparison to go on with, but {foreign[0]}; name another folder")


def _refuse_file(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"`out={out}` is a file; name a folder")


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Make the folder and keep other processes from training in it. If it is still empty at the end, it is removed.

    See `locks.locked`.

    Raises:
        UserError: another process has it, or a file is where the folder should be.
    """
    _refuse_file(out)
    made = not out.exists()
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(locked(out, wait=False))
        except BlockingIOError:
            problem = "another process is training there; wait for it, or name another folder"
            raise UserError(f"`out={out}`: {problem}") from None
        try:
            yield
        finally:
            if made:
                with contextlib.suppress(OSError):  # not empty
                    out.rmdir()


def find_start(run: RunFolder, recipe: Recipe, fingerprint: str, resume: bool) -> tuple[int, Path] | None:
    """The newest checkpoint (step, folder) to go on from; None: from the start, or not at all, as the run is finished.

    Raises:
        UserError: see `check_run_folder`; a run with other settings or data; a broken checkpoint.
    """
    check_run_folder(run, resume)
    if not run.exists():
        return None
    info = run.info
    recorded = {k: v for k, v in info["recipe"].items() if k != "data"}
    began, here = info["environment"].get("processes", 1), processes.count()
    before, after = global_batch(recorded, began), global_batch(recipe.as_dict(), here)
    if before != after and began != here:
        fitting, rest = divmod(before, recipe.training.accumulation * here)
        mend = f"give `batch_size={fitting}`" if fitting and not rest else f"use {began} again"
        raise UserError(
            f"`resume=True` with another number of processes, {here}: a step would have {after} sequences, "
            f"in {run.path}, of {began}, it has {before}; {mend}, or another `out`"
        )
    for name, now, then in differences(recipe.as_dict(), recorded):
        if name in _BATCH and before == after:
            continue  # the global batch is the same, divided among the processes in another way
        raise UserError(
            f"`resume=True` with other settings: {name} is {now!r}, the run in {run.path} has {then!r}; "
            "use its settings, or another `out`"
        )
    if info["data"]["fingerprint"] != fingerprint:
        raise UserError(
            f"`resume=True` with other data: {run.path} was trained on {info['data']['name']} "
            f"({info['data']['fingerprint'][:12]}), this is {fingerprint[:12]}; use another `out`"
        )
    checkpoints = run.checkpoints()
    if not checkpoints or run.finished:  # a finished run needs none
        return None
    step, folder = checkpoints[-1]
    problem = checkpoint_problem(folder, recipe.training.fsdp)
    if problem:
        raise broken_checkpoint(folder, problem)
    return step, folder


_BATCH = ("batch_size", "training.accumulation")


def global_batch(recipe: dict[str, Any], processes: int) -> int:
    """Sequences of a step, in all processes together, of a recipe as a dict."""
    return int(recipe["batch_size"] * recipe["training"]["accumulation"] * processes)


# Settings that change where and how fast a run computes, not what it computes.
_FREE = (
    "device",
    "training.threads",
    "training.workers",
    "training.keep_checkpoints",
    "source.cache_dir",
    "source.data_dir",
)


def differences(now: dict[str, Any], then: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, value now, value then) of every setting that differs and matters."""
    for name, value in now.items():
        if isinstance(value, dict):
            yield from differences(value, then.get(name) or {}, f"{prefix}{name}.")
        elif value != then.get(name) and (value or name in then) and prefix + name not in _FREE:
            yield prefix + name, value, then.get(name)


def checkpoint_problem(folder: Path, sharded: bool) -> str | None:
    """Why a checkpoint cannot be resumed from, or None; `sharded`: whether its optimiser's state is in parts."""
    import torch
    from safetensors import SafetensorError, safe_open

    for name in ("config.json", "trainer_state.json", "clock.json"):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"{name} is missing or cut short"
    shards = list(folder.glob("*.safetensors"))
    if not shards:
        return "it has no weights"
    for shard in shards:
        try:
            with safe_open(shard, "pt"):
                pass
        except (OSError, SafetensorError):
            return f"{shard.name} is cut short"
    for name in ("scheduler.pt",) if sharded else ("optimizer.pt", "scheduler.pt"):
        try:
            torch.load(folder / name, map_location="meta", weights_only=True)
        except Exception:  # torch raises half a dozen kinds on a broken archive
            return f"{name} is missing or cut short"
    if sharded:
        from waveletgpt.training import sharding

        return sharding.problem(folder)
    return None
