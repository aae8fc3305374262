"""Every layout of labelled recordings gives the examples that its tables and folders say; broken files do no harm."""

from __future__ import annotations

import logging
import re
import shutil
import tarfile
import tracemalloc
import zipfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soxr
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.data.modalities.sounds import encoded, pcm, save, speech
from waveletgpt.classify import clips
from waveletgpt.classify.clips import pieces, prepare_clips, read_clips
from waveletgpt.classify.examples import ExampleStore
from waveletgpt.classify.settings import TaskSettings
from waveletgpt.data import SPLITS
from waveletgpt.data.sources.named import NAMED
from waveletgpt.errors import UserError

RATE = 1000
"""Samples a second of these sounds: few, to be quick."""


@pytest.fixture
def chosen(tmp_path: Path) -> TaskSettings:
    return TaskSettings(cache_dir=str(tmp_path / "cache"), sample_rate=RATE, clip_seconds=1.0)


def prepared(data: Path, settings: TaskSettings) -> ExampleStore:
    return prepare_clips(str(data), settings, progress=False)


def noise(seed: int, seconds: float = 0.5) -> np.ndarray:
    """A recording that is like no other: int16."""
    return np.random.default_rng(seed).integers(-3000, 3000, round(seconds * RATE)).astype(np.int16)


