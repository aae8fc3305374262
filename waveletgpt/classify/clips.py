"""Labelled recordings as examples: FSD50K, ESC-50, UrbanSound8K, Speech Commands, spoken digits, or a folder per class.

    store = prepare_clips("my-sounds/", TaskSettings(clip_seconds=1.0))
    store.split("train")[0]         # {"input_values": (16000,), "labels": ()}

The names of the files decide the layout:

    FSD50K      dev.csv and eval.csv of FSD50K.ground_truth, recordings FSD50K.{dev,eval}_audio/ID.wav; a recording may
                have several classes; eval is the test split (Fonseca et al. 2020, https://arxiv.org/abs/2010.00475)
    ESC-50      meta/esc50.csv and audio/; one of the five folds is the test split, the next one validation
    UrbanSound8K metadata/UrbanSound8K.csv and audio/foldN/; the same with ten folds (Salamon et al. 2014)
    Speech Commands CLASS/*, with the lists validation_list.txt and testing_list.txt; all other recordings are for
                training (Warden 2018, https://arxiv.org/abs/1804.03209); _background_noise_ is not a class
    digits      DIGIT_SPEAKER_INDEX.wav as in the Free Spoken Digit Dataset: for every speaker and digit, indices 0 to 4
                are the test split, which is official, and 5 to 9 validation
    folders     CLASS/*, or {train,test}/CLASS/* with or without validation

Recordings are mixed down to mono, resampled and cut into consecutive clips; the store records which recording a clip
is from. A recording shorter than a clip is one example. No recording, nor a copy of it, is in two splits.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from waveletgpt.classify.labelled import Item, Pool, check_classes, divide, limit
from waveletgpt.classify.settings import TaskSettings
from waveletgpt.data.modalities.audio import SUFFIXES, Unusable, libraries, recording
from waveletgpt.data.progress import bar
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.encodings import begin, decoded
from waveletgpt.data.sources.files import FOLDERS, Document, Files, Source, TooLarge, report_skipped
from waveletgpt.data.sources.named import NAMED, fetch
from waveletgpt.data.splits import point_of
from waveletgpt.data.store import SPLITS, disk_errors
from waveletgpt.errors import UserError, suggest

if TYPE_CHECKING:
    from waveletgpt.classify.examples import ExampleStore, ExampleWriter

log = logging.getLogger(__name__)

VERSION = 4
"""Raise it when the same data and settings give other examples, so that stores made before are not used."""
LABELLED = ("fsdd",)
"""The named data sets whose recordings have classes."""
LONGEST = 600.0
"""Seconds of a recording that are used at most: ten hours of one sound would outweigh all others."""
FILE_LIMIT = 1 << 32
"""Larger files, in bytes, are not read."""
TABLE_LIMIT = 1 << 26
"""Larger files, in bytes, are not tables of labels."""

_TABLES = (
    "dev.csv", "eval.csv", "vocabulary.csv", "esc50.csv", "UrbanSound8K.csv", "testing_list.txt", "validation_list.txt",
)  # fmt: skip
"""Names of the official tables with classes or splits."""

_DIGIT = re.compile(r"(?:^|/)(\d)_([^/]+)_(\d{1,9})\.\w+$")
_ZIP_PART = re.compile(r"\.z\d+$", re.IGNORECASE)

Label = tuple[str | None, tuple[int, ...]]
"""The split of a recording (None if the data has no splits) and the numbers of its classes."""


@dataclass(frozen=True)
class Labelling:
    """A layout: how the data gives the classes of its recordings."""

    name: str
    classes: tuple[str, ...]
    label: Callable[[str], Label | None]
    """The label of the file with this name; None if it has none."""
    where: str
    """Where a recording must be to have a label, for messages."""
    multi_label: bool = False


def prepare_clips(data: str, settings: TaskSettings | None = None, progress: bool = True) -> ExampleStore:
    """The clips of labelled recordings. They are made once and found again until data or settings change.

    `data` is a folder or an archive in one of the layouts above, or a name in `LABELLED`. Numbers of examples in the
    settings are numbers of recordings. Several processes may call it at once. Raises UserError for data that cannot be
    used.
    """
    from waveletgpt.classify.examples import prepare_once

    settings = settings or TaskSettings()
    libraries()
    with disk_errors(settings.cache):
        source = _source(data, settings, progress)
        identity: dict[str, Any] = {"task": "clips", "version": VERSION, "content": source.key(settings.cache)}
    identity |= {name: getattr(settings, name) for name in ("clip_seconds", "sample_rate", "fold", "data_seed")}
    identity |= {f"{split}_examples": settings.wanted(split) for split in SPLITS}
    name = Path(data).name.split(".")[0] or "recordings"

    def fill(writer: ExampleWriter) -> None:
        _fill(source, settings, progress, writer)

    return prepare_once(f"clips-{name}", identity, settings.cache, fill)


def _source(data: str, settings: TaskSettings, progress: bool) -> Source:
    chosen = DataSettings(cache_dir=settings.cache_dir, data_dir=settings.data_dir)
    if Path(data).exists():
        return Files(Path(data), chosen)
    if data in LABELLED:
        return fetch(NAMED[data], chosen, progress)
    named = ", ".join(LABELLED)
    if data in NAMED:
        raise UserError(f'the data set "{data}" has no recordings with classes: give {named} or a folder')
    raise UserError(f'"{data}" is not a folder, archive or data set with classes ({named}){suggest(data, LABELLED)}')


def _fill(source: Source, settings: TaskSettings, progress: bool, writer: ExampleWriter) -> None:
    """Write the clips of all recordings, divided into splits and limited in number."""
    layout = find_layout(source, settings.fold)
    if progress:
        shown = ", ".join(layout.classes[:12]) + (", ..." if len(layout.classes) > 12 else "")
        print(f"{source.name}: {layout.name}, {len(layout.classes)} classes: {shown}", file=sys.stderr, flush=True)
    length = _clip(settings.clip_seconds, settings.sample_rate)
    classes: list[tuple[int, ...]] = []
    cut = 0
    with Pool(writer.scratch / "recordings.bin", 1) as pool:
        with bar(f"reading {source.name}", source.size, progress) as advance:
            for document in source.files():
                if not _is_sound(document.name):
                    continue
                name = document.name.encode("utf-8", "replace").decode()
                label = layout.label(document.name)
                try:
                    if label is None:
                        raise Unusable(f"not in {layout.where}")
                    point = _save(document, writer.scratch / "recording")
                    samples, whole = read_samples(writer.scratch / "recording", settings.sample_rate)
                except Unusable as error:
                    source.skipped.append(f"{name} ({error})")
                else:
                    cut += not whole
                    # A recording of several classes counts as one of its first class when classes are balanced.
                    pool.add(Item((samples.tobytes(),), (*label[1], 0)[0], point, name, label[0]))
                    classes.append(label[1])
                advance(source.done)
        report_skipped(source, "recordings", len(pool))
        if cut:
            log.warning("%s: only the first %g seconds of %d recordings are used", source.name, LONGEST, cut)
        first, points, given = pool.columns()
        parts, division = divide(first, points, given, settings)
        _check(source.name, layout, first, parts)
        copies = len(pool) - sum(map(len, parts.values()))
        chosen = {split: limit(parts[split], first, points, settings, split, source.name) for split in SPLITS}
        writer.begin(
            kind="waveform",
            modality="audio",
            classes=layout.classes,
            multi_label=layout.multi_label,
            sample_rate=settings.sample_rate,
        )
        done, total = 0, sum(map(len, chosen.values()))
        with bar(f"writing {source.name}", total, progress, unit="recordings") as advance:
            for split in SPLITS:
                for number, index in enumerate(chosen[split].tolist()):
                    samples = np.frombuffer(pool.inputs(index)[0], np.int16)
                    label_of = classes[index] if layout.multi_label else classes[index][0]
                    for piece in pieces(samples, length):
                        writer.append(split, piece, label_of, clip=number, name=pool.names[index])
                    done += 1
                    advance(done)
    writer.finish(
        task="clips",
        layout=layout.name,
        source={"name": source.name, "recordings": len(pool), "copies_left_out": copies, "cut": cut},
        recordings={split: len(chosen[split]) for split in SPLITS},
        division=division,
        skipped={"count": len(source.skipped), "names": source.skipped[:100]},
    )


def _check(name: str, layout: Labelling, labels: np.ndarray, parts: dict[str, np.ndarray]) -> None:
    """Raises UserError as `check_classes` does, and for a split or a training class without recordings."""
    check_classes(layout.classes, name, layout.multi_label)
    for split in SPLITS:
        if not len(parts[split]):
            mend = "give more of each class" if layout.name == "folders" else "give the whole data set"
            raise UserError(f"{name} has no {split} recordings ({layout.name}): {mend}")
    counts = np.bincount(labels[parts["train"]], minlength=len(layout.classes))
    if not layout.multi_label and not counts.all():
        missing = [layout.classes[index] for index in np.flatnonzero(counts == 0)]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{name} has no recording to train on of the class {', '.join(missing[:3])}{more}: add some")


def _is_sound(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and ".." not in name.split("/")


def _save(document: Document, path: Path) -> float:
    """Write a document's bytes to `path`, for a reader that has to seek. Returns a number that is the same for copies.

    Raises Unusable for more than FILE_LIMIT bytes.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in document.chunks:
            size += len(chunk)
            if size > FILE_LIMIT:
                raise Unusable(f"larger than {FILE_LIMIT >> 30} GB")
            digest.update(chunk)
            file.write(chunk)
    return point_of(digest.digest())


