"""Recordings with classes, made for the tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.data.modalities.sounds import save
from waveletgpt.classify.clips import prepare_clips
from waveletgpt.classify.examples import ExampleStore
from waveletgpt.classify.settings import TaskSettings
from waveletgpt.data import SPLITS

RATE = 1000
"""Samples a second of these sounds: few, to be quick."""


def fsd50k(folder: Path, per_split: int = 6) -> dict[str, tuple[str, set[str]]]:
    """A data set in the layout of FSD50K; what it should become."""
    classes = ["Bark", "Dog", "Motor_vehicle_(road)", "Rain", "Never_heard"]
    (folder / "FSD50K.ground_truth").mkdir(parents=True)
    tables = {"dev": ["fname,labels,mids,split"], "eval": ["fname,labels,mids"]}
    expected = {}
    for number in range(3 * per_split):
        split = SPLITS[number % 3]
        part = "eval" if split == "test" else "dev"
        names = [["Bark", "Dog"], ["Rain"], ["Motor_vehicle_(road)", "Rain", "Dog"]][number // 3 % 3]
        mids = ",".join(f"/m/{name}" for name in names)
        row = f'{100 + number},"{",".join(names)}","{mids}"'
        tables[part].append(row + {"train": ",train", "validation": ",val", "test": ""}[split])
        save(folder / f"FSD50K.{part}_audio" / f"{100 + number}.wav", noise(number, 0.7 + number / 10), RATE)
        expected[str(100 + number)] = split, set(names)
    for part, rows in tables.items():
        (folder / "FSD50K.ground_truth" / f"{part}.csv").write_text("\n".join(rows) + "\n")
    vocabulary = "\n".join(f"{index},{name},/m/{name}" for index, name in enumerate(classes))
    (folder / "FSD50K.ground_truth" / "vocabulary.csv").write_text(vocabulary + "\n")
    return expected


def esc50(folder: Path) -> dict[str, tuple[int, str]]:
    """A data set in the layout of ESC-50: recording -> fold, class."""
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    expected = {}
    for target, category in ((0, "zebra"), (1, "door_knock"), (12, "cat")):
        for fold in range(1, 6):
            for take in "AB":
                name = f"{fold}-{100 * target + fold}-{take}-{target}"
                save(folder / "audio" / f"{name}.wav", noise(target * 100 + fold * 2 + (take == "B"), 2.5), RATE)
                rows.append(f"{name}.wav,{fold},{target},{category},False,{100 * target + fold},{take}")
                expected[name] = fold, category
    (folder / "meta").mkdir()
    (folder / "meta" / "esc50.csv").write_text("\r\n".join(rows) + "\r\n")
    return expected


def prepared(data: Path, settings: TaskSettings) -> ExampleStore:
    return prepare_clips(str(data), settings, progress=False)


def noise(seed: int, seconds: float = 0.5) -> np.ndarray:
    """A recording that is like no other: int16."""
    return np.random.default_rng(seed).integers(-3000, 3000, round(seconds * RATE)).astype(np.int16)


def stems(store: ExampleStore, split: str) -> list[str]:
    """The names of a split's recordings, without folders and endings, in order of their clips."""
    names = store.split(split).names
    return [] if names is None else [Path(name).stem for name in names]


def labels(store: ExampleStore) -> dict[str, tuple[str, set[str]]]:
    """Recording -> split and classes."""
    found = {}
    for split in SPLITS:
        for stem, label in zip(stems(store, split), store.split(split).labels, strict=True):
            numbers = np.flatnonzero(label) if store.multi_label else [label]
            found[stem] = split, {store.classes[number] for number in numbers}
    return found


def folders(folder: Path, count: int = 20, classes: tuple[str, ...] = ("high", "low ünd"), start: int = 0) -> None:
    for number, name in enumerate(classes):
        for index in range(count):
            save(folder / name / f"{name[0]}{start + index}.wav", noise(1000 * number + start + index), RATE)


def digits(folder: Path, form: str = "WAV", indices: int = 12) -> None:
    for digit in range(10):
        for speaker in ("jack", "o'neil"):
            for index in range(indices):
                number = digit * 100 + index * 2 + (speaker == "jack")
                save(folder / f"{digit}_{speaker}_{index}.{form.lower()}", noise(number, 0.2), RATE, form)
