"""The settings of data preparation: the docstrings under the fields are what the command line says of its options."""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from waveletgpt.errors import UserError

_Number = TypeVar("_Number", int, float)
IMAGE_MODES = ("grey", "rgb")


@dataclass(frozen=True)
class DataSettings:
    """What is read, how it becomes tokens, and where stores are kept."""

    column: str | None = None
    """Column of JSONL, CSV, TSV and Parquet files that holds the text, by name, or by position from 0 where a CSV or
    TSV file has no such name (default: `text`, else `content`)."""
    encoding: str | None = None
    """Encoding of text files and tables that have no mark, such as `cp1252` or `gbk` (default: UTF-8)."""
    vocab_size: int = 4096
    """Size of the vocabulary that modality bpe trains, the special token included."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer, by name or folder, for modality bpe instead of one trained on the data; for
    modality chars the folder of a run or store whose characters to take."""
    include: str | None = None
    """Only files whose name or path matches this glob; several are separated by commas: `*.md,*.rst`."""
    exclude: str | None = None
    """No files whose name or path matches this glob; several are separated by commas."""
    validation_fraction: float = 0.05
    """Share of the data held out for validation."""
    test_fraction: float = 0.05
    """Share of the data held out for the final test; 0 for none."""
    sample_rate: int = 16_000
    """Samples a second to which recordings are brought (modality audio; acoustic takes the codec's)."""
    codec: str = "facebook/encodec_24khz"
    """EnCodec, Mimi or DAC by hub name or folder, for modality acoustic."""
    codebooks: int = 2
    """How many of the codec's codebooks modality acoustic takes, the coarsest first: so many tokens a frame."""
    image_size: int = 32
    """Pictures are cut to their centre square and resized to so many pixels a side (modality images)."""
    image_mode: str = "grey"
    """Pixels of modality images: "grey", one token each, or "rgb", three."""
    transpose: str | None = None
    """Copies of the training pieces, shifted by these semitones, for modality music: `transpose=-3,-2,2,3`."""
    tempo_scale: str | None = None
    """Copies of the training pieces, at these times the speed, for modality music: `0.95,1.05`."""
    listops_length: str = "500-2000"
    """Shortest and longest expression of the data set `listops`, in tokens."""
    listops_count: int = 20_000
    """How many expressions the data set `listops` has."""
    listops_seed: int = 0
    """Which expressions the data set `listops` has."""
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

        if self.encoding is not None:
            try:
                "".encode(self.encoding)
                codecs.getincrementaldecoder(self.encoding)()
            except (LookupError, ValueError, TypeError):
                raise UserError(
                    f'encoding is "{self.encoding}", which is not known: give one such as utf-8, cp1252, gbk'
                ) from None
        if not 1000 <= self.sample_rate <= 192_000:
            raise UserError(f"sample_rate is {self.sample_rate}: give 1000 to 192000 samples a second")
        if self.codebooks < 1:
            raise UserError(f"codebooks is {self.codebooks}: give 1 or more")
        if not 1 <= self.image_size <= 1024:
            raise UserError(f"image_size is {self.image_size}: give 1 to 1024 pixels")
        if self.image_mode not in IMAGE_MODES:
            raise UserError(f'image_mode is "{self.image_mode}": give {" or ".join(IMAGE_MODES)}')
        self.semitones()
        self.tempos()
        self.listops_lengths()
        if self.listops_count < 1 or self.listops_seed < 0:
            raise UserError(
                f"listops_count is {self.listops_count}, listops_seed {self.listops_seed}: "
                "give at least one expression, and a seed that is not negative"
            )

    def semitones(self) -> list[int]:
        """What training pieces are shifted by, 0 (as they are) first; raises UserError for anything but such a list."""
        return list(dict.fromkeys([0, *_numbers("transpose", self.transpose, int, -60, 60)]))

    def tempos(self) -> list[float]:
        """What the speed of training pieces is multiplied by, 1 first; raises UserError for anything but such a
        list."""
        return list(dict.fromkeys([1.0, *_numbers("tempo_scale", self.tempo_scale, float, 0.25, 4)]))

    def listops_lengths(self) -> tuple[int, int]:
        """Shortest and longest expression, in tokens; raises UserError for anything but such a range."""
        low, _, high = self.listops_length.partition("-")
        if low.strip().isdecimal() and high.strip().isdecimal() and 1 <= int(low) <= int(high) <= 1_000_000:
            return int(low), int(high)
        raise UserError(f'listops_length is "{self.listops_length}": give shortest and longest, such as 50-200')

    @property
    def cache(self) -> Path:
        """The folder of stores and downloads."""
        chosen = self.cache_dir or os.environ.get("WAVELETGPT_CACHE")
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "waveletgpt"


def _numbers(
    name: str, value: str | None, kind: Callable[[str], _Number], low: _Number, high: _Number
) -> list[_Number]:
    try:
        found = [kind(part) for part in (value or "").split(",") if part.strip()]
    except ValueError:
        found = [low - 1]
    if not all(low <= number <= high for number in found):
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f'{name} is "{value}": give {what} from {low} to {high}, separated by commas')
    return found
