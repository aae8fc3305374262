"""Small files in the official layouts of the Long Range Arena's tasks, and what a store made of them holds."""

from __future__ import annotations

import itertools
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from waveletgpt.classify.examples import ExampleStore, show
from waveletgpt.classify.official import CIFAR10
from waveletgpt.data import SPLITS

Prepare = Callable[..., ExampleStore]


def shown(store: ExampleStore, split: str) -> list[tuple[Any, int]]:
    """Every example as a human sees it, and its label; pictures as bytes."""
    examples = store.split(split)
    seen = [show(store, examples.raw(index)) for index in range(len(examples))]
    return list(zip([x if isinstance(x, str) else x.tobytes() for x in seen], examples.labels.tolist(), strict=True))


def independent(store: ExampleStore) -> bool:
    """Whether no two splits share an example."""
    found = [{example for example, _ in shown(store, split)} for split in SPLITS]
    return all(not a & b for a, b in itertools.combinations(found, 2))


def official_listops(folder: Path, rows: int = 40) -> dict[str, list[tuple[str, int]]]:
    """Small official files, with the round brackets that nest pairs; what they hold by split."""
    rng = random.Random(0)
    found: dict[str, list[tuple[str, int]]] = {}
    folder.mkdir(parents=True)
    for split, name in zip(SPLITS, ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"), strict=True):
        found[split] = []
        lines = ["Source\tTarget"]
        for label in range(rows):
            values = rng.choices(range(10), k=4)
            found[split].append((f"[SM {' '.join(map(str, values))} [MAX {label % 10} ] ]", (sum(values) + label) % 10))
            one, two, three, four = values
            nested = f"( ( ( ( ( ( [SM {one} ) {two} ) {three} ) {four} ) ( ( [MAX {label % 10} ) ] ) ) ] )"
            lines.append(f"{nested}\t{found[split][-1][1]}")
        (folder / name).write_text("\r\n".join(lines) + "\r\n", newline="")
    return found


def reviews(folder: Path, train: int = 40, test: int = 30) -> Path:
    """A folder as the Large Movie Review Dataset's, bytes of all kinds in it."""
    rng = random.Random(0)
    for split, count in (("train", train), ("test", test)):
        for kind in ("neg", "pos", "unsup"):
            place = folder / split / kind
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number}_7.txt").write_bytes(f"{split} {kind} {number} ".encode() + rng.randbytes(60))
    (folder / "README").write_text("about")
    (folder / "train" / "labeledBow.feat").write_text("0 9:1")
    return folder


def packed(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, f"w:{archive.name.rpartition('.')[2]}") as tar:
        tar.add(folder, folder.name)
    return archive


def papers(folder: Path, rows: int = 12, columns: int = 5) -> dict[str, list[tuple[int, bytes, bytes]]]:
    """Small official files; what they hold by split."""
    rng = random.Random(1)
    folder.mkdir(parents=True)
    found: dict[str, list[tuple[int, bytes, bytes]]] = {}
    for split, part in zip(SPLITS, ("train", "eval", "test"), strict=True):
        found[split] = []
        lines = []
        for number in range(rows):
            one, two = (f"b'{split} \"{number} caf\\xc3 ".encode() + b"x" * rng.randrange(300) + b"'" for _ in "12")
            found[split].append((number % 2, one, two))
            lines.append(b"\t".join([b"%d.0" % (number % 2), b"P01-%04d" % number, b"W02-9999", one, two][:columns]))
        (folder / f"new_aan_pairs.{part}.tsv").write_bytes(b"\n".join(lines) + b"\n")
    return found


def pictures(folder: Path, train: int = 10, test: int = 4) -> dict[str, tuple[bytes, str]]:
    """Class folders of grey PNG files; their pixels by name."""
    rng = np.random.default_rng(0)
    found = {}
    for split, count in (("train", train), ("test", test)):
        for kind in ("ant", "bee", "cow"):
            (folder / split / kind).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 32), np.uint8)
                Image.fromarray(pixels).save(folder / split / kind / f"{number}.png")
                found[f"{split}/{kind}/{number}.png"] = (pixels.tobytes(), kind)
    return found


def cifar(folder: Path, count: int = 50) -> dict[str, tuple[np.ndarray, list[int]]]:
    """The binary version, small; its planes (n, 3072) and labels by file."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    found = {}
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        labels = [index % 10 for index in range(count)]
        planes = rng.integers(0, 256, (count, 3072), np.uint8)
        (folder / f"{name}.bin").write_bytes(np.column_stack([np.array(labels, np.uint8), planes]).tobytes())
        found[name] = (planes, labels)
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10))
    return found


def python_2_pickle(planes: np.ndarray, labels: list[int]) -> bytes:
    """What Python 2 writes for {"data": planes, "labels": labels, ...}, its strings as such and lists in runs."""

    memo = itertools.count(1)

    def kept(part: bytes) -> bytes:
        number = next(memo)
        return part + (b"q" + bytes([number]) if number < 256 else b"r" + number.to_bytes(4, "little"))

    def text(content: bytes) -> bytes:
        short = len(content) < 256
        return kept((b"U" if short else b"T") + len(content).to_bytes(1 if short else 4, "little") + content)

    def run(parts: list[bytes]) -> bytes:
        runs = [parts[start : start + 20] for start in range(0, len(parts), 20)]
        return kept(b"]") + b"".join(b"(" + b"".join(each) + b"e" for each in runs)

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    shape = b"M" + len(planes).to_bytes(2, "little") + b"M" + (3072).to_bytes(2, "little") + b"\x86"
    kind = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\x01\x87R"
    state = b"(K\x01" + shape + kind + b"\x89" + text(planes.tobytes()) + b"tb"
    names = [text(f"cat_s_{index:06}.png".encode()) for index in range(len(labels))]
    entries = [
        *(text(b"batch_label"), text(b"testing batch 1 of 1"), text(b"data"), array + state, text(b"labels")),
        *(run([b"K" + bytes([label]) for label in labels]), text(b"filenames"), run(names)),
    ]
    return b"\x80\x02}(" + b"".join(entries) + b"u."


def official_pathfinder(folder: Path, files: int = 4, each: int = 25) -> dict[str, tuple[bytes, int]]:
    """The official folders, small; pixels and labels by name."""
    rng = np.random.default_rng(0)
    found = {}
    (folder / "metadata").mkdir(parents=True)
    for number in range(files):
        (folder / "imgs" / str(number)).mkdir(parents=True)
        lines = []
        for sample in range(each):
            pixels = rng.integers(0, 256, (32, 32), np.uint8)
            name = f"imgs/{number}/sample_{sample}.png"
            Image.fromarray(pixels).save(folder / name)
            label = int(rng.integers(2))
            lines.append(f"imgs/{number} sample_{sample}.png {sample} {label} 1.8 14 2 1 1.0\n")
            found[name] = (pixels.tobytes(), label)
        (folder / "metadata" / f"{number}.npy").write_text("".join(lines))
    return found
