"""The example store: a folder of memory-mapped labelled examples of varying length, the same for every task.

    data-SPLIT.bin      ids (uint8, or uint16 if the vocabulary needs it) or samples (int16), one input after the other
    ends-SPLIT.bin      where each input ends, in ids or samples: uint64
    labels-SPLIT.bin    the class of each example: int64; with several labels one uint8 (0 or 1) per class
    clips-SPLIT.bin     number of the recording that each example is a piece of: int64
    names-SPLIT.jsonl   the name of each example, if they have names
    meta.json           description and source of the examples

Id 0 is padding and is not in any example.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from waveletgpt.data.modalities.listops import WORDS
from waveletgpt.data.store import SPLITS, FolderWriter, disk_errors, made_once, read_meta
from waveletgpt.errors import UserError, suggest

if TYPE_CHECKING:
    from waveletgpt.training.task import Task

FORMAT = 1
KINDS = ("tokens", "waveform")
MODALITIES = ("text", "listops", "image", "audio")
VALUES = 257
"""Vocabulary of 8-bit values (bytes of text, grey pixels): id 1 + value, and padding."""


class ExampleStore:
    """Labelled examples on disk, in three splits. Open it with `ExampleStore.open(path)`."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta
        self.fingerprint: str = meta["fingerprint"]
        """SHA-256 over the data's content and the settings that made these examples."""
        self.kind: str = meta["kind"]
        """The kind of inputs: "tokens" (ids, 0 is padding) or "waveform" (16-bit samples)."""
        self.modality: str = meta["modality"]
        """The content of inputs: "text", "listops", "image" (square, grey) or "audio"."""
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self.multi_label: bool = meta["multi_label"]
        """Whether an example may have any number of classes, none included."""
        self.n_inputs: int = meta["n_inputs"]
        """Inputs per example: 2 for pairs, else 1."""
        self.vocab_size: int | None = meta["vocab_size"]
        """Number of ids, padding included; None for waveforms."""
        self.sample_rate: int | None = meta["sample_rate"]
        """Samples per second; None for tokens."""
        self.max_length: int = meta["max_length"]
        """Length of the longest input, in ids or samples."""

    def task(self) -> Task:
        """The trainer's task: to classify these examples."""
        from waveletgpt.classify.task import Classification

        return Classification(self)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ExampleStore:
        """The store in the folder `path`.

        Raises UserError if there is none or it is incomplete.
        """
        return cls(Path(path), read_meta(Path(path), "example store", FORMAT, _files))

    def split(self, name: str) -> Examples:
        """The examples of "train", "validation" or "test"."""
        return Examples(self, name)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {self.meta['splits'][split]['examples']:,}" for split in SPLITS)
        return f"ExampleStore({str(self.path)!r}, {self.modality}, {len(self.classes)} classes, examples: {sizes})"


def _files(meta: dict[str, Any]) -> dict[str, int]:
    """The files of a complete store, with their sizes in bytes."""
    if meta["kind"] not in KINDS or meta["modality"] not in MODALITIES:
        raise ValueError(f"kind {meta['kind']}, modality {meta['modality']}")
    width = np.dtype(meta["dtype"]).itemsize
    label = len(meta["classes"]) if meta["multi_label"] else 8
    bool(meta["vocab_size"]), bool(meta["sample_rate"]), int(meta["max_length"])
    files = {}
    for split in SPLITS:
        counts = meta["splits"][split]
        files[f"data-{split}.bin"] = int(counts["values"]) * width
        files[f"ends-{split}.bin"] = int(counts["examples"]) * int(meta["n_inputs"]) * 8
        files[f"labels-{split}.bin"] = int(counts["examples"]) * label
        files[f"clips-{split}.bin"] = int(counts["examples"]) * 8
        if counts["name_bytes"]:
            files[f"names-{split}.jsonl"] = int(counts["name_bytes"])
    return files