def read_samples(path: Path, rate: int) -> tuple[np.ndarray, bool]:
    """A recording as int16 (N,) at `rate` samples per second, at most LONGEST seconds; and whether that is all of it.

    Raises Unusable if it is not a recording, is broken, or has no samples.
    """
    blocks: list[np.ndarray] = []
    room = round(LONGEST * rate)
    whole = True
    for block in recording(path, rate):
        if len(block) > room:
            block, whole = block[:room], False
        if len(block):
            blocks.append(np.clip(np.rint(block * 32768), -32768, 32767).astype(np.int16))
            room -= len(block)
        if not whole:
            break
    if not blocks:
        raise Unusable("no samples")
    return np.concatenate(blocks), whole


def _clip(seconds: float, rate: int) -> int:
    return max(1, round(seconds * rate))


def pieces(samples: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Consecutive pieces of `length` samples. The rest is a piece too if it is at least half as long, or alone."""
    for start in range(0, len(samples), length):
        piece = samples[start : start + length]
        if start == 0 or 2 * len(piece) >= length:
            yield piece


def read_clips(path: Path, rate: int, seconds: float) -> list[np.ndarray]:
    """The clips of a recording, int16, as `prepare_clips` makes them. Raises UserError if it cannot be read."""
    try:
        return list(pieces(read_samples(path, rate)[0], _clip(seconds, rate)))
    except Unusable as error:
        raise UserError(f"{path} cannot be read as a recording ({error}): try another format") from None


# Layouts


def find_layout(source: Source, fold: int) -> Labelling:
    """The layout of a source, from the names of its files and its tables; `fold` is the test split of data with folds.

    Raises UserError if there are no recordings, or if no layout or more than one fits.
    """
    names: list[str] = []
    tables: dict[str, bytes] = {}
    other_tables: list[str] = []
    for document in source.files():
        name = document.name.rpartition("/")[2]
        if name in _TABLES:
            try:
                tables[name] = document.read(TABLE_LIMIT)
            except TooLarge as error:
                raise UserError(f"{document.name} is {error}: give the official table") from None
        elif _is_sound(document.name):
            names.append(document.name)
        elif name.lower().endswith((".csv", ".tsv")):
            other_tables.append(document.name)
        elif _ZIP_PART.search(name):
            whole = f"{name.rpartition('.')[0]}.zip"
            raise UserError(
                f"{name} is a part of {whole}: join the parts (zip -s 0 {whole} --out whole.zip), and unpack whole.zip"
            )
    if not names:
        raise UserError(f"{source.name} has no recordings: give a folder or archive with WAV, FLAC, OGG, MP3 or AIFF")
    esc50 = "esc50.csv" in tables
    if _header(tables.get("dev.csv", b""))[:2] == ["fname", "labels"]:
        if esc50:
            raise UserError(
                f"{source.name} holds FSD50K and ESC-50 (dev.csv, esc50.csv): give the folder of one of them"
            )
        return _fsd50k(tables)
    if "dev.csv" in tables and any("FSD50K." in name for name in names):
        raise UserError("dev.csv is not the official table of FSD50K: its first line is not fname,labels,split")
    if esc50:
        return _esc50(tables["esc50.csv"], fold)
    if "UrbanSound8K.csv" in tables:
        return _urbansound(tables["UrbanSound8K.csv"], fold)
    if "testing_list.txt" in tables and "validation_list.txt" in tables:
        return _speech_commands(tables, names, source.name)
    if all(map(_DIGIT.search, names)):
        return Labelling("digits", tuple("0123456789"), _digit, "the pattern DIGIT_SPEAKER_INDEX")
    if other_tables:
        raise UserError(
            f"{source.name} holds {other_tables[0]}, a table whose classes may differ from the folders: move the "
            "recordings into a folder per class and leave the table out"
        )
    return _class_folders(names, source.name)


def _header(table: bytes) -> list[str]:
    return next(csv.reader(begin(table[:1000]).splitlines()[:1]), [])


def _text(tables: dict[str, bytes], name: str) -> str:
    return decoded(tables.get(name, b""), name, choosable=False)


def _rows(tables: dict[str, bytes], name: str, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """These columns of each row of a table. Raises UserError if the table or a column is missing."""
    if name not in tables:
        raise UserError(f"{name} is missing: add it, it holds the classes of the recordings")
    try:
        for row in csv.DictReader(io.StringIO(_text(tables, name), newline="")):
            values = [row.get(column) for column in columns]
            if None in values:
                raise UserError(f"{name} is not the official table: a row lacks one of {', '.join(columns)}")
            yield tuple(str(value) for value in values)
    except csv.Error as error:
        raise UserError(f"{name} is not the official table: {error}") from None


def _fsd50k(tables: dict[str, bytes]) -> Labelling:
    """Several classes per recording; `dev` is divided into training and validation, `eval` is the test split."""
    found: dict[str, tuple[str, list[str]]] = {}
    for name, labels, split in _rows(tables, "dev.csv", ("fname", "labels", "split")):
        found[name] = "validation" if split == "val" else "train", list(filter(None, labels.split(",")))
    for name, labels in _rows(tables, "eval.csv", ("fname", "labels")):
        found[name] = "test", list(filter(None, labels.split(",")))
    vocabulary = csv.reader(io.StringIO(_text(tables, "vocabulary.csv"), newline=""))
    classes = [row[1] for row in vocabulary if len(row) == 3]
    classes += sorted({label for _, labels in found.values() for label in labels} - set(classes))
    if not classes:
        raise UserError("dev.csv and eval.csv name no class: get the official tables")
    number = {label: index for index, label in enumerate(classes)}
    known = {name: (split, tuple(number[label] for label in labels)) for name, (split, labels) in found.items()}

    def label(name: str) -> Label | None:
        return known.get(os.path.splitext(name.rpartition("/")[2])[0])

    return Labelling("FSD50K", tuple(classes), label, "dev.csv or eval.csv", multi_label=True)


def _esc50(table: bytes, fold: int) -> Labelling:
    """One class per recording. Recordings from one source are in one fold, so validation is a whole fold too."""
    rows = list(_rows({"esc50.csv": table}, "esc50.csv", ("filename", "fold", "target", "category")))
    if fold > 5:
        raise UserError(f"fold is {fold}: ESC-50 has the folds 1 to 5")
    if wrong := {row[1] for row in rows} - set("12345"):
        raise UserError(f'esc50.csv is not the official table: a fold is "{min(wrong)}", not 1 to 5')
    numbers = {category: int(target) if target.isdecimal() else -1 for _, _, target, category in rows}
    classes = tuple(sorted(numbers, key=lambda category: (numbers[category], category)))
    splits = {str(fold): "test", str(fold % 5 + 1): "validation"}
    known = {name: (splits.get(part, "train"), (classes.index(category),)) for name, part, _, category in rows}

    def label(name: str) -> Label | None:
        return known.get(name.rpartition("/")[2])

    return Labelling("ESC-50", classes, label, "esc50.csv")


def _urbansound(table: bytes, fold: int) -> Labelling:
    """Ten folds; the pieces of one source are in one fold. The folders are folds, not classes."""
    columns = ("slice_file_name", "fold", "classID", "class")
    rows = list(_rows({"UrbanSound8K.csv": table}, "UrbanSound8K.csv", columns))
    if wrong := {row[1] for row in rows} - {str(number) for number in range(1, 11)}:
        raise UserError(f'UrbanSound8K.csv is not the official table: a fold is "{min(wrong)}", not 1 to 10')
    numbers = {category: int(target) if target.isdecimal() else -1 for _, _, target, category in rows}
    classes = tuple(sorted(numbers, key=lambda category: (numbers[category], category)))
    there = sorted({int(row[1]) for row in rows})
    if fold not in there:
        raise UserError(f"fold is {fold}: the folds of this data are {', '.join(map(str, there))}")
    following = there[(there.index(fold) + 1) % len(there)]  # a part of the data may lack some folds
    splits = {str(following): "validation", str(fold): "test"}
    known = {name: (splits.get(part, "train"), (classes.index(category),)) for name, part, _, category in rows}

    def label(name: str) -> Label | None:
        return known.get(name.rpartition("/")[2])

    return Labelling("UrbanSound8K", classes, label, "UrbanSound8K.csv")


def _speech_commands(tables: dict[str, bytes], names: list[str], what: str) -> Labelling:
    """A folder per word. Two lists name the recordings of validation and test; all others are for training."""
    listed = {
        line.strip(): split
        for table, split in (("validation_list.txt", "validation"), ("testing_list.txt", "test"))
        for line in _text(tables, table).splitlines()
    }
    folders = _class_folders([name for name in names if "_background_noise_" not in name.split("/")], what)

    def label(name: str) -> Label | None:
        found = None if "_background_noise_" in name.split("/") else folders.label(name)
        return found and (listed.get("/".join(name.split("/")[-2:]), "train"), found[1])

    return Labelling("Speech Commands", folders.classes, label, "a folder of a word")


def _digit(name: str) -> Label | None:
    match = _DIGIT.search(name)
    if not match:
        return None
    index = int(match[3])
    return "test" if index < 5 else "validation" if index < 10 else "train", (int(match[1]),)


def _class_folders(names: list[str], what: str) -> Labelling:
    """A folder per class. These are inside folders of splits if `train` and `test` are among the folders."""
    folders = [name.split("/")[:-1] for name in names]
    filled = [folder for folder in folders if folder]
    depth = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*filled, strict=False)))
    tops = {folder[depth] for folder in filled if len(folder) > depth}
    splits = {top: FOLDERS[top.lower()] for top in tops if top.lower() in FOLDERS}
    divided = "train" in splits.values() and len(set(splits.values())) > 1
    if divided and (others := sorted(tops - splits.keys())):
        raise UserError(
            f"{what} has folders of splits ({', '.join(sorted(splits))}) and others ({', '.join(others[:3])}): "
            "leave only splits, or only classes"
        )
    if divided and "test" not in splits.values():
        raise UserError(f"{what} has the splits {', '.join(sorted(splits))}, but no test: add it or rename one")
    depth += divided
    classes = sorted({folder[depth] for folder in folders if len(folder) > depth})
    if len(classes) < 2:
        there = classes or sorted({folder[-1] for folder in filled})  # a single folder around all may be a class
        found = f"one class, {there[0]}" if len(there) == 1 else "no class folders"
        raise UserError(f"{what} has {found}: put the recordings of each class in a folder with the name of the class")
    number = {name: index for index, name in enumerate(classes)}

    def label(name: str) -> Label | None:
        folder = name.split("/")[:-1]
        if len(folder) <= depth:
            return None
        return splits[folder[depth - 1]] if divided else None, (number[folder[depth]],)

    shown = tuple(name.encode("utf-8", "replace").decode() for name in classes)
    return Labelling("folders", shown, label, "a class folder")
