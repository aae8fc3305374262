"""The tasks of the Long Range Arena (Tay et al. 2020, https://arxiv.org/abs/2011.04006) as labelled examples.

    store = prepare_task("image", None, TaskSettings(train_examples=20_000))
    store.split("train")[0]         # {"input_ids": (1024,), "labels": ()}

Every input is a row of 8-bit values (bytes of text, grey pixels, words of an expression). Its ids are these values plus
1, as 0 is padding. `listops`, `pathfinder` and `pathx` are generated from a seed unless official files are given.

The official test split is used if there is one, and for nothing but the test. Without an official validation split, a
tenth of the training split becomes validation, chosen by a hash of each example, with classes in their shares. No
example is in two splits.
"""

from __future__ import annotations

import functools
import hashlib
import math
import pickletools
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from waveletgpt.classify.labelled import Item, Pool, check_classes, divide, limit
from waveletgpt.classify.settings import TaskSettings
from waveletgpt.data.modalities.images import FILE_LIMIT, READ, Shape, Unusable, load, load_cifar, need_pillow
from waveletgpt.data.modalities.listops import EQUALS, IDS, OFFICIAL, WORDS, expressions, generate_listops
from waveletgpt.data.progress import bar
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.files import Document, Files, Source, TooLarge, report_skipped
from waveletgpt.data.sources.named import NAMED, fetch
from waveletgpt.data.splits import point_of
from waveletgpt.data.store import SPLITS, disk_errors
from waveletgpt.errors import UserError, suggest

if TYPE_CHECKING:
    from waveletgpt.classify.examples import ExampleStore, ExampleWriter

VERSION = 1
"""Raise it when the same data and settings give other examples, so that stores made before are not used."""
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RELEASE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
"""The official files of ListOps, Retrieval, Pathfinder and Path-X: a tar archive of 8 GB."""

_SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "eval"), "validation")
_CLASS_FOLDER = re.compile(rf"(?:^|/)({'|'.join(_SPLIT_NAMES)})/([^/]+)/[^/]+$")
_CIFAR_BATCH = re.compile(r"(?:^|/)(data_batch_\d+|test_batch)(\.bin)?$")
_PLANES = 3 * 32 * 32
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
"""Opcodes of a pickle that stand for a number."""
_LONGEST_LINE = 1 << 24


@dataclass(frozen=True)
class Published:
    """A row of published accuracies, in percent by task; None where the model was not better than chance."""

    name: str
    protocol: str
    source: str
    accuracies: dict[str, float | None]


def _row(name: str, protocol: str, source: str, *accuracies: float | None) -> Published:
    tasks = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
    return Published(name, protocol, source, dict(zip(tasks, accuracies, strict=True)))


PUBLISHED = (
    _row("Transformer", "the benchmark's own sizes and steps", "Tay et al. 2020, https://arxiv.org/abs/2011.04006",
         36.37, 64.27, 57.46, 42.44, 71.40, None),
    _row("Transformer, rotary, from scratch", "sizes and schedules of the state space models",
         "Amos et al. 2023, https://arxiv.org/abs/2310.02980", 47.90, 79.08, 82.31, 75.04, 76.64, 84.72),
    _row("S5", "a state space model, sizes and schedules of its own",
         "Smith et al. 2022, https://arxiv.org/abs/2208.04933",         62.15, 89.31, 91.40, 88.00, 95.33, 98.58),
)  # fmt: skip
"""Published results on the full data. Protocols differ, and most use the test split of `text` for validation."""


class Found(NamedTuple):
    """The result of reading a task's data."""

    classes: tuple[str, ...]
    items: Iterator[Item]