class Examples(Dataset):
    """The examples of one split. Item i is a dict

    - `input_ids`, int64 (T,), for tokens (for pairs a list of two), or `input_values`, float32 (N,) in [-1, 1), for
      waveforms
    - `labels`: int64 (), or float32 (classes,) of 0 and 1 if examples may have several classes
    """

    def __init__(self, store: ExampleStore, name: str) -> None:
        """Raises UserError for an unknown split."""
        if name not in SPLITS:
            raise UserError(f'no split "{name}": there are {", ".join(SPLITS)}{suggest(name, SPLITS)}')
        self.store = store
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return Examples, (self.store, self.name)  # another process maps the files itself

    def __len__(self) -> int:
        return int(self.store.meta["splits"][self.name]["examples"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = as_item(self.raw(index), self.store.kind)
        label = self.labels[index]
        item["labels"] = torch.from_numpy(label.astype(np.float32)) if self.store.multi_label else torch.tensor(label)
        return item

    def raw(self, index: int) -> list[np.ndarray]:
        """The inputs of an example as they are stored: ids (uint8 or uint16) or samples (int16)."""
        first = range(len(self))[index] * self.store.n_inputs  # allows negative indices, raises IndexError
        bounds = [0] * (first == 0) + self._ends[max(0, first - 1) : first + self.store.n_inputs].tolist()
        return [np.asarray(self._data[start:end]) for start, end in itertools.pairwise(bounds)]

    def lengths(self) -> np.ndarray:
        """Length of every input in ids or samples: (n,), or (n, 2) for pairs, int64."""
        lengths = np.diff(self._ends.astype(np.int64), prepend=0)
        return lengths if self.store.n_inputs == 1 else lengths.reshape(-1, self.store.n_inputs)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """(n,) int64, or (n, classes) bool."""
        if self.store.multi_label:
            return self._read("labels", np.bool_).reshape(len(self), len(self.store.classes))
        return self._read("labels", np.int64)

    @functools.cached_property
    def clips(self) -> np.ndarray:
        """(n,) int64: the number of each example's recording. Scores are averaged over the pieces of a recording."""
        return self._read("clips", np.int64)

    @functools.cached_property
    def names(self) -> list[str] | None:
        """The name of each example, such as its file; None if they have no names."""
        if not self.store.meta["splits"][self.name]["name_bytes"]:
            return None
        text = (self.store.path / f"names-{self.name}.jsonl").read_text(encoding="ascii")
        return [json.loads(line) for line in text.splitlines()]

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return self._map("ends", np.dtype(np.uint64))

    @functools.cached_property
    def _data(self) -> np.ndarray:
        return self._map("data", np.dtype(self.store.meta["dtype"]))

    def _read(self, what: str, dtype: Any) -> np.ndarray:
        return np.fromfile(self.store.path / f"{what}-{self.name}.bin", dtype)

    def _map(self, what: str, dtype: np.dtype) -> np.ndarray:
        if not len(self):  # an empty file cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(self.store.path / f"{what}-{self.name}.bin", dtype=dtype, mode="r")


def as_item(inputs: Sequence[np.ndarray], kind: str) -> dict[str, Any]:
    """Turns the inputs that `Examples.raw` gives into model inputs; see `Examples`."""
    if kind == "waveform":
        return {"input_values": torch.from_numpy(inputs[0].astype(np.float32) / 32768)}
    ids = [torch.from_numpy(each.astype(np.int64)) for each in inputs]
    return {"input_ids": ids if len(ids) > 1 else ids[0]}


class ExampleWriter(FolderWriter):
    """Writes an example store in bounded memory:

        with ExampleWriter(path, fingerprint) as writer:
            writer.begin(kind="tokens", modality="text", classes=["neg", "pos"], vocab_size=257)
            writer.append("train", ids, 1, name="train/pos/0_9.txt")
            writer.finish(source={...})

    If the block ends without `finish`, nothing is left on disk.
    """

    def begin(
        self,
        *,
        kind: str,
        modality: str,
        classes: Sequence[str],
        multi_label: bool = False,
        n_inputs: int = 1,
        vocab_size: int | None = None,
        sample_rate: int | None = None,
    ) -> None:
        """Describe the examples. Tokens need a `vocab_size` (padding included), waveforms a `sample_rate`."""
        if (kind, vocab_size is None, sample_rate is None) not in (("tokens", False, True), ("waveform", True, False)):
            raise ValueError(f"kind {kind}, vocab_size {vocab_size}, sample_rate {sample_rate}")
        ids = np.uint8 if vocab_size is not None and vocab_size <= 1 << 8 else np.uint16
        self.dtype: np.dtype = np.dtype(np.int16 if kind == "waveform" else ids)
        self._meta: dict[str, Any] = {
            "kind": kind,
            "modality": modality,
            "classes": list(classes),
            "multi_label": multi_label,
            "n_inputs": n_inputs,
            "vocab_size": vocab_size,
            "sample_rate": sample_rate,
            "dtype": self.dtype.name,
            "max_length": 0,
        }
        self.counts: dict[str, dict[str, Any]] = {
            split: {"examples": 0, "values": 0, "name_bytes": 0, "per_class": [0] * len(classes)} for split in SPLITS
        }
        for split in SPLITS:
            for what in ("data", "ends", "labels", "clips"):
                self._file(f"{what}-{split}.bin")

    def append(
        self,
        split: str,
        data: np.ndarray | Sequence[np.ndarray],
        label: int | Sequence[int] | np.ndarray,
        clip: int | None = None,
        name: str | None = None,
    ) -> None:
        """Add an example: an array of ids 1 .. vocab_size-1 or of int16 samples (1-D, not empty); two for a pair.

        `label` is the number of its class, or with `multi_label` the numbers of all its classes. `clip` is the number
        of its recording (default: a new one). Either all examples of a split have a `name` or none has. Raises
        ValueError for anything else.
        """
        inputs = [data] if isinstance(data, np.ndarray) else list(data)
        if len(inputs) != self._meta["n_inputs"]:
            raise ValueError(f"{len(inputs)} inputs instead of {self._meta['n_inputs']}")
        for each in inputs:
            self._check(each)
        labels = self._labels(label)
        counts = self.counts[split]
        if counts["examples"] and bool(name) != bool(counts["name_bytes"]):
            raise ValueError("all examples of a split have names, or none")
        for each in inputs:
            self._file(f"data-{split}.bin").write(np.ascontiguousarray(each, self.dtype).data)
            counts["values"] += len(each)
            self._file(f"ends-{split}.bin").write(np.uint64(counts["values"]).tobytes())
            self._meta["max_length"] = max(self._meta["max_length"], len(each))
        self._file(f"labels-{split}.bin").write(labels.tobytes())
        self._file(f"clips-{split}.bin").write(np.int64(counts["examples"] if clip is None else clip).tobytes())
        if name:
            # As ASCII, so that names that are not UTF-8 (surrogates) come back unchanged.
            counts["name_bytes"] += self._file(f"names-{split}.jsonl").write(json.dumps(name).encode() + b"\n")
        counts["examples"] += 1

    def _check(self, data: np.ndarray) -> None:
        if data.ndim != 1 or not len(data):
            raise ValueError(f"an input has shape {data.shape}: give one dimension, not empty")
        if self._meta["kind"] == "waveform":
            if data.dtype != np.int16:
                raise ValueError(f"samples are {data.dtype}, not int16")
        elif int(data.min()) < 1 or int(data.max()) >= self._meta["vocab_size"]:
            raise ValueError(f"id out of range 1 .. {self._meta['vocab_size'] - 1}: {data.min()} .. {data.max()}")

    def _labels(self, label: int | Sequence[int] | np.ndarray) -> np.ndarray:
        multi = self._meta["multi_label"]
        numbers = np.atleast_1d(np.asarray(label, np.int64))
        classes = len(self._meta["classes"])
        if (len(numbers) and not 0 <= numbers.min() <= numbers.max() < classes) or (len(numbers) != 1 and not multi):
            raise ValueError(f"label {label} of {classes} classes, multi_label {multi}")
        return np.isin(np.arange(classes), numbers).astype(np.uint8) if multi else numbers

    def finish(self, **meta: Any) -> None:
        """Publish the store, with `meta` in meta.json. If another process was first, its store stays."""
        self._close()
        for split in SPLITS:
            self.counts[split]["per_class"] = self._per_class(split)
        self._publish({"format": FORMAT, **self._meta, "splits": self.counts, **meta}, ExampleStore.open)

    def _per_class(self, split: str) -> list[int]:
        classes = len(self._meta["classes"])
        multi = self._meta["multi_label"]
        labels = np.fromfile(self.folder / f"labels-{split}.bin", np.uint8 if multi else np.int64)
        counts = labels.reshape(-1, classes).sum(0, dtype=int) if multi else np.bincount(labels, minlength=classes)
        return counts.tolist()


def prepare_once(
    name: str, identity: dict[str, Any], cache: Path, fill: Callable[[ExampleWriter], None]
) -> ExampleStore:
    """The store with this `identity` (content and settings, as JSON): found again, or made by `fill`.

    `fill` calls begin, append and finish. If several processes call this at once, one of them makes the store. `name`
    becomes part of the folder's name. Raises UserError if the disk is full, and any error of `fill`.
    """
    identity = {"examples": FORMAT, **identity}
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    stem = re.sub(r"[^A-Za-z0-9]+", "-", name)[:60].strip("-") or "data"
    path = cache / "examples" / f"{stem}-{fingerprint[:16]}"

    def make() -> None:
        with ExampleWriter(path, fingerprint, identity) as writer:
            fill(writer)

    with disk_errors(cache):
        return made_once(path, ExampleStore.open, make)


def balanced(labels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n,) indices that order examples with these `labels`: the first k, for any k, have each class in its share.

    Within a class the order is that of `points`, (n,) numbers such as `point_of` the content.
    """
    order = np.lexsort((points, labels))
    sizes = np.unique(labels[order], return_counts=True)[1]
    rank = np.concatenate([np.arange(size) for size in sizes]) if len(sizes) else np.empty(0)
    places = (rank + 0.5) / np.repeat(sizes, sizes)
    return order[np.lexsort((points[order], places))]


def show(store: ExampleStore, raw: Sequence[np.ndarray]) -> Any:
    """The inputs that `Examples.raw` gives, for a human: a str for a text or expression (for a pair both, with a line
    between them), the pixels of an image, uint8 (side, side), or the samples of audio, int16 (N,).
    """
    if store.modality == "audio":
        return raw[0]
    if store.modality == "image":
        side = round(len(raw[0]) ** 0.5)
        return (raw[0] - 1).astype(np.uint8).reshape(side, side)
    if store.modality == "listops":
        return " ".join(WORDS[index - 1] for index in raw[0].tolist())
    texts = [(ids - 1).astype(np.uint8).tobytes().decode("utf-8", "replace") for ids in raw]
    return "\n\n----\n\n".join(texts)
