"""The settings of data preparation. The help of the command line shows the docstrings of the fields."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from annotated_types import Interval

from waveletgpt.errors import UserError
from waveletgpt.settings import NotNegative, Positive, SampleRate, Settings

_Number = TypeVar("_Number", int, float)
ModalityName = Literal["text8", "chars", "bytes", "bpe", "audio", "acoustic", "images", "music", "listops"]


@dataclass(frozen=True)
class DataSettings(Settings):
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
    validation_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    """Share of the data held out for validation."""
    test_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.05
    """Share of the data held out for the final test; 0 for none."""
    sample_rate: SampleRate = 16_000
    """Samples a second to which recordings are brought (modality audio; acoustic takes the codec's)."""
    codec: str = "facebook/encodec_24khz"
    """EnCodec, Mimi or DAC by hub name or folder, for modality acoustic."""
    codebooks: Positive = 2
    """How many of the codec's codebooks modality acoustic takes, the coarsest first: so many tokens a frame."""
    image_size: Annotated[int, Interval(gt=0, le=1024)] = 32
    """Pictures are cut to their centre square and resized to so many pixels a side (modality images)."""
    image_mode: Literal["grey", "rgb"] = "grey"
    """Pixels of modality images: grey, one token each, or rgb, three."""
    transpose: str | None = None
    """Copies of the training pieces, shifted by these semitones, for modality music: `transpose=-3,-2,2,3`."""
    tempo_scale: str | None = None
    """Copies of the training pieces, at these times the speed, for modality music: `0.95,1.05`."""
    listops_length: str = "500-2000"
    """Shortest and longest expression of the data set `listops`, in tokens."""
    listops_count: Positive = 20_000
    """How many expressions the data set `listops` has."""
    listops_seed: NotNegative = 0
    """Which expressions the data set `listops` has."""
    cache_dir: str | None = None
    """Where stores and downloads are kept (default: $WAVELETGPT_CACHE, else ~/.cache/waveletgpt)."""
    data_dir: str | None = None
    """A folder with copies of named data sets that are already there: nothing is downloaded then."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        self.semitones()
        self.tempos()
        self.listops_lengths()

    def semitones(self) -> list[int]:
        """The semitones of `transpose`, after 0 for the pieces as they are; UserError where it is no such list."""
        return list(dict.fromkeys([0, *_numbers("transpose", self.transpose, int, -60, 60)]))

    def tempos(self) -> list[float]:
        """The factors of `tempo_scale`, after 1 for the pieces as they are; UserError where it is no such list."""
        return list(dict.fromkeys([1.0, *_numbers("tempo_scale", self.tempo_scale, float, 0.25, 4)]))

    def listops_lengths(self) -> tuple[int, int]:
        """Shortest and longest expression, in tokens; UserError where `listops_length` is no such range."""
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
