"""The interface of every kind of data. It lets all kinds share the code from the token store on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.files import Source
from waveletgpt.data.store import StoreWriter

if TYPE_CHECKING:
    import numpy as np


class Unusable(Exception):
    """The reason to skip a file: it is of another kind, or broken."""


@dataclass(frozen=True)
class SampleFile:
    """A generated sample as a file; `kind` is "text", "audio", "image" or "music"."""

    kind: str
    path: Path
    text: str | None = None
    """The sample itself if it is text."""
    repaired: str = ""
    """Tokens that made no sense: their kind, their number, and what was done with them; "" if there are none."""


class Modality(Protocol):
    """One kind of data: turns files into tokens, and tokens into something to read, hear or see."""

    @property
    def name(self) -> str:
        """Its name in the setting `modality`."""

    @property
    def description(self) -> str:
        """One line for `waveletgpt data list`."""

    @property
    def suffixes(self) -> frozenset[str]:
        """Suffixes of file names, such as `.wav`, for which it is chosen; empty: only if the user chooses it."""

    @property
    def suppress_tokens(self) -> tuple[int, ...]:
        """Tokens that are never generated."""

    def identity(self, settings: DataSettings) -> dict[str, Any]:
        """The settings that change this modality's tokens, for the store's fingerprint."""

    def prepare(self, source: Source, settings: DataSettings, writer: StoreWriter, progress: bool) -> None:
        """Read the source and write its tokens (and tokenizer) with `writer`, up to and including `finish`."""

    def encode_prompt(self, prompt: str, tokenizer: Any) -> list[int]:
        """Tokens of a user's prompt: a text, or the path of a file."""

    def excerpts(self, tokens: np.ndarray, count: int, tokenizer: Any) -> list[list[int]]:
        """`count` prompts from a split's tokens, always the same: the beginnings of samples in reports."""

    def new_tokens(self, prompt: Sequence[int], tokenizer: Any) -> int:
        """A good number of new tokens after `prompt`, such as the rest of a picture or half a second of sound."""

    def write_sample(self, tokens: Sequence[int], tokenizer: Any, stem: Path) -> SampleFile:
        """Write generated tokens as a file named `stem` plus a suffix. It must work for any sequence of tokens."""


def evenly_spaced(tokens: np.ndarray, count: int, length: int, unit: int = 1) -> list[list[int]]:
    """`count` excerpts of `length` tokens (at most half of all) at even distances; each starts at a multiple of
    `unit`."""
    length = max(1, min(length, len(tokens) // 2))
    starts = (i * (len(tokens) - length) // count for i in range(count))
    return [[int(token) for token in tokens[start - start % unit :][:length]] for start in starts]


def counted(repairs: Counter[str]) -> str:
    """The text of `SampleFile.repaired` from the number of each repair."""
    return ", ".join(f"{count:,} {what}" for what, count in repairs.items() if count)
