"""Which part of the data is for training, validation and the final test; fixed by content, never overlapping.

Many documents: each goes where a hash of its content says, so that copies stay together and new files move no others.
One document, or too few for the hash to give each split its share: the first 90 % of the bytes, the next 5, the last 5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from waveletgpt.data.settings import DataSettings
from waveletgpt.data.store import SPLITS

HASHED = 1 << 20
"""Bytes at a document's start that decide its split: enough to tell documents apart, few enough to hold."""

BLOCK = 1 << 20
"""Bytes handed on at a time."""

_INDEX = np.dtype([("end", "<u8"), ("split", "u1")])


def split_by_content(content: bytes, settings: DataSettings) -> str:
    """The split of a document from the bytes it starts with (the first `HASHED` are looked at)."""
    point = int.from_bytes(hashlib.sha256(content[:HASHED]).digest()[:8]) / 2**64
    if point < settings.test_fraction:
        return "test"
    return "validation" if point < settings.test_fraction + settings.validation_fraction else "train"


class Piece(NamedTuple):
    """A run of bytes of one document."""

    split: str
    data: bytes
    ends_document: bool


class Spool:
    """All documents of a source, one after the other in a temporary file, with where each ends and its split.

    Reading, unpacking and normalising happen once, in bounded memory; what comes after (splitting, an alphabet,
    training a tokenizer, encoding) then reads the parts it needs, as often as it needs.
    """

    def __init__(self, folder: Path) -> None:
        self._text = (folder / "documents.bin").open("w+b")
        self._index = (folder / "index.bin").open("w+b")
        self.sizes = dict.fromkeys(SPLITS, 0)
        self.documents = 0
        self.method = ""

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._text.close()
        self._index.close()

    @property
    def size(self) -> int:
        """Bytes of all documents together."""
        return sum(self.sizes.values())

    def write(self, data: bytes) -> int:
        """Add bytes to the open document."""
        return self._text.write(data)

    def end_document(self, split: str, size: int) -> None:
        """Close the document, of `size` bytes in all; documents left without any are forgotten."""
        if size:
            self.sizes[split] += size
            self.documents += 1
            self._index.write(np.array([(self.size, SPLITS.index(split))], _INDEX).data)

    def divide(self, settings: DataSettings, given: bool = False) -> None:
        """Decide the splits: as `given` by the source, by each document's hash, or by position."""
        shares = {"validation": settings.validation_fraction, "test": settings.test_fraction}
        total = self.size
        self._cuts: list[int] = []
        if given and all(self.sizes.values()):
            self.method = "given"
        elif all(share / 2 <= self.sizes[split] / max(total, 1) <= share * 2 for split, share in shares.items()):
            self.method = "hash"
        else:
            self.method = "position"
            held_out = settings.validation_fraction + settings.test_fraction
            validation = self._character_start(round(total * (1 - held_out)))
            test = self._character_start(round(total * (1 - settings.test_fraction)))
            self._cuts = [validation, test, total]
            self.sizes = dict(zip(SPLITS, np.diff([0, *self._cuts]).tolist(), strict=True))

    def _character_start(self, position: int) -> int:
        self._text.seek(position)
        following = self._text.read(3)  # a character has at most three bytes after its first
        return position + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))

    def pieces(self, cut: Callable[[bytes], int], only: str | None = None) -> Iterator[Piece]:
        """The documents in order, in pieces of about `BLOCK` bytes; with `only`, those of one split.

        `cut(block)` says how many bytes of a block may be handed on before more of its document is known (0: none yet).
        """
        for split, start, stop, ends in self._ranges():
            if only not in (None, split):
                continue
            self._text.seek(start)
            rest = b""
            while start < stop:
                block = rest + self._text.read(min(BLOCK, stop - start))
                start += len(block) - len(rest)
                done = start == stop
                length = len(block) if done else cut(block)
                if length:
                    yield Piece(split, block[:length], done and ends)
                rest = block[length:]

    def _ranges(self) -> Iterator[tuple[str, int, int, bool]]:
        """(split, start, stop, ends a document), in order."""
        self._text.flush()
        self._index.seek(0)
        start = 0
        cuts = list(self._cuts)
        while len(block := self._index.read(_INDEX.itemsize << 12)):
            for end, code in np.frombuffer(block, _INDEX).tolist():
                if not self._cuts:
                    yield SPLITS[code], start, end, True
                    start = end
                while self._cuts and start < end:
                    while cuts[0] <= start:
                        cuts.pop(0)
                    stop = min(end, cuts[0])
                    yield SPLITS[len(SPLITS) - len(cuts)], start, stop, stop == end
                    start = stop

    def batches(self, cut: Callable[[bytes], int], size: int) -> Iterator[list[Piece]]:
        """The pieces in lists of about `size` bytes."""
        batch: list[Piece] = []
        gathered = 0
        for piece in self.pieces(cut):
            batch.append(piece)
            gathered += len(piece.data) + 1
            if gathered >= size:
                yield batch
                batch, gathered = [], 0
        if batch:
            yield batch