def snr(truth: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise, decibels."""
    return float(10 * np.log10((truth**2).sum() / ((truth - found) ** 2).sum()))


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


# --- recordings -> clips --------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_recording(tmp_path: Path, chosen: TaskSettings) -> None:
    """The clips of a recording, one after the other, are what it was; the rest that is dropped is under half a clip."""
    sounds = {
        f"{label}{index}": noise(10 * index + label, 0.3 + 0.45 * index) for label in (0, 1) for index in range(12)
    }
    for name, levels in sounds.items():
        save(tmp_path / "in" / f"class {name[0]}" / f"{name}.wav", levels, RATE)
    store = prepared(tmp_path / "in", chosen)
    assert (store.kind, store.modality, store.sample_rate, store.n_inputs) == ("waveform", "audio", RATE, 1)
    assert store.classes == ("class 0", "class 1")
    assert store.max_length == RATE
    seen = set()
    for split in SPLITS:
        examples = store.split(split)
        found = defaultdict(list)
        for index, stem in enumerate(stems(store, split)):
            found[examples.clips[index], stem].append(examples.raw(index)[0])
            assert store.classes[examples.labels[index]] == f"class {stem[0]}"
        assert sorted(clip for clip, _ in found) == list(range(len(found)))
        for (_, stem), parts in found.items():
            levels = sounds[stem]
            joined = np.concatenate(parts)
            assert np.array_equal(joined, levels[: len(joined)])
            assert len(levels) - len(joined) < (RATE / 2 if len(levels) > RATE else 1)
            assert all(len(part) == RATE for part in parts[:-1])
            assert stem not in seen
            seen.add(stem)
        item = examples[0]
        np.testing.assert_array_equal(item["input_values"].numpy() * 32768, examples.raw(0)[0])
    assert seen == set(sounds)


@hypothesis_settings(max_examples=100)
@given(st.integers(1, 3000), st.integers(1, 500))
def test_pieces_cover_a_recording(samples: int, length: int) -> None:
    """In order and without gaps; all but the last as long as asked for, which is at least half of it, or alone."""
    levels = np.arange(samples)
    found = list(pieces(levels, length))
    joined = np.concatenate(found)
    assert np.array_equal(joined, levels[: len(joined)])
    assert all(len(piece) == length for piece in found[:-1])
    assert len(found) == 1 or length / 2 <= len(found[-1]) <= length
    assert samples - len(joined) < max(1, length / 2) or len(found) == 0


def test_a_tone_survives(tmp_path: Path) -> None:
    """At its own rate within the rounding to 16 bits, from any format that is as exact; at another one as a tone."""
    times = np.arange(16_000) / 16_000
    tone = 0.8 * np.sin(2 * np.pi * 440 * times)
    for form, subtype in (("WAV", "FLOAT"), ("WAV", "PCM_24"), ("WAV", "DOUBLE"), ("FLAC", "PCM_24")):
        path = save(tmp_path / "tone", tone, 16_000, form, subtype)
        (found,) = read_clips(path, 16_000, 1.0)
        assert found.dtype == np.int16
        assert snr(tone, found / 32768) >= 80
    (found,) = read_clips(path, 8000, 1.0)
    assert len(found) == 8000
    assert snr(tone[::2][500:-500], found[500:-500] / 32768) >= 70


def test_16_bit_recordings_come_back_as_they_were(tmp_path: Path) -> None:
    levels = np.arange(-32768, 32768).astype(np.int16)
    (found,) = read_clips(save(tmp_path / "all.wav", levels, 16_000), 16_000, 10.0)
    assert np.array_equal(found, levels)


def test_beyond_full_scale_is_clipped(tmp_path: Path) -> None:
    loud = np.array([0.5, 1.0, 1.5, -1.0, -1.5, np.nan, np.inf], np.float32)
    (found,) = read_clips(save(tmp_path / "loud.wav", loud, 8000, subtype="FLOAT"), 8000, 1.0)
    assert found.tolist() == [16384, 32767, 32767, -32768, -32768, 0, 0]


def test_channels_and_rate(tmp_path: Path, chosen: TaskSettings) -> None:
    """Stereo at 44.1 kHz: what soxr makes of the mean of both."""
    both = np.stack([speech(1, 44_100), speech(1, 44_100, 1)], axis=1).astype(np.float32)
    (found,) = read_clips(save(tmp_path / "both.wav", both, 44_100, subtype="FLOAT"), 16_000, 1.0)
    expected = soxr.resample(both.mean(axis=1), 44_100, 16_000)
    np.testing.assert_allclose(found / 32768, expected, atol=1 / 32768)


def test_the_rest_of_a_long_recording_is_left_out(
    tmp_path: Path, chosen: TaskSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clips, "LONGEST", 3.0)
    for index in range(24):
        save(tmp_path / "in" / "ab"[index % 2] / f"{index}.wav", noise(index, 3.0), RATE)
    save(tmp_path / "in" / "a" / "long.wav", noise(99, 20.0), RATE)
    with caplog.at_level(logging.WARNING):
        store = prepared(tmp_path / "in", chosen)
    assert sum(len(store.split(split)) for split in SPLITS) == 25 * 3
    assert store.meta["source"]["cut"] == 1
    assert "only the first 3 seconds of 1 recordings are used" in caplog.text


def test_a_night_takes_little_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "night.flac", np.zeros(5_000_000, np.int16), RATE, "FLAC")
    tracemalloc.start()
    found = read_clips(path, RATE, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == clips.LONGEST
    assert peak < 40e6


# --- layouts --------------------------------------------------------------------------------------------------------


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


def test_fsd50k(tmp_path: Path, chosen: TaskSettings) -> None:
    expected = fsd50k(tmp_path / "FSD50K")
    store = prepared(tmp_path / "FSD50K", chosen)
    assert store.multi_label
    assert store.meta["layout"] == "FSD50K"
    assert store.classes == ("Bark", "Dog", "Motor_vehicle_(road)", "Rain", "Never_heard")
    assert labels(store) == expected
    assert store.split("train")[0]["labels"].shape == (5,)
    assert store.meta["division"] == "given"


def test_fsd50k_without_vocabulary(tmp_path: Path, chosen: TaskSettings) -> None:
    expected = fsd50k(tmp_path / "FSD50K")
    (tmp_path / "FSD50K" / "FSD50K.ground_truth" / "vocabulary.csv").unlink()
    store = prepared(tmp_path / "FSD50K", chosen)
    assert store.classes == ("Bark", "Dog", "Motor_vehicle_(road)", "Rain")
    assert labels(store) == expected


def test_fsd50k_in_zips_that_are_joined(tmp_path: Path, chosen: TaskSettings) -> None:
    expected = fsd50k(tmp_path / "FSD50K")
    (tmp_path / "zips").mkdir()
    for folder in (tmp_path / "FSD50K").iterdir():
        shutil.make_archive(str(tmp_path / "zips" / folder.name), "zip", tmp_path / "FSD50K", folder.name)
    assert labels(prepared(tmp_path / "zips", chosen)) == expected
    (tmp_path / "zips" / "FSD50K.dev_audio.z01").write_bytes(b"PK")
    with pytest.raises(
        UserError, match=r"z01 is a part of FSD50K.dev_audio.zip: join the parts \(zip -s 0 FSD50K.dev_audio"
    ):
        prepared(tmp_path / "zips", chosen)


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


@pytest.mark.parametrize("fold", [1, 2, 3, 4, 5])
def test_esc50(fold: int, tmp_path: Path, chosen: TaskSettings) -> None:
    """The fold asked for is the test split, the one after it validation; clips of one source are in one fold."""
    expected = esc50(tmp_path / "ESC-50-master")
    store = prepared(tmp_path / "ESC-50-master", replace(chosen, fold=fold))
    assert store.classes == ("zebra", "door_knock", "cat")
    assert store.meta["layout"] == "ESC-50"
    splits = {fold: "test", fold % 5 + 1: "validation"}
    assert labels(store) == {name: (splits.get(part, "train"), {label}) for name, (part, label) in expected.items()}
    assert store.meta["recordings"] == {"train": 18, "validation": 6, "test": 6}
    assert len(store.split("train")) == 3 * 18


def digits(folder: Path, form: str = "WAV", indices: int = 12) -> None:
    for digit in range(10):
        for speaker in ("jack", "o'neil"):
            for index in range(indices):
                number = digit * 100 + index * 2 + (speaker == "jack")
                save(folder / f"{digit}_{speaker}_{index}.{form.lower()}", noise(number, 0.2), RATE, form)


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_spoken_digits(form: str, tmp_path: Path, chosen: TaskSettings) -> None:
    """Indices 0 to 4 are the official test split; 5 to 9 of every speaker and digit are validation."""
    digits(tmp_path / "recordings", form)
    (tmp_path / "recordings" / "README.md").write_text("Recorded by us.")
    store = prepared(tmp_path / "recordings", chosen)
    assert store.classes == tuple("0123456789")
    assert store.meta["layout"] == "digits"
    for stem, (split, found) in labels(store).items():
        digit, _, index = stem.split("_")
        assert found == {digit}
        assert split == ("test" if int(index) < 5 else "validation" if int(index) < 10 else "train")
    assert [len(store.split(split)) for split in SPLITS] == [40, 100, 100]
    assert store.meta["skipped"]["count"] == 0


def folders(folder: Path, count: int = 20, classes: tuple[str, ...] = ("high", "low ünd"), start: int = 0) -> None:
    for number, name in enumerate(classes):
        for index in range(count):
            save(folder / name / f"{name[0]}{start + index}.wav", noise(1000 * number + start + index), RATE)


def test_class_folders_are_divided(tmp_path: Path, chosen: TaskSettings) -> None:
    """A tenth each for validation and test, classes in their shares, by content: whatever files are called."""
    folders(tmp_path / "in", 40)
    store = prepared(tmp_path / "in", chosen)
    assert store.meta["division"] == "hash"
    found = labels(store)
    assert Counter((split, *label) for split, label in found.values()) == {
        (split, label): 4 if split != "train" else 32 for split in SPLITS for label in store.classes
    }
    sounds = {split: {examples.raw(i)[0].tobytes() for i in range(len(examples))}
              for split in SPLITS for examples in [store.split(split)]}  # fmt: skip
    for index, path in enumerate(sorted((tmp_path / "in").rglob("*.wav"))):
        path.rename(path.with_name(f"{index}.wav"))
    again = prepared(tmp_path / "in", chosen)
    assert again.fingerprint != store.fingerprint
    for split in SPLITS:
        examples = again.split(split)
        assert {examples.raw(i)[0].tobytes() for i in range(len(examples))} == sounds[split]


def test_split_folders(tmp_path: Path, chosen: TaskSettings) -> None:
    """Validation is held out of training where it isn't there."""
    folders(tmp_path / "in" / "Train", 20)
    folders(tmp_path / "in" / "test", 5, start=100)
    store = prepared(tmp_path / "in", chosen)
    assert store.meta["division"] == "held out"
    assert store.meta["recordings"] == {"train": 36, "validation": 4, "test": 10}
    assert all(int(stem[1:]) >= 100 for stem in stems(store, "test"))
    folders(tmp_path / "in" / "valid", 3, start=200)
    store = prepared(tmp_path / "in", chosen)
    assert store.meta["division"] == "given"
    assert store.meta["recordings"] == {"train": 40, "validation": 6, "test": 10}
    assert all(int(stem[1:]) >= 200 for stem in stems(store, "validation"))


def test_classes_below_other_folders(tmp_path: Path, chosen: TaskSettings) -> None:
    """What all have in common is no class; deeper folders belong to their class; what is in none is left out."""
    folders(tmp_path / "in" / "v1" / "sounds", 20, ("a", "b"))
    folders(tmp_path / "in" / "v1" / "sounds" / "a", 5, ("more",), start=50)
    save(tmp_path / "in" / "v1" / "sounds" / "stray.wav", noise(777), RATE)
    store = prepared(tmp_path / "in", chosen)
    assert store.classes == ("a", "b")
    assert sum(store.meta["recordings"].values()) == 45
    assert store.meta["skipped"] == {"count": 1, "names": ["v1/sounds/stray.wav (not in a class folder)"]}


def test_train_can_be_a_class(tmp_path: Path, chosen: TaskSettings) -> None:
    folders(tmp_path / "in", 20, ("train", "car", "plane"))
    assert prepared(tmp_path / "in", chosen).classes == ("car", "plane", "train")


def test_archives_give_what_the_folder_gives(tmp_path: Path, chosen: TaskSettings) -> None:
    folders(tmp_path / "set")
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "set", "set")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as zipped:
        for path in (tmp_path / "set").rglob("*.wav"):
            zipped.write(path, path.relative_to(tmp_path))
        zipped.writestr("../../escaped.wav", encoded(noise(0)))
    expected = labels(prepared(tmp_path / "set", chosen))
    assert labels(prepared(tmp_path / "set.tar.gz", chosen)) == expected
    before = set(tmp_path.rglob("*.wav"))
    assert labels(prepared(tmp_path / "set.zip", chosen)) == expected
    assert set(tmp_path.rglob("*.wav")) == before


