"""Which part of the data is for training, validation and the final test; fixed by content, never overlapping.

Many documents: each goes where a hash of its content says, so that copies stay together and new files move no others.
One document, or too few for the hash to give each split its share: the first 90 % of the bytes, the next 5, the last 5.
Recordings that are too few for the hash are first dealt out whole, in the order of their hashes; only where that gives
no split its share, either, are they divided by position, with a gap between the splits.
Data that comes in splits keeps them; one that it lacks is taken from its training documents, whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np

from waveletgpt.data.settings import DataSettings
from waveletgpt.data.store import SPLITS
from waveletgpt.errors import UserError

HASHED = 1 << 20
"""Bytes at a document's start that decide its split: enough to tell documents apart, few enough to hold."""

BLOCK = 1 << 20
"""Bytes handed on at a time."""

_INDEX = np.dtype([("end", "<u8"), ("point", "<f8"), ("split", "u1")])


def point_of(content: bytes | memoryview) -> float:
    """A number in [0, 1] from the bytes a document starts with (the first `HASHED` are looked at)."""
    return int.from_bytes(hashlib.sha256(content[:HASHED]).digest()[:8]) / 2**64


def split_at(point: float, settings: DataSettings) -> str:
    """The split of a document with this `point_of` its content."""
    if point < settings.test_fraction:
        return "test"
    return "validation" if point < settings.test_fraction + settings.validation_fraction else "train"


def split_of(given: str | None, point: float, settings: DataSettings, own: Set[str]) -> str:
    """The split that the source has `given` a document, else that of its content, from its `point_of`.

    `own` are the splits that the source comes in: one that is not among them is taken from training.
    """
    if given != "train":
        return given or split_at(point, settings)
    test = 0.0 if "test" in own else settings.test_fraction
    validation = 0.0 if "validation" in own else settings.validation_fraction
    return "test" if point < test else "validation" if point < test + validation else "train"


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

    def end_document(self, split: str, size: int, point: float = 0.0) -> None:
        """Close the document, of `size` bytes in all; documents left without any are forgotten.

        `point` is its place in the order in which whole documents are dealt out, `point_of` its content.
        """
        if size:
            self.sizes[split] += size
            self.documents += 1
            self._index.write(np.array([(self.size, point, SPLITS.index(split))], _INDEX).data)

    def drop_document(self) -> None:
        """Forget what was written of the open document."""
        self._text.seek(self.size)
        self._text.truncate()

    def divide(
        self,
        settings: DataSettings,
        own: Set[str] = frozenset(),
        *,
        unit: int = 0,
        gap: int = 0,
        whole: bool = False,
    ) -> None:
        """Decide the splits: the source's `own`, or by each document's hash, by dealing them out, or by position.

        By position, splits start at whole characters, or at multiples of `unit` bytes; `gap` units before the start of
        each but the first belong to none. `whole` documents are never cut, however far that is from the shares, unless
        there are fewer different ones than splits: then all are for training. Raises UserError if one of the source's
        own splits is empty, or if its training documents are too few to take a missing one from.
        """
        shares = {"validation": settings.validation_fraction, "test": settings.test_fraction}
        total = self.size
        self._cuts: list[tuple[int, str | None]] = []
        self.gap = 0
        if own:
            self.method = "given"
            self._complete(shares, own)
        elif _near(self.sizes, shares):
            self.method = "hash"
        elif self._deal(shares, whole):
            self.method = "dealt"
        elif whole:
            self.method, self.sizes = "none", {"train": total, "validation": 0, "test": 0}
        else:
            self.method = "position"
            self.gap = gap = min(gap, int(total * min(filter(None, shares.values()))) // max(unit, 1) // 10)
            held_out = settings.validation_fraction + settings.test_fraction
            validation = self._start(round(total * (1 - held_out)), unit)
            test = self._start(round(total * (1 - settings.test_fraction)), unit)
            self._cuts = [(validation - gap * unit, "train"), (validation, None), (test, "validation"), (total, "test")]
            if test < total:
                self._cuts[2:3] = [(test - gap * unit, "validation"), (test, None)]
            starts = [0, *(end for end, _ in self._cuts)]
            self.sizes = dict.fromkeys(SPLITS, 0)
            for start, (end, split) in zip(starts, self._cuts, strict=False):
                if split:
                    self.sizes[split] += end - start

    def _complete(self, shares: dict[str, float], own: Set[str]) -> None:
        """Check the splits that the source gives, and take what it lacks from its training documents."""
        empty = [split for split in SPLITS if split in own and not self.sizes[split]]
        if empty:
            raise UserError(f"the data comes in splits of its own, but nothing in its {empty[0]} split can be used")
        missing = {split: share for split, share in shares.items() if split not in own and share}
        pool = {split: size for split, size in self.sizes.items() if split not in own or split == "train"}
        if not _near(pool, missing) and not self._deal(missing, whole=True, pool=set(pool)):
            names = " and ".join(missing)
            raise UserError(f"the training split is too few documents to take {names} from: add a folder {names}")

    def _deal(self, shares: dict[str, float], whole: bool, pool: Set[str] = frozenset(SPLITS)) -> bool:
        """Give the whole documents of the splits `pool`, in the order of their points, to test, validation and
        training; whether that works."""
        self._index.seek(0)
        index = np.frombuffer(bytearray(self._index.read()), _INDEX)
        lengths = np.diff(index["end"], prepend=0)
        dealt = np.isin(index["split"], [SPLITS.index(split) for split in pool])
        points, group = np.unique(index["point"][dealt], return_inverse=True)  # copies have the same point
        if len(points) <= sum(map(bool, shares.values())):
            return False
        ends = np.cumsum(np.bincount(group, lengths[dealt]))
        order = np.full(len(points), SPLITS.index("train"), np.uint8)
        first, wanted = 0, 0.0
        others = sum(map(bool, shares.values()))
        for split in ("test", "validation"):
            if not shares.get(split):
                continue
            wanted += shares[split] * ends[-1]
            last = max(first + 1, int(np.abs(ends - wanted).argmin()) + 1)
            last = min(last, len(points) - others)  # something is left for the others
            others -= 1
            order[first:last] = SPLITS.index(split)
            first = last
        index["split"][dealt] = order[group]
        each = np.bincount(index["split"], lengths, len(SPLITS))
        sizes = dict(zip(SPLITS, each.astype(int).tolist(), strict=True))
        if not (whole or _near(sizes, shares)):
            return False
        self._index.seek(0)
        self._index.write(index.tobytes())
        self.sizes = sizes
        return True

    def _start(self, position: int, unit: int) -> int:
        if unit:
            return position // unit * unit
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
            for end, _, code in np.frombuffer(block, _INDEX).tolist():
                if not self._cuts:
                    yield SPLITS[code], start, end, True
                    start = end
                while self._cuts and start < end:
                    while cuts[0][0] <= start:
                        cuts.pop(0)
                    stop = min(end, cuts[0][0])
                    if cuts[0][1]:
                        yield cuts[0][1], start, stop, stop == end
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


def _near(sizes: dict[str, int], shares: dict[str, float]) -> bool:
    """Whether each split has its share of the whole, give or take a factor of 2."""
    total = max(1, sum(sizes.values()))
    return all(share / 2 <= sizes[split] / total <= share * 2 for split, share in shares.items())
