"""Broken recordings and tables do no harm: they are named, counted, or refused in one line."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.classify.recordings import RATE, digits, esc50, folders, fsd50k, labels, noise, prepared
from tests.data.modalities.sounds import encoded, save
from waveletgpt.classify import clips
from waveletgpt.classify.clips import prepare_clips
from waveletgpt.classify.settings import TaskSettings
from waveletgpt.errors import UserError


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


def test_named_sets_without_classes(chosen: TaskSettings) -> None:
    with pytest.raises(
        UserError, match='the data set "librispeech-dev-clean" has no recordings with classes: give fsdd or a folder'
    ):
        prepare_clips("librispeech-dev-clean", chosen, progress=False)
