"""Locks of files: one process at a time, freed when its holder dies, and nothing lost where a file system has none."""

from __future__ import annotations

import errno
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tiny_recipe
from waveletgpt.errors import UserError
from waveletgpt.locks import locked
from waveletgpt.runs.folder import RunFolder, find_runs
from waveletgpt.training.resuming import claimed, find_start


def hold(path: Path, held: Any) -> None:
    with locked(path, wait=True):
        held.set()
        signal.pause()


def test_a_lock_is_free_when_its_holder_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, held))
    holder.start()
    try:
        assert held.wait(120)
        with pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
            pass
        with pytest.raises(UserError, match="another process is training there"), claimed(tmp_path):
            pass
    finally:
        holder.kill()
        holder.join()
    with locked(tmp_path, wait=False), pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
        pass


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_without_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def missing(*_: object) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr("fcntl.flock", missing)
    done = False
    with claimed(tmp_path / "run"):
        done = True
    assert done
    assert not (tmp_path / "run").exists()


def test_a_lock_makes_no_folder_foreign(tmp_path: Path) -> None:
    """Nothing is written for it."""
    out = tmp_path / "run"
    with claimed(out):
        assert not list(out.iterdir())
        assert find_start(RunFolder(out), tiny_recipe(), "", resume=False) is None
        (out / "tensorboard").mkdir()
    assert find_start(RunFolder(out), tiny_recipe(), "", resume=False) is None
    assert not list(find_runs(tmp_path))


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with claimed(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())
