"""Shared by the tests of data: a cache of their own, and text that is no two times the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from waveletgpt.data import DataSettings

WORDS = [
    *("the", "a", "wave", "let", "of", "small", "and", "large", "scale,", "time;", "1", "20", "300"),
    *("café", "naïve", "Ünïcode", "東京", "über", "½", "—", "end.\n"),
]


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    return DataSettings(cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def prose() -> Callable[[int, int], str]:
    """prose(words, seed): that many words."""

    def make(words: int, seed: int = 0) -> str:
        return " ".join(random.Random(seed).choices(WORDS, k=words))

    return make


@pytest.fixture
def folder(tmp_path: Path, prose: Callable[[int, int], str]) -> Path:
    """300 files of text in two sub-folders: enough for a split by hash."""
    root = tmp_path / "corpus"
    for index in range(300):
        path = root / "ab"[index % 2] / f"{index:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(prose(60, index), encoding="utf-8")
    return root
