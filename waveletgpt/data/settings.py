"""The settings of data preparation: the docstrings under the fields become `--help`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from waveletgpt.errors import UserError


@dataclass(frozen=True)
class DataSettings:
    """What is read, how it becomes tokens, and where stores are kept."""

    column: str | None = None
    """Column of JSONL, CSV, TSV and Parquet files that holds the text (default: `text`, else `content`)."""
    vocab_size: int = 4096
    """Size of the vocabulary that `--modality bpe` trains, the special token included."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer, by name or folder, for `--modality bpe` instead of one trained on the data."""
    include: str | None = None
    """Only files whose name or path matches this glob; several are separated by commas: `*.md,*.rst`."""
    exclude: str | None = None
    """No files whose name or path matches this glob; several are separated by commas."""
    validation_fraction: float = 0.05
    """Share of the data held out for validation."""
    test_fraction: float = 0.05
    """Share of the data held out for the final test; 0 for none."""
    cache_dir: str | None = None
    """Where stores and downloads are kept (default: $WAVELETGPT_CACHE, else ~/.cache/waveletgpt)."""
    data_dir: str | None = None
    """A folder with copies of named data sets that are already there: nothing is downloaded then."""

    def __post_init__(self) -> None:
        for name, low in (("validation_fraction", False), ("test_fraction", True)):
            value = getattr(self, name)
            if not math.isfinite(value) or not 0 <= value < 1 or (value == 0 and not low):
                raise UserError(f"{name} is {value}: give a number {'from' if low else 'above'} 0 and below 1")
        if self.validation_fraction + self.test_fraction >= 1:
            raise UserError(
                f"validation_fraction {self.validation_fraction} and test_fraction {self.test_fraction} leave nothing "
                "to train on: their sum must be below 1"
            )

    @property
    def cache(self) -> Path:
        """The folder of stores and downloads."""
        chosen = self.cache_dir or os.environ.get("WAVELETGPT_CACHE")
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "waveletgpt"
