"""What every kind of data offers, so that everything after the token store is shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources import Source
from waveletgpt.data.store import StoreWriter


@dataclass(frozen=True)
class SampleFile:
    """A generated sample in its own form: `kind` "text", "audio", "image" or "music"."""

    kind: str
    path: Path
    text: str | None = None
    """The sample itself, where it is text."""


class Modality(Protocol):
    """One kind of data: files become tokens, tokens become something one can read, hear or see."""

    @property
    def name(self) -> str:
        """What `--modality` calls it."""

    @property
    def description(self) -> str:
        """One line for `waveletgpt data list`."""

    def identity(self, settings: DataSettings) -> dict[str, Any]:
        """The settings that change this modality's tokens: they are part of the store's fingerprint."""

    def prepare(self, source: Source, settings: DataSettings, writer: StoreWriter, progress: bool) -> None:
        """Read the source and write its tokens (and tokenizer) with `writer`, up to and including `finish`."""

    def encode_prompt(self, prompt: str, tokenizer: Any) -> list[int]:
        """Tokens of what a user gives to continue: a text, or the path of a file."""

    def write_sample(self, tokens: Sequence[int], tokenizer: Any, stem: Path) -> SampleFile:
        """Write generated tokens as a file named `stem` plus a suffix; survives any sequence of tokens."""
