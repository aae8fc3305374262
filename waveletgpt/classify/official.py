"""The Long Range Arena's data as it is published, file by file, read as examples.

Each reader takes a source and the longest input. Files that are none of its task are passed over; broken ones are
named in `source.skipped`.
"""

from __future__ import annotations

import math
import pickletools
import re
import warnings
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from waveletgpt.classify.labelled import Item
from waveletgpt.data.modalities.images import FILE_LIMIT, Shape, Unusable, load, load_cifar
from waveletgpt.data.modalities.listops import OFFICIAL, WORDS, expressions
from waveletgpt.data.sources.files import Document, Source, TooLarge
from waveletgpt.data.splits import point_of
from waveletgpt.errors import UserError

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RELEASE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
"""The official files of ListOps, Retrieval, Pathfinder and Path-X: a tar archive of 8 GB."""
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "eval"), "validation")

_CLASS_FOLDER = re.compile(rf"(?:^|/)({'|'.join(SPLIT_NAMES)})/([^/]+)/[^/]+$")
_CIFAR_BATCH = re.compile(r"(?:^|/)(data_batch_\d+|test_batch)(\.bin)?$")
_PLANES = 3 * 32 * 32
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
"""Opcodes of a pickle that stand for a number."""
_LONGEST_LINE = 1 << 24


class Found(NamedTuple):
    """The result of reading a task's data."""

    classes: tuple[str, ...]
    items: Iterator[Item]


def read_listops(source: Source, length: int) -> Found:
    """The official TSV files. Longer expressions are left out, because a part of an expression has no value."""

    def items() -> Iterator[Item]:
        for document in source.files():
            split = OFFICIAL.get(document.name.rpartition("/")[2])
            if split is None:
                continue
            longer = 0
            for number, (*words, _, value) in enumerate(expressions(document, source.skipped)):
                if len(words) > length:
                    longer += 1
                    continue
                yield Item((bytes(words),), value, point_of(bytes(words)), f"{document.name} {number}", split)
            if longer:
                source.skipped.append(f"{document.name}: {longer} expressions of more than {length} tokens")

    return Found(tuple(WORDS[:10]), items())


def read_text(source: Source, length: int) -> Found:
    """Reviews in class folders: the first `length` bytes of each."""
    classes = ("neg", "pos")

    def items() -> Iterator[Item]:
        for document in source.files():
            split, label = _folders(document.name, classes)
            if split is None or label is None:
                continue
            content = _content(document, source)
            if content:
                yield Item((content[:length],), label, point_of(content), document.name, split)

    return Found(classes, items())


def read_retrieval(source: Source, length: int) -> Found:
    """Pairs of papers, one per line: label, two ids and two texts, separated by tabs, without quotes.

    The official texts are in Python's notation of bytes (b'...'); they are used unchanged, as in published results.
    """
    files = {f"new_aan_pairs.{part}.tsv": SPLIT_NAMES[part] for part in ("train", "eval", "test")}
    labels = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}

    def items() -> Iterator[Item]:
        for document in source.files():
            split = files.get(document.name.rpartition("/")[2])
            if split is None:
                continue
            wrong = 0
            for number, line in enumerate(filter(bytes.strip, _lines(document)), 1):
                columns = line.rstrip(b"\r\n").split(b"\t")
                label = labels.get(columns[0])
                if len(columns) == 5 and label is not None and columns[3] and columns[4]:
                    texts = columns[3], columns[4]
                    name = b" ".join(columns[1:3]).decode("utf-8", "replace") or f"{document.name} {number}"
                    cut = (texts[0][:length], texts[1][:length])
                    yield Item(cut, label, point_of(b"\t".join(texts)), name, split)
                    continue
                wrong += 1
                if number == 1:
                    shown = columns[0][:20].decode("utf-8", "replace")
                    found = f'{len(columns)} columns, the first "{shown}"'
                    raise UserError(
                        f"{document.name}: its first line has {found}, not a label 0 or 1, two ids and two texts, "
                        f"separated by tabs; get {RELEASE}"
                    )
            if wrong:
                source.skipped.append(f"{document.name}: {wrong} wrong lines")

    return Found(("unrelated", "related"), items())


def _lines(document: Document) -> Iterator[bytes]:
    rest = b""
    for chunk in document.chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > _LONGEST_LINE:
            raise UserError(f"{document.name} has a line of more than {_LONGEST_LINE >> 20} MB: it is not a table")
    if rest:
        yield rest


def read_images(source: Source, length: int) -> Found:
    """Folders of pictures by class, or the batches of CIFAR-10 in the binary or the Python version."""
    side = side_of(length)
    names = [document.name for document in source.files()]
    if any(map(_CIFAR_BATCH.search, names)):
        return Found(CIFAR10, _cifar_items(source, side))
    classes = tuple(sorted({found[2] for found in map(_CLASS_FOLDER.search, names) if found}))

    def items() -> Iterator[Item]:
        for document in source.files():
            split, label = _folders(document.name, classes)
            if split is not None and label is not None:
                yield from _picture(document, source, side, label, split)

    return Found(classes, items())