# --- splits ---------------------------------------------------------------------------------------------------------


def test_copies_are_in_one_split(tmp_path: Path, chosen: TaskSettings) -> None:
    """Whatever they are called, also where the splits are given; test keeps them."""
    folders(tmp_path / "in" / "train", 20)
    folders(tmp_path / "in" / "test", 5, start=100)
    for name in ("a", "b"):
        shutil.copy(tmp_path / "in/test/high/h100.wav", tmp_path / f"in/train/high/{name}.wav")
    store = prepared(tmp_path / "in", chosen)
    assert "h100" in stems(store, "test")
    assert store.meta["recordings"]["train"] + store.meta["recordings"]["validation"] == 40
    assert store.meta["source"]["copies_left_out"] == 2


def test_numbers_of_recordings(tmp_path: Path, chosen: TaskSettings) -> None:
    """So many recordings, with all their clips and classes in their shares; the same ones for the same seed."""
    for index in range(60):
        save(tmp_path / "in" / "abc"[index % 3] / f"{index}.wav", noise(index, 2.0), RATE)
    fewer = replace(chosen, train_examples=9, validation_examples=6, test_examples=3)
    store = prepared(tmp_path / "in", fewer)
    assert store.meta["recordings"] == {"train": 9, "validation": 6, "test": 3}
    assert [len(store.split(split)) for split in SPLITS] == [18, 12, 6]
    assert np.bincount(store.split("train").labels).tolist() == [6, 6, 6]
    other = prepared(tmp_path / "in", replace(fewer, data_seed=1))
    assert set(stems(other, "train")) != set(stems(store, "train"))
    everything = prepared(tmp_path / "in", chosen)
    assert set(stems(store, "test")) <= set(stems(everything, "test"))
    with pytest.raises(UserError, match=r"test_examples is 99, but .* has 6 for test: give at most that"):
        prepared(tmp_path / "in", replace(chosen, test_examples=99))


