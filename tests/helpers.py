"""Small real inputs for the tests: a generated text, its token store, a recipe that trains in a second."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from waveletgpt.data import DataSettings, TokenStore, prepare
from waveletgpt.training.recipe import Recipe

TEXT = "the cat sat on a mat while seven quiet birds sang in old trees and rain fell over the long grey road home"
WORDS = TEXT.split(" ")


def write_text(path: Path, words: int = 6000, seed: int = 0) -> Path:
    """A file of random words: learnable in a few steps (letters of a word follow each other)."""
    rng = random.Random(seed)
    path.write_text(" ".join(rng.choice(WORDS) for _ in range(words)), encoding="utf-8")
    return path


def make_store(folder: Path, words: int = 6000) -> TokenStore:
    """A chars store of generated text, cached below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_text(folder / "words.txt", words)
    return prepare(str(path), "chars", DataSettings(cache_dir=str(folder / "cache")), progress=False)


def with_meta(key: str, value: Any) -> Callable[[Path], None]:
    """A change of a store's meta.json, to be made in a folder."""

    def change(path: Path) -> None:
        meta = json.loads((path / "meta.json").read_text())
        meta[key] = value
        (path / "meta.json").write_text(json.dumps(meta))

    return change


def tiny_recipe(**changes: object) -> Recipe:
    """2 blocks of width 16 on 16 tokens, 12 steps, a checkpoint every 3."""
    base = {
        "preset": "tiny",
        "max_steps": 12,
        "batch_size": 4,
        "device": "cpu",
        "modality": "chars",
        "n_embd": 16,
        "n_head": 2,
        "n_positions": 16,
        "eval_every": 3,
        "eval_windows": 8,
        "log_every": 1,
        "save_every": 3,
        "samples": 1,
        "sample_tokens": 8,
        "threads": 1,
    }
    return Recipe().override({**base, **changes}, "test")


def waveletgpt(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, as a user does."""
    from tests.processes import begin

    typed = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = begin(_typed, typed, out=out, err=err)
        process.join(300)
        ended = process.exitcode is not None
        process.kill()
        told = [file.read_text(encoding="utf-8") for file in (out, err)]
        assert ended, f"waveletgpt {typed} did not end: {told}"
        return subprocess.CompletedProcess(typed, process.exitcode, *told)


def _typed(words: list[str]) -> None:
    from waveletgpt.cli import main

    sys.argv = ["waveletgpt", *words]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    main()
