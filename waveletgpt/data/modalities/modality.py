"""What every kind of data offers, so that everything after the token store is shared."""

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
    """Why a file is skipped: it is not of the kind that is read, or broken."""


@dataclass(frozen=True)
class SampleFile:
    """A generated sample in its own form: `kind` "text", "audio", "image" or "music"."""

    kind: str
    path: Path
    text: str | None = None
    """The sample itself, where it is text."""
    repaired: str = ""
    """Which tokens made no sense, how many, and what became of them; empty where all did."""


class Modality(Protocol):
    """One kind of data: files become tokens, tokens become something one can read, hear or see."""

    @property
    def name(self) -> str:
        """What the setting `modality` calls it."""

    @property
    def description(self) -> str:
        """One line for `waveletgpt data list`."""

    @property
    def suffixes(self) -> frozenset[str]:
        """Endings of file names, such as `.wav`, from which it is told; empty: it has to be asked for."""

    @property
    def suppress_tokens(self) -> tuple[int, ...]:
        """Tokens that are never generated."""

    def identity(self, settings: DataSettings) -> dict[str, Any]:
        """The settings that change this modality's tokens: they are part of the store's fingerprint."""

    def prepare(self, source: Source, settings: DataSettings, writer: StoreWriter, progress: bool) -> None:
        """Read the source and write its tokens (and tokenizer) with `writer`, up to and including `finish`."""

    def encode_prompt(self, prompt: str, tokenizer: Any) -> list[int]:
        """Tokens of what a user gives to continue: a text, or the path of a file."""

    def excerpts(self, tokens: np.ndarray, count: int, tokenizer: Any) -> list[list[int]]:
        """`count` prompts out of a split's tokens, always the same: the beginnings of the samples in reports."""

    def new_tokens(self, prompt: Sequence[int], tokenizer: Any) -> int:
        """How many tokens suit as a continuation of `prompt`: what completes a picture, half a second of sound."""

    def write_sample(self, tokens: Sequence[int], tokenizer: Any, stem: Path) -> SampleFile:
        """Write generated tokens as a file named `stem` plus a suffix; survives any sequence of tokens."""


def evenly_spaced(tokens: np.ndarray, count: int, length: int, unit: int = 1) -> list[list[int]]:
    """`count` runs of `length` tokens (half of all at most) at even distances, each from a multiple of `unit` on."""
    length = max(1, min(length, len(tokens) // 2))
    starts = (i * (len(tokens) - length) // count for i in range(count))
    return [[int(token) for token in tokens[start - start % unit :][:length]] for start in starts]


def counted(repairs: Counter[str]) -> str:
    """`SampleFile.repaired` of how often each repair was made."""
    return ", ".join(f"{count:,} {what}" for what, count in repairs.items() if count)