@dataclass(frozen=True)
class Task:
    """One task: its description, published numbers, and how to read or generate its examples."""

    name: str
    description: str
    modality: str
    length: int
    """The published longest input, in tokens."""
    published: dict[str, int]
    """Published numbers of examples by split; the training split is without the examples for validation."""
    layout: str
    """The files that the task needs, for messages."""
    read: Callable[[Source, int], Found]
    """(source, length) -> examples in the source."""
    include: str
    """Globs of the files that belong to the task."""
    generate: Callable[[int, int, int, TaskSettings], Iterator[tuple[bytes, int]]] | None = None
    """(seed, count, length, settings) -> values and label of `count` examples; None if it cannot be generated."""
    classes: tuple[str, ...] = ()
    """The classes of generated examples."""
    named: str | None = None
    """The named data set that is used if no data is given."""
    vocab_size: int = 257
    """Number of ids, padding included."""
    n_inputs: int = 1

    @property
    def published_accuracies(self) -> dict[str, float | None]:
        """Accuracies in percent, by the name of the row in `PUBLISHED`."""
        return {row.name: row.accuracies[self.name] for row in PUBLISHED}


def prepare_task(
    task: str, data: str | None = None, settings: TaskSettings | None = None, progress: bool = True
) -> ExampleStore:
    """The examples of a task in `TASKS`. They are made once and found again until data or settings change.

    `data` is a file, folder or archive in a layout of the task, or the name of its data set. None generates examples or
    uses the named set. Several processes may call it at once. Raises UserError for data that cannot be used.
    """
    from waveletgpt.classify.examples import prepare_once

    settings = settings or TaskSettings()
    if task not in TASKS:
        raise UserError(f'no task "{task}": there are {", ".join(TASKS)}{suggest(task, TASKS)}')
    chosen = TASKS[task]
    length = settings.length or chosen.length
    if chosen.modality == "image":
        _side(length)
    identity: dict[str, Any] = {"task": task, "version": VERSION, "length": length, "data_seed": settings.data_seed}
    identity |= {f"{split}_examples": settings.wanted(split) for split in SPLITS}
    if data is None and chosen.generate:
        identity["min_length"] = settings.min_length if task == "listops" else None
        fill = functools.partial(_fill_generated, chosen, length, settings, progress)
    else:
        if chosen.modality == "image":
            need_pillow()
            identity |= READ
        with disk_errors(settings.cache):
            source = _source(chosen, data, settings, progress)
            identity["content"] = source.key(settings.cache)
        fill = functools.partial(_fill, chosen, source, length, settings, progress)
    return prepare_once(f"{task}-{length}", identity, settings.cache, fill)


def _source(task: Task, data: str | None, settings: TaskSettings, progress: bool) -> Source:
    chosen = DataSettings(cache_dir=settings.cache_dir, data_dir=settings.data_dir, include=task.include)
    if data is None and task.named is None:
        raise UserError(f"{task.name} needs data: unpack {RELEASE} (8 GB) and give the folder")
    name = data or task.named or ""
    if Path(name).exists():
        if Path(name).name == "lra_release.gz":
            raise UserError(f"{name} is a tar archive: rename it lra_release.tar.gz, or give the folder it unpacks to")
        try:
            return Files(Path(name), chosen)
        except UserError as error:
            raise UserError(f"{name} has nothing for {task.name}, it needs {task.layout} ({error})") from None
    if name != task.named:
        mend = f" or the named set {task.named}" if task.named else ""
        raise UserError(f'"{name}" is not there: give a file, folder or archive with {task.layout}{mend}')
    return fetch(NAMED[name], replace(chosen, include=None), progress)


def _fill_generated(task: Task, length: int, settings: TaskSettings, progress: bool, writer: ExampleWriter) -> None:
    """Write generated examples, the test split first. Each split has its own seed and no example of another split."""
    assert task.generate
    _begin(writer, task, task.classes)
    before: set[bytes] = set()
    for number, split in enumerate(reversed(SPLITS)):
        count = settings.wanted(split) or task.published[split]
        made = task.generate(len(SPLITS) * settings.data_seed + number, count + len(before), length, settings)
        digests = set()
        written = 0
        with bar(f"generating {task.name}, {split}", count, progress, unit="examples") as advance:
            for values, label in made:
                digest = hashlib.blake2b(values, digest_size=16).digest()
                if digest in before:
                    continue
                if split != "train":
                    digests.add(digest)
                writer.append(split, _ids(values), label)
                written += 1
                advance(written)
                if written == count:
                    break
        before |= digests
    writer.finish(task=task.name, source={"name": task.name, "generated": True}, division="generated")


