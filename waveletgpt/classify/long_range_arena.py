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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from waveletgpt.classify.labelled import Pool, check_classes, divide, limit
from waveletgpt.classify.official import (
    RELEASE,
    SPLIT_NAMES,
    Found,
    read_images,
    read_listops,
    read_pathfinder,
    read_retrieval,
    read_text,
    side_of,
)
from waveletgpt.classify.settings import TaskSettings
from waveletgpt.data.modalities.images import READ, need_pillow
from waveletgpt.data.modalities.listops import EQUALS, IDS, OFFICIAL, WORDS, generate_listops
from waveletgpt.data.progress import bar
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.files import Files, Source, report_skipped
from waveletgpt.data.sources.named import NAMED, fetch
from waveletgpt.data.store import SPLITS, disk_errors
from waveletgpt.errors import UserError, suggest

if TYPE_CHECKING:
    from waveletgpt.classify.examples import ExampleStore, ExampleWriter

VERSION = 1
"""Raise it when the same data and settings give other examples, so that stores made before are not used."""


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
        side_of(length)
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


def _make_listops(seed: int, count: int, length: int, settings: TaskSettings) -> Iterator[tuple[bytes, int]]:
    """Expressions as numbers of words in `WORDS`. The shortest has a quarter of the longest length, as in the published
    data (500 to 2000)."""
    for expression, value in generate_listops(seed, count, settings.min_length or length // 4 or 1, length):
        yield bytes([IDS[word] for word in expression.split(" ")]), value


def _make_pathfinder(seed: int, count: int, length: int, settings: TaskSettings) -> Iterator[tuple[bytes, int]]:
    from waveletgpt.classify.pathfinder import generate_pathfinder

    for picture, label in generate_pathfinder(seed, count, side_of(length)):
        yield picture.tobytes(), label


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
        read=read_pathfinder,
        generate=_make_pathfinder,
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
            read=read_listops,
            generate=_make_listops,
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
            include=_globs(*(f"{split}/{kind}/*.txt" for split in SPLIT_NAMES for kind in ("neg", "pos"))),
            read=read_text,
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
            read=read_retrieval,
            n_inputs=2,
        ),
        Task(
            name="image",
            description="CIFAR-10 in grey, 1,024 pixels, 10 classes",
            modality="image",
            length=1024,
            published={"train": 45_000, "validation": 5_000, "test": 10_000},
            layout="train/CLASS/*.png and test/CLASS/*.png (or .jpg, ...), or the batches of CIFAR-10",
            include=f"{_globs(*(f'{split}/*/*' for split in SPLIT_NAMES))},data_batch_*,test_batch*",
            read=read_images,
            named="cifar10",
        ),
        _pathfinder_task("pathfinder", 32),
        _pathfinder_task("pathx", 128),
    )
}
"""The six tasks by name."""