def test_found_again_until_something_changes(tmp_path: Path, chosen: TaskSettings) -> None:
    folders(tmp_path / "in")
    store = prepared(tmp_path / "in", chosen)
    times = {path: path.stat().st_mtime_ns for path in store.path.iterdir()}
    again = prepared(tmp_path / "in", chosen)
    assert again.path == store.path
    assert {path: path.stat().st_mtime_ns for path in again.path.iterdir()} == times
    changed = (replace(chosen, clip_seconds=0.1), replace(chosen, sample_rate=2000), replace(chosen, data_seed=1))
    others = [prepared(tmp_path / "in", settings) for settings in changed]
    assert len({store.path, *(other.path for other in others)}) == 4
    assert others[0].max_length == 100
    assert others[1].max_length == 1000
    elsewhere = replace(chosen, cache_dir=str(tmp_path / "other cache"))
    twin = prepared(tmp_path / "in", elsewhere)
    for split in SPLITS:
        for kind in ("data", "labels", "clips"):
            first, second = (one.path / f"{kind}-{split}.bin" for one in (store, twin))
            assert first.read_bytes() == second.read_bytes()


# --- broken files ---------------------------------------------------------------------------------------------------


def test_broken_files_are_skipped_named_and_counted(
    tmp_path: Path, chosen: TaskSettings, caplog: pytest.LogCaptureFixture
) -> None:
    folders(tmp_path / "in")
    good, flac = encoded(noise(1), RATE), encoded(noise(1, 3.0), RATE, "FLAC")
    broken = {
        "empty.wav": b"", "header.wav": good[:44], "garbage.mp3": bytes(range(256)) * 8,
        "truncated.flac": flac[: len(flac) // 2], "slow.wav": encoded(np.zeros(1000), 100),
        "table.wav": encoded(np.zeros(1000), form="MAT5"),
    }  # fmt: skip
    for name, content in broken.items():
        (tmp_path / "in" / "high" / name).write_bytes(content)
    (tmp_path / "in" / "high" / "notes.txt").write_text("no sound, and not said to be one")
    with caplog.at_level(logging.WARNING):
        store = prepared(tmp_path / "in", chosen)
    assert sum(store.meta["recordings"].values()) == 40
    assert store.meta["skipped"]["count"] == len(broken)
    names = [re.match(r"high/(\S+) \(.+\)$", name) for name in store.meta["skipped"]["names"]]
    assert {name and name[1] for name in names} == set(broken)
    assert "high/slow.wav (100 samples a second)" in store.meta["skipped"]["names"]
    assert "skipped 6 files without usable recordings" in caplog.text
    assert not list(tmp_path.glob("cache/examples/.*tmp*"))


def test_recordings_that_are_in_no_table(tmp_path: Path, chosen: TaskSettings) -> None:
    esc50(tmp_path / "in")
    save(tmp_path / "in" / "audio" / "more.wav", noise(5000), RATE)
    store = prepared(tmp_path / "in", chosen)
    assert store.meta["skipped"]["names"] == ["audio/more.wav (not in esc50.csv)"]
    assert "more" not in labels(store)


def test_large_files_are_skipped(tmp_path: Path, chosen: TaskSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "FILE_LIMIT", 30_000)
    folders(tmp_path / "in")
    save(tmp_path / "in" / "high" / "large.wav", noise(0, 20.0), RATE)
    assert prepared(tmp_path / "in", chosen).meta["skipped"]["names"] == ["high/large.wav (larger than 0 GB)"]


def test_names_that_are_no_text(tmp_path: Path, chosen: TaskSettings) -> None:
    folders(tmp_path / "in")
    for name, content in ((b"\xff.wav", encoded(noise(4), RATE)), (b"\xfe.wav", b"none")):
        (tmp_path / "in" / "high" / name.decode(errors="surrogateescape")).write_bytes(content)
    store = prepared(tmp_path / "in", chosen)
    assert sum(store.meta["recordings"].values()) == 41
    assert store.meta["skipped"]["names"][0].startswith("high/?.wav (")


def test_what_cannot_be_used(tmp_path: Path, chosen: TaskSettings) -> None:
    """One line that says what is there and how to mend it."""

    def refused(message: str, settings: TaskSettings = chosen) -> None:
        with pytest.raises(UserError, match=message):
            prepared(tmp_path / "in", settings)
        shutil.rmtree(tmp_path / "in", ignore_errors=True)

    refused(r'".*in" is not a folder, archive or data set with classes \(fsdd\)')
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("nothing to hear")
    refused("has no recordings: give a folder or archive with WAV")
    folders(tmp_path / "in", 5, ("only",))
    refused("has one class, only: put the recordings of each class in a folder")
    folders(tmp_path / "in", 5, ("only",))
    save(tmp_path / "in" / "a.flac", noise(0), RATE, "FLAC")
    save(tmp_path / "in" / "only" / "sub" / "a.wav", noise(1), RATE)
    refused(r"has one class, sub: put the recordings of each class in a folder")
    save(tmp_path / "in" / "a.wav", noise(0), RATE)
    refused("has no class folders: put the recordings of each class in a folder")
    folders(tmp_path / "in", 1)
    refused(r"has no test recordings \(folders\): give more of each class")
    folders(tmp_path / "in" / "train", 5)
    folders(tmp_path / "in" / "test", 5, start=10)
    folders(tmp_path / "in", 5, ("extra",), start=20)
    refused(r"has folders of splits \(test, train\) and others \(extra\): leave only splits, or only classes")
    folders(tmp_path / "in" / "train", 5)
    folders(tmp_path / "in" / "val", 5, start=10)
    refused("has the splits train, val, but no test: add it")
    folders(tmp_path / "in" / "train", 10)
    folders(tmp_path / "in" / "test", 5, ("high", "low ünd", "new"), start=10)
    refused("has no recording to train on of the class new: add some")
    for name in ("high", "low"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.wav").write_bytes(b"no sound")
    refused(r"no recordings in .* that can be used \(high/a.wav \(Format not recognised")
    digits(tmp_path / "in", indices=7)
    refused(r"has no train recordings \(digits\): give the whole data set")


def test_tables_that_are_wrong(tmp_path: Path, chosen: TaskSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(table: Path, content: str | None, message: str) -> None:
        before = table.read_bytes()
        table.unlink() if content is None else table.write_text(content)
        with pytest.raises(UserError, match=message):
            prepared(table.parents[1], chosen)
        table.write_bytes(before)

    fsd50k(tmp_path / "fsd")
    esc50(tmp_path / "esc")
    truth, table = tmp_path / "fsd" / "FSD50K.ground_truth", tmp_path / "esc" / "meta" / "esc50.csv"
    refused(truth / "eval.csv", None, r"eval\.csv is missing: add it")
    refused(truth / "eval.csv", "fname\n1\n", r"eval\.csv is not the official table: a row lacks one of fname, labels")
    refused(truth / "dev.csv", "fname,labels,split\n1,Dog\n", r"dev\.csv is not the official table: a row lacks")
    refused(truth / "dev.csv", "fname\rlabels\r,split\n1,Dog,train\n", r"dev\.csv is not the official table")
    refused(truth / "dev.csv", "name,tags,split\n100,Dog,train\n", r"dev\.csv is not the official table of FSD50K")
    refused(table, "filename,fold,target,category\na.wav,7,0,cat\n", 'a fold is "7", not 1 to 5')
    refused(table, "sound\n1\n", r"esc50\.csv is not the official table: a row lacks one of filename, fold")
    refused(table, "filename,fold,target,category\n" + "x" * 200_000, r"esc50\.csv is not the official table: field")
    shutil.copytree(truth, tmp_path / "esc" / "FSD50K.ground_truth")
    with pytest.raises(UserError, match=r"holds FSD50K and ESC-50 \(dev.csv, esc50.csv\): give the folder of one"):
        prepared(tmp_path / "esc", chosen)
    monkeypatch.setattr(clips, "TABLE_LIMIT", 10)
    with pytest.raises(UserError, match=r"csv is larger than 0 MB: give the official table"):
        prepared(tmp_path / "esc", chosen)


def test_tables_in_other_encodings_are_read_by_their_mark_or_refused(tmp_path: Path, chosen: TaskSettings) -> None:
    expected = {name: {label} for name, (_, label) in esc50(tmp_path / "esc").items()}
    table = tmp_path / "esc" / "meta" / "esc50.csv"
    text = table.read_text().replace("door_knock", "door_knöck")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        table.write_text(text, encoding=encoding)
        found = labels(prepared(tmp_path / "esc", chosen))
        wanted = {name: {label.replace("knock", "knöck") for label in given} for name, given in expected.items()}
        assert {name: label for name, (_, label) in found.items()} == wanted
    table.write_bytes(text.replace("\n", "\r").encode())  # as spreadsheets on old Macs wrote
    assert len(labels(prepared(tmp_path / "esc", chosen))) == len(expected)
    table.write_text(text, encoding="cp1252")
    with pytest.raises(UserError, match=r"esc50\.csv has 10 bytes that are not UTF-8: save it as UTF-8"):
        prepared(tmp_path / "esc", chosen)


def test_tables_without_classes(tmp_path: Path, chosen: TaskSettings) -> None:
    fsd50k(tmp_path / "fsd")
    truth = tmp_path / "fsd" / "FSD50K.ground_truth"
    dev, named = (truth / "dev.csv").read_text(), (truth / "vocabulary.csv").read_text()
    (truth / "dev.csv").write_text(dev.replace("fname,labels", '"fname","labels"'))
    assert prepared(tmp_path / "fsd", chosen).meta["layout"] == "FSD50K"
    (truth / "vocabulary.csv").write_text(named + "\n9,Bark,/m/Bark\n")
    with pytest.raises(UserError, match="has two classes called Bark: give each"):
        prepared(tmp_path / "fsd", chosen)
    (truth / "vocabulary.csv").unlink()
    (truth / "dev.csv").write_text("fname,labels,split\n100,,train\n101,,val\n")
    (truth / "eval.csv").write_text("fname,labels\n102,\n")
    with pytest.raises(UserError, match=r"dev\.csv and eval\.csv name no class"):
        prepared(tmp_path / "fsd", chosen)


def test_copies_only(tmp_path: Path, chosen: TaskSettings) -> None:
    for label in "ab":
        for number in range(5):
            save(tmp_path / "in" / label / f"{number}.wav", noise(0), RATE)
    with pytest.raises(UserError, match=r"has no \w+ recordings \(folders\): give more of each class"):
        prepared(tmp_path / "in", chosen)


def test_spoken_digits_by_name(tmp_path: Path, chosen: TaskSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is already there, verified; here one that is smaller than the real one."""
    digits(tmp_path / "free-spoken-digit-dataset-1.0.9" / "recordings")
    (tmp_path / "copies").mkdir()
    with tarfile.open(tmp_path / "copies" / NAMED["fsdd"].file, "w:gz") as archive:
        archive.add(tmp_path / "free-spoken-digit-dataset-1.0.9", "free-spoken-digit-dataset-1.0.9")
    there = replace(chosen, data_dir=str(tmp_path / "copies"))
    with pytest.raises(UserError, match=r"bytes instead of 11,975,353: remove it and get it again"):
        prepare_clips("fsdd", there, progress=False)
    monkeypatch.setitem(NAMED, "fsdd", replace(NAMED["fsdd"], size=None, sha256=None))
    store = prepare_clips("fsdd", there, progress=False)
    assert store.meta["recordings"] == {"train": 40, "validation": 100, "test": 100}


def test_named_sets_without_classes(chosen: TaskSettings) -> None:
    with pytest.raises(
        UserError, match='the data set "librispeech-dev-clean" has no recordings with classes: give fsdd or a folder'
    ):
        prepare_clips("librispeech-dev-clean", chosen, progress=False)


def test_a_file_that_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("no sound")
    with pytest.raises(UserError, match=r"a\.wav cannot be read as a recording \(Format not recognised"):
        read_clips(tmp_path / "a.wav", RATE, 1.0)
    levels = pcm(speech(2.2))
    found = read_clips(save(tmp_path / "b.wav", levels), 16_000, 1.0)
    assert [len(piece) for piece in found] == [16_000, 16_000]
    assert np.array_equal(np.concatenate(found), levels[:32_000])


def test_folds_of_urbansound_are_splits_and_no_classes(tmp_path: Path) -> None:
    root = tmp_path / "UrbanSound8K"
    lines = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for fold in (1, 2, 3):
        for number, word in ((7, "jackhammer"), (0, "air_conditioner")):
            for piece in range(2):
                name = f"{fold}-{number}-{piece}.wav"
                (root / f"audio/fold{fold}").mkdir(parents=True, exist_ok=True)
                save(root / f"audio/fold{fold}/{name}", speech(0.3, seed=100 * fold + 10 * number + piece))
                lines.append(f"{name},{fold},0,0.3,1,{fold},{number},{word}")
    (root / "metadata").mkdir()
    (root / "metadata/UrbanSound8K.csv").write_text("\n".join(lines))
    for fold, validation in ((1, "2"), (3, "1")):
        settings = TaskSettings(cache_dir=str(tmp_path / "cache"), sample_rate=RATE, clip_seconds=1.0, fold=fold)
        store = prepare_clips(str(root), settings, progress=False)
        assert list(store.classes) == ["air_conditioner", "jackhammer"]
        assert [len(store.split(split)) for split in ("train", "validation", "test")] == [4, 4, 4], validation
    with pytest.raises(UserError, match="folds of this data are 1, 2, 3"):
        prepare_clips(str(root), TaskSettings(cache_dir=str(tmp_path / "cache"), fold=7), progress=False)


def test_lists_of_speech_commands_are_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "words"
    for word, seed in (("yes", 0), ("no", 100), ("_background_noise_", 200)):
        (root / word).mkdir(parents=True)
        for index in range(6):
            save(root / word / f"{index}.wav", speech(0.3, seed=seed + index))
    (root / "validation_list.txt").write_text("yes/0.wav\nno/0.wav\n")
    (root / "testing_list.txt").write_text("yes/1.wav\nno/1.wav\nno/2.wav\n")
    settings = TaskSettings(cache_dir=str(tmp_path / "cache"), sample_rate=RATE, clip_seconds=1.0)
    store = prepare_clips(str(root), settings)
    assert list(store.classes) == ["no", "yes"]
    assert [len(store.split(split)) for split in ("train", "validation", "test")] == [7, 2, 3]
    assert "2 classes: no, yes" in capsys.readouterr().err


def test_a_table_beside_class_folders_is_not_passed_over(tmp_path: Path) -> None:
    for word in ("a", "b"):
        (tmp_path / "data" / word).mkdir(parents=True)
        save(tmp_path / "data" / word / "0.wav", speech(0.3))
    (tmp_path / "data/labels.csv").write_text("file,label\n")
    with pytest.raises(UserError, match=r"labels\.csv, a table whose classes may differ"):
        prepare_clips(str(tmp_path / "data"), TaskSettings(cache_dir=str(tmp_path / "cache")), progress=False)
