"""Which part of the data is for training, validation and the final test; fixed by content, never overlapping.

Many documents: each goes where a hash of its content says, so that copies stay together and new files move no others.
One document, or too few for the hash to give each split its share: the first 90 % of the bytes, the next 5, the last 5.
Recordings that are too few for the hash are first dealt out whole, in the order of their hashes; only where that gives
no split its share, either, are they divided by position, with a gap between the splits.
Data that comes in splits keeps them; one that it lacks is taken from its training documents, whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from waveletgpt.data.parallel import batches
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.store import SPLITS, sync
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


SEGMENT = 1 << 23
"""Bytes of a spool that lie in one file, and are given back to the disk together."""


class Piece(NamedTuple):
    """A run of bytes of one document."""

    split: str
    data: bytes
    ends_document: bool
    place: tuple[int, int]
    """Where to continue after it: the place in the spool where it ends, and the place up to which was read."""


class _Segments:
    """Bytes on disk, in files of `SEGMENT`: appended at the end, read anywhere, deleted from the start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, tuple[int, BinaryIO]] = {}
        self._freed = 0
        self._unsafe: set[int] = set()
        """The files written since `sync`."""
        self.end = 0

    def _path(self, number: int) -> Path:
        return self._folder / f"documents-{number}.bin"

    def _file(self, mode: str, number: int) -> BinaryIO:
        if mode in self._files and self._files[mode][0] == number:
            return self._files[mode][1]
        self.close(mode)
        path = self._path(number)
        file: BinaryIO = path.open("rb" if mode == "r" else "r+b" if path.exists() else "wb")
        if mode == "w":
            file.seek(self.end % SEGMENT)
        self._files[mode] = (number, file)
        return file

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            number, at = divmod(self.end, SEGMENT)
            self._unsafe.add(number)
            taken = self._file("w", number).write(rest[: SEGMENT - at])
            self.end += taken
            rest = rest[taken:]
        return len(data)

    def read(self, start: int, count: int) -> bytes:
        """Up to `count` bytes from `start` on; fewer at the end."""
        if "w" in self._files:
            self._files["w"][1].flush()
        found = b""
        stop = min(start + count, self.end)
        while start < stop:
            number, at = divmod(start, SEGMENT)
            file = self._file("r", number)
            file.seek(at)
            block = file.read(min(stop - start, SEGMENT - at))
            found = found + block if found else block
            start += len(block)
        return found

    def truncate(self, end: int) -> None:
        self.close()
        for path in self._folder.glob("documents-*.bin"):
            start = int(path.stem.removeprefix("documents-")) * SEGMENT
            if start >= end:
                path.unlink()
                self._unsafe.discard(start // SEGMENT)
            elif path.stat().st_size > end - start:
                os.truncate(path, end - start)
        self.end = end

    def free(self, before: int) -> None:
        """Delete the files that end at `before` or earlier."""
        self.close("r")
        for number in range(self._freed, before // SEGMENT):
            self._path(number).unlink(missing_ok=True)
            self._unsafe.discard(number)
        self._freed = max(self._freed, before // SEGMENT)

    def sync(self) -> None:
        """Make sure that what was written is on the disk."""
        self.close("w")
        for number in self._unsafe:
            with self._path(number).open("r+b") as file:
                sync(file)
        self._unsafe.clear()

    def close(self, mode: str | None = None) -> None:
        for each in [mode] if mode else [*self._files]:
            if each in self._files:
                self._files.pop(each)[1].close()


class Spool:
    """All documents of a source, one after the other in temporary files, with where each ends and its split.

    Reading, unpacking and normalising happen once, in bounded memory; what comes after (splitting, an alphabet,
    training a tokenizer, encoding) then reads the parts it needs, as often as it needs. What was encoded is given back
    to the disk with `free`, so that text and tokens are never there in full at once.
    """

    def __init__(self, folder: Path, state: dict[str, Any] | None = None) -> None:
        """With `state`, one that `state()` gave, the spool that another process has left in `folder`."""
        self._text = _Segments(folder)
        self._index = (folder / "index.bin").open("r+b" if state else "w+b")
        self.sizes = dict.fromkeys(SPLITS, 0)
        self.documents = 0
        self.method = ""
        self.gap = 0
        self._cuts: list[tuple[int, str | None]] = []
        if state:
            self._text.truncate(state["text"])
            self._index.truncate(state["index"])
            self._index.seek(state["index"])
            self.sizes, self.documents, self.method = state["sizes"], state["documents"], state["method"]
            self.gap, self._cuts = state["gap"], [(int(end), split) for end, split in state["cuts"]]

    def state(self) -> dict[str, Any]:
        """What `Spool` needs to go on from here, once all that was written is on the disk."""
        self._text.sync()
        sync(self._index)
        return {
            "text": self._text.end,
            "index": os.fstat(self._index.fileno()).st_size,  # it may be in use: its place stays
            "sizes": self.sizes,
            "documents": self.documents,
            "method": self.method,
            "gap": self.gap,
            "cuts": self._cuts,
        }

    @property
    def written(self) -> int:
        """Bytes written, those of the open document too."""
        return self._text.end

    def free(self, before: int) -> None:
        """Delete what lies before a place; it cannot be read again."""
        self._text.free(before)

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
        self._text.truncate(self.size)

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
        self._cuts = []
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
        following = self._text.read(position, 3)  # a character has at most three bytes after its first
        return position + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))

    def pieces(
        self,
        cut: Callable[[bytes], int],
        only: str | None = None,
        since: tuple[int, int] = (0, 0),
        size: int | None = None,
    ) -> Iterator[Piece]:
        """The documents in order, in pieces of about `size` bytes (default: `BLOCK`); with `only`, those of one split.

        With `since`, the `place` of a piece, those after it.
        `cut(block)` says how many bytes of a block may be handed on before more of its document is known (0: none yet).
        """
        for split, start, stop, ends in self._ranges():
            if only not in (None, split) or stop <= since[0]:
                continue
            rest = b""
            if start < since[0]:
                start = max(since)
                rest = self._text.read(since[0], start - since[0])
            while start < stop:
                block = rest + self._text.read(start, min(size or BLOCK, stop - start))
                start += len(block) - len(rest)
                done = start == stop
                length = len(block) if done else cut(block)
                rest = block[length:]
                if length:
                    yield Piece(split, block[:length], done and ends, (start - len(rest), start))

    def _ranges(self) -> Iterator[tuple[str, int, int, bool]]:
        """(split, start, stop, ends a document), in order."""
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

    def batches(self, cut: Callable[[bytes], int], size: int, since: tuple[int, int] = (0, 0)) -> Iterator[list[Piece]]:
        """The pieces, those after the place `since`, in lists of about `size` bytes."""
        return batches(self.pieces(cut, since=since, size=min(size, BLOCK)), size)


def _near(sizes: dict[str, int], shares: dict[str, float]) -> bool:
    """Whether each split has its share of the whole, give or take a factor of 2."""
    total = max(1, sum(sizes.values()))
    return all(share / 2 <= sizes[split] / total <= share * 2 for split, share in shares.items())