def _cifar_items(source: Source, side: int) -> Iterator[Item]:
    for document in source.files():
        batch = _CIFAR_BATCH.search(document.name)
        if not batch:
            continue
        content = _content(document, source)
        try:
            records = content if batch[2] else cifar_records(content)
            labels = records[:: 1 + _PLANES]
            pictures = load_cifar(records, Shape(side, 1))
            if labels and max(labels) >= len(CIFAR10):
                raise Unusable(f"a label is {max(labels)}, but there are {len(CIFAR10)} classes")
        except Unusable as error:
            source.skipped.append(f"{document.name}: {error}")
            continue
        split = "test" if batch[1] == "test_batch" else "train"
        for number, (label, (point, pixels)) in enumerate(zip(labels, pictures, strict=True)):
            yield Item((pixels,), label, point, f"{document.name}/{number}", split)


def cifar_records(content: bytes) -> bytes:
    """Converts a batch of CIFAR-10 from the Python to the binary version: per picture a label and 3 planes.

    The pickle is not executed. Its opcodes are only listed: the numbers after "labels" are the labels, and the longest
    string holds the planes. Raises Unusable for anything else.
    """
    labels = bytearray()
    planes: bytes = b""
    counting = False
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if isinstance(argument, str | bytes):
                counting = argument in ("labels", b"labels")
                if len(argument) > len(planes):
                    planes = argument if isinstance(argument, bytes) else argument.encode("latin-1")
            elif counting and opcode.name in _NUMBERS and isinstance(argument, int):
                labels.append(argument)
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise Unusable(f"not a batch of CIFAR-10's Python version ({error})") from None
    if not labels or len(planes) != len(labels) * _PLANES:
        found = f"{len(labels)} labels, {len(planes):,} bytes of pixels"
        raise Unusable(f"not a batch of CIFAR-10's Python version: {found}")
    pictures = np.frombuffer(planes, np.uint8).reshape(len(labels), _PLANES)
    return np.column_stack([np.frombuffer(labels, np.uint8), pictures]).tobytes()


def read_pathfinder(source: Source, length: int) -> Found:
    """The official pictures imgs/*/sample_*.png with their labels in the text files metadata/*.npy."""
    side = side_of(length)

    def items() -> Iterator[Item]:
        labels: dict[str, int] = {}
        for document in source.files():
            folder, found, _ = document.name.rpartition("metadata/")
            if found and document.name.endswith(".npy"):
                labels |= _metadata(document, folder, source)
        for document in source.files():
            label = labels.pop(document.name, None)
            if label is not None:
                yield from _picture(document, source, side, label, None)
        if labels:
            source.skipped.append(f"{len(labels)} pictures of the metadata are missing, such as {next(iter(labels))}")

    return Found(("apart", "joined"), items())


def _metadata(document: Document, folder: str, source: Source) -> dict[str, int]:
    """The labels of pictures, by name, from lines such as `imgs/0 sample_12.png 12 1 ...`: the fourth field."""
    labels = {}
    for number, line in enumerate(_content(document, source).splitlines(), 1):
        fields = line.decode("utf-8", "replace").split()
        if len(fields) < 4 or fields[3] not in ("0", "1"):
            raise UserError(f"{document.name} line {number} is not metadata: it needs folder, file, number, 0 or 1")
        labels[f"{folder}{fields[0]}/{fields[1]}"] = int(fields[3])
    return labels


def _picture(document: Document, source: Source, side: int, label: int, split: str | None) -> Iterator[Item]:
    """The picture in a file. If the file is not a picture, the reason goes to `source.skipped`."""
    try:
        content = document.read(FILE_LIMIT)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about oddities inside files; real faults raise
            pixels = load(content, Shape(side, 1))
    except (Unusable, TooLarge) as error:
        source.skipped.append(f"{document.name}: {error}")
        return
    yield Item((pixels,), label, point_of(content), document.name, split)


def side_of(length: int) -> int:
    """The side of a square picture of `length` pixels. Raises UserError if `length` is not a square number."""
    side = math.isqrt(length)
    if side * side != length:
        raise UserError(f"length is {length}: pictures are square, give {side * side} or {(side + 1) ** 2}")
    return side


def _folders(name: str, classes: Collection[str]) -> tuple[str | None, int | None]:
    """Split and class of a file from its folders."""
    found = _CLASS_FOLDER.search(name)
    if not found or found[2] not in classes:
        return None, None
    return SPLIT_NAMES[found[1]], list(classes).index(found[2])


def _content(document: Document, source: Source) -> bytes:
    try:
        content = document.read(FILE_LIMIT)
    except TooLarge as error:
        source.skipped.append(f"{document.name}: {error}")
        return b""
    if not content:
        source.skipped.append(f"{document.name}: empty")
    return content
