"""Shared by the tests of classifiers: tasks and recordings prepared in a cache of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.classify.recordings import RATE
from waveletgpt.classify.examples import ExampleStore
from waveletgpt.classify.long_range_arena import prepare_task
from waveletgpt.classify.settings import TaskSettings


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., ExampleStore]:
    """prepare(task, data, **settings) in a cache of the test's own."""

    def make(task: str, data: Path | str | None = None, cache: str = "cache", **changes: Any) -> ExampleStore:
        chosen = TaskSettings(cache_dir=str(tmp_path / cache), **changes)
        return prepare_task(task, None if data is None else str(data), chosen, progress=False)

    return make


@pytest.fixture
def chosen(tmp_path: Path) -> TaskSettings:
    """Settings for recordings of `RATE`, in clips of a second."""
    return TaskSettings(cache_dir=str(tmp_path / "cache"), sample_rate=RATE, clip_seconds=1.0)
