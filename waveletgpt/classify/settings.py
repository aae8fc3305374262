"""The settings of labelled examples: the docstrings under the fields become `--help`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from waveletgpt.errors import UserError


@dataclass(frozen=True)
class TaskSettings:
    """Which examples, how long they are, and where they are kept."""

    length: int | None = None
    """Longest input in tokens: longer texts are cut, pictures resized to as many pixels (default: the task's)."""
    min_length: int | None = None
    """Shortest expression of `listops`, in tokens (default: a quarter of the longest)."""
    train_examples: int | None = None
    """Examples to train on (default: all there are; of generated tasks the published number)."""
    validation_examples: int | None = None
    """Examples to choose by (default: all; a tenth of those to train on if the data has none of its own)."""
    test_examples: int | None = None
    """Examples of the final test (default: all; of generated tasks the published number)."""
    data_seed: int = 0
    """Which examples are generated, and which ones a smaller number leaves."""
    clip_seconds: float = 1.0
    """Recordings are cut into clips of so many seconds, whose scores are averaged."""
    sample_rate: int = 16_000
    """Samples a second to which recordings are brought."""
    fold: int = 1
    """Which of ESC-50's five folds, or of UrbanSound8K's ten, is the test split."""
    cache_dir: str | None = None
    """Where stores and downloads are kept (default: $WAVELETGPT_CACHE, else ~/.cache/waveletgpt)."""
    data_dir: str | None = None
    """A folder with copies of named data sets that are already there: nothing is downloaded then."""

    def __post_init__(self) -> None:
        for name in ("length", "min_length", "train_examples", "validation_examples", "test_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: give 1 or more")
        if self.length and self.min_length and self.min_length > self.length:
            raise UserError(f"min_length is {self.min_length}, but length {self.length}: give at most that")
        if self.data_seed < 0:
            raise UserError(f"data_seed is {self.data_seed}: give 0 or more")
        if not 0.01 <= self.clip_seconds <= 600:
            raise UserError(f"clip_seconds is {self.clip_seconds}: give 0.01 to 600 seconds")
        if not 1000 <= self.sample_rate <= 192_000:
            raise UserError(f"sample_rate is {self.sample_rate}: give 1000 to 192000 samples a second")
        if not 1 <= self.fold <= 10:
            raise UserError(f"fold is {self.fold}: give 1 to 10, for ESC-50 1 to 5")

    @property
    def cache(self) -> Path:
        """The folder of stores and downloads."""
        chosen = self.cache_dir or os.environ.get("WAVELETGPT_CACHE")
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "waveletgpt"

    def wanted(self, split: str) -> int | None:
        """How many examples of "train", "validation" or "test" are asked for; None for as many as there are."""
        return getattr(self, f"{split}_examples")