def _fill(
    task: Task, source: Source, length: int, settings: TaskSettings, progress: bool, writer: ExampleWriter
) -> None:
    """Write the examples of the source, divided into splits and limited in number."""
    pool = Pool(writer.scratch / "examples.bin", task.n_inputs)
    with pool:
        with bar(f"reading {source.name}", source.size, progress) as advance:
            classes, items = task.read(source, length)
            for item in items:
                pool.add(item)
                advance(source.done)
        if not len(pool):
            skipped = f" ({'; '.join(source.skipped[:3])})" if source.skipped else ""
            raise UserError(f"{source.name} has nothing for {task.name}, it needs {task.layout}{skipped}")
        report_skipped(source, "examples", len(pool))
        labels, points, given = pool.columns()
        parts, division = divide(labels, points, given, settings)
        _check(task, source.name, classes, labels, parts)
        copies = len(pool) - sum(map(len, parts.values()))
        chosen = {split: limit(parts[split], labels, points, settings, split, source.name) for split in SPLITS}
        _begin(writer, task, classes)
        done, total = 0, sum(map(len, chosen.values()))
        with bar(f"writing {source.name}", total, progress, unit="examples") as advance:
            for split in SPLITS:
                for index in chosen[split].tolist():
                    inputs = [_ids(values) for values in pool.inputs(index)]
                    writer.append(split, inputs, int(labels[index]), name=pool.names[index])
                    done += 1
                    advance(done)
    writer.finish(
        task=task.name,
        source={"name": source.name, "examples": len(pool), "copies_left_out": copies},
        division=division,
        skipped={"count": len(source.skipped), "names": source.skipped[:100]},
    )


def _begin(writer: ExampleWriter, task: Task, classes: tuple[str, ...]) -> None:
    writer.begin(
        kind="tokens", modality=task.modality, classes=classes, vocab_size=task.vocab_size, n_inputs=task.n_inputs
    )


def _ids(values: bytes) -> np.ndarray:
    return np.frombuffer(values, np.uint8).astype(np.uint16) + 1


def _check(task: Task, name: str, classes: tuple[str, ...], labels: np.ndarray, parts: dict[str, np.ndarray]) -> None:
    """Raises UserError as `check_classes` does, and for a split, or a class in a split, without examples."""
    check_classes(classes, name)
    for split in SPLITS:
        if not len(parts[split]):
            raise UserError(f"{name} has no {split} examples of {task.name}: it needs {task.layout}")
    for split in ("train", "test"):
        counts = np.bincount(labels[parts[split]], minlength=len(classes))
        if not counts.all():
            missing = ", ".join(classes[index] for index in np.flatnonzero(counts == 0)[:3])
            raise UserError(f"{name} has no {split} example of the class {missing}: each class needs some")


# ListOps


