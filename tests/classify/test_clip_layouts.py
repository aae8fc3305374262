"""Every layout of labelled recordings gives the examples that its tables and folders say."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.classify.recordings import RATE, digits, esc50, folders, fsd50k, labels, noise, prepared, stems
from tests.data.modalities.sounds import encoded, save, speech
from waveletgpt.classify.clips import prepare_clips
from waveletgpt.classify.settings import TaskSettings
from waveletgpt.data import SPLITS
from waveletgpt.data.sources.named import NAMED
from waveletgpt.errors import UserError


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