def _listops_made(seed: int, count: int, length: int, settings: TaskSettings) -> Iterator[tuple[bytes, int]]:
    """Expressions as numbers of words in `WORDS`. The shortest has a quarter of the longest length, as in the published
    data (500 to 2000)."""
    for expression, value in generate_listops(seed, count, settings.min_length or length // 4 or 1, length):
        yield bytes([IDS[word] for word in expression.split(" ")]), value


def _listops_read(source: Source, length: int) -> Found:
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


# Text and Retrieval


def _text_read(source: Source, length: int) -> Found:
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


def _retrieval_read(source: Source, length: int) -> Found:
    """Pairs of papers, one per line: label, two ids and two texts, separated by tabs, without quotes.

    The official texts are in Python's notation of bytes (b'...'); they are used unchanged, as in published results.
    """
    files = {f"new_aan_pairs.{part}.tsv": _SPLIT_NAMES[part] for part in ("train", "eval", "test")}
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


# Image, Pathfinder and Path-X


def _image_read(source: Source, length: int) -> Found:
    """Folders of pictures by class, or the batches of CIFAR-10 in the binary or the Python version."""
    side = _side(length)
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


def _pathfinder_made(seed: int, count: int, length: int, settings: TaskSettings) -> Iterator[tuple[bytes, int]]:
    from waveletgpt.classify.pathfinder import generate_pathfinder

    for picture, label in generate_pathfinder(seed, count, _side(length)):
        yield picture.tobytes(), label


def _pathfinder_read(source: Source, length: int) -> Found:
    """The official pictures imgs/*/sample_*.png with their labels in the text files metadata/*.npy."""
    side = _side(length)

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


def _side(length: int) -> int:
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
    return _SPLIT_NAMES[found[1]], list(classes).index(found[2])


def _content(document: Document, source: Source) -> bytes:
    try:
        content = document.read(FILE_LIMIT)
    except TooLarge as error:
        source.skipped.append(f"{document.name}: {error}")
        return b""
    if not content:
        source.skipped.append(f"{document.name}: empty")
    return content


def _globs(*patterns: str) -> str:
    return ",".join(glob for pattern in patterns for glob in (pattern, f"*/{pattern}"))


def _pathfinder_task(name: str, side: int) -> Task:
    folder = f"pathfinder{side}/curv_contour_length_14"
    return Task(
        name=name,
        description=f"{side} x {side}: are two dots joined by a dashed path among distractors",
        modality="image",
        length=side * side,
        published={"train": 160_000, "validation": 20_000, "test": 20_000},
        layout=f"{folder}/imgs and {folder}/metadata of the official release",
        # The release also holds other sizes and difficulties. Users may also give one of its inner folders.
        include=f"{_globs(f'{folder}/*')},curv_contour_length_14/*,imgs/*,metadata/*",
        read=_pathfinder_read,
        generate=_pathfinder_made,
        classes=("apart", "joined"),
    )


TASKS = {
    task.name: task
    for task in (
        Task(
            name="listops",
            description="the value of nested MAX, MIN, MED, SM, 500 to 2,000 tokens",
            modality="listops",
            length=2000,
            published={"train": 96_000, "validation": 2_000, "test": 2_000},
            layout="basic_train.tsv, basic_val.tsv and basic_test.tsv of the official release",
            include=_globs(*OFFICIAL),
            read=_listops_read,
            generate=_listops_made,
            classes=tuple(WORDS[:10]),
            vocab_size=1 + WORDS.index(EQUALS),
        ),
        Task(
            name="text",
            description="IMDb reviews as bytes: negative or positive",
            modality="text",
            length=4000,
            published={"train": 22_500, "validation": 2_500, "test": 25_000},
            layout="train/neg, train/pos, test/neg and test/pos",
            include=_globs(*(f"{split}/{kind}/*.txt" for split in _SPLIT_NAMES for kind in ("neg", "pos"))),
            read=_text_read,
            named="imdb",
        ),
        Task(
            name="retrieval",
            description="two papers of the ACL Anthology as bytes: does a citation relate them",
            modality="text",
            length=4000,
            published={"train": 147_086, "validation": 18_090, "test": 17_437},
            layout="new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv of the official release",
            include=_globs("new_aan_pairs.*.tsv"),
            read=_retrieval_read,
            n_inputs=2,
        ),
        Task(
            name="image",
            description="CIFAR-10 in grey, 1,024 pixels, 10 classes",
            modality="image",
            length=1024,
            published={"train": 45_000, "validation": 5_000, "test": 10_000},
            layout="train/CLASS/*.png and test/CLASS/*.png (or .jpg, ...), or the batches of CIFAR-10",
            include=f"{_globs(*(f'{split}/*/*' for split in _SPLIT_NAMES))},data_batch_*,test_batch*",
            read=_image_read,
            named="cifar10",
        ),
        _pathfinder_task("pathfinder", 32),
        _pathfinder_task("pathx", 128),
    )
}
"""The six tasks by name."""
