"""Splits don't overlap, don't move when files are added, stay together with their copies, and may be folders."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from waveletgpt.data import SPLITS, DataSettings, TokenStore, prepare
from waveletgpt.data.splits import Spool, point_of, split_at, split_of
from waveletgpt.errors import UserError


def documents(store: TokenStore) -> dict[str, set[bytes]]:
    found = {}
    for split in SPLITS:
        tokens = store.split(split)
        parts = np.split(tokens, np.flatnonzero(tokens == 256) + 1)[:-1]
        found[split] = {bytes(part[:-1].tolist()) for part in parts}
    return found


def test_many_documents_by_content(folder: Path, settings: DataSettings, prose: Callable[[int, int], str]) -> None:
    before = prepare(folder, "bytes", settings, progress=False)
    assert before.meta["split"] == "hash"
    first = documents(before)
    assert sum(map(len, first.values())) == 300
    assert not first["train"] & first["validation"]
    assert not first["train"] & first["test"]
    for index in range(300, 360):
        (folder / f"{index}.txt").write_text(prose(60, index), encoding="utf-8")
    for path in sorted(folder.rglob("*.txt"))[:40]:
        path.with_name("copy-" + path.name).write_bytes(path.read_bytes())
    after = prepare(folder, "bytes", settings, progress=False)
    assert after.fingerprint != before.fingerprint
    second = documents(after)
    for split in SPLITS:
        assert first[split] <= second[split]
    assert sum(map(len, second.values())) == 360
    assert sum(counts["documents"] for counts in after.meta["splits"].values()) == 400


def test_the_split_is_the_same_for_every_modality(folder: Path, settings: DataSettings) -> None:
    counts = [
        [prepare(folder, modality, settings, progress=False).meta["splits"][split]["documents"] for split in SPLITS]
        for modality in ("bytes", "chars", "text8")
    ]
    assert counts[0] == counts[1] == counts[2]


@given(content=st.binary(max_size=100))
def test_shares_nest(content: bytes) -> None:
    """A document that is held out stays so when more is held out."""
    small = split_at(point_of(content), DataSettings(validation_fraction=0.2, test_fraction=0.3))
    large = split_at(point_of(content), DataSettings(validation_fraction=0.4, test_fraction=0.3))
    assert (small, large) in {(s, s) for s in SPLITS} | {("train", "validation")}


def test_hash_shares_are_near_the_fractions() -> None:
    found = [split_at(point_of(str(index).encode()), DataSettings()) for index in range(20_000)]
    for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        assert found.count(split) / len(found) == pytest.approx(share, abs=0.006)  # four standard deviations


def test_one_document_by_position(tmp_path: Path, settings: DataSettings) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(32, 127)) * 100)
    store = prepare(path, "bytes", settings, progress=False)
    assert store.meta["split"] == "position"
    whole = np.concatenate([store.split(split) for split in SPLITS])
    assert bytes(whole[:-1].tolist()) == path.read_bytes()
    assert [len(store.split(split)) for split in SPLITS] == [8550, 475, 476]
    assert [store.meta["splits"][split]["bytes"] for split in SPLITS] == [8550, 475, 475]
    chosen = DataSettings(cache_dir=settings.cache_dir, validation_fraction=0.25, test_fraction=0.0)
    store = prepare(path, "bytes", chosen, progress=False)
    assert [len(store.split(split)) for split in SPLITS] == [7125, 2376, 0]
    assert store.bytes_per_token("test") is None


def test_few_documents_by_position(tmp_path: Path, settings: DataSettings, prose: Callable[[int, int], str]) -> None:
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(prose(500, index), encoding="utf-8")
    store = prepare(tmp_path, "chars", DataSettings(cache_dir=settings.cache_dir, include="*.txt"), progress=False)
    assert store.meta["split"] == "position"
    assert [store.meta["splits"][split]["documents"] for split in SPLITS] == [2, 0, 1]
    text = "".join((tmp_path / f"{index}.txt").read_text(encoding="utf-8") + "<|endoftext|>" for index in range(3))
    whole = np.concatenate([store.split(split) for split in SPLITS])
    assert store.load_tokenizer().decode(whole.tolist()) == text


@hypothesis_settings(max_examples=50, deadline=None)
@given(cut=st.integers(1, 40), text=st.text(min_size=30, max_size=60))
def test_positions_never_cut_a_character(cut: int, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Spool(tmp_path_factory.mktemp("spool")) as spool:
        spool.end_document("train", spool.write(text.encode()))
        spool.divide(DataSettings(validation_fraction=cut / 50, test_fraction=0.1))
        pieces = list(spool.pieces(len))
    assert "".join(piece.data.decode() for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@hypothesis_settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    unit=st.sampled_from([1, 2, 6]),
    gap=st.integers(0, 50),
    held_out=st.tuples(st.floats(0.01, 0.4), st.sampled_from([0.0, 0.05, 0.3])),
)
def test_splits_of_a_spool(lengths: list[int], unit: int, gap: int, held_out: tuple[float, float]) -> None:
    """Whatever the lengths: what is read back is what was written, less the gaps, each part of it in one split."""
    chosen = DataSettings(validation_fraction=held_out[0], test_fraction=held_out[1])
    with tempfile.TemporaryDirectory() as folder, Spool(Path(folder)) as spool:
        for index, length in enumerate(lengths):
            point = point_of(bytes([index]))
            spool.write(b"broken")
            spool.drop_document()
            spool.end_document(split_of(None, point, chosen, set()), spool.write(bytes([index]) * length * unit), point)
        spool.divide(chosen, unit=unit, gap=gap)
        pieces = list(spool.pieces(lambda block: len(block) // unit * unit))
    assert all(len(piece.data) % unit == 0 for piece in pieces)
    for split in SPLITS:
        assert sum(len(piece.data) for piece in pieces if piece.split == split) == spool.sizes[split]
    written = b"".join(bytes([index]) * length * unit for index, length in enumerate(lengths))
    read = b"".join(piece.data for piece in pieces)
    if spool.method == "position":
        gaps = 2 if held_out[1] else 1
        assert len(written) - len(read) == spool.gap * unit * gaps
        assert spool.gap <= gap
        assert written.startswith(b"".join(piece.data for piece in pieces if piece.split == "train"))
        last = [piece.data for piece in pieces if piece.split == ("test" if held_out[1] else "validation")]
        assert written.endswith(b"".join(last))
    else:
        assert read == written
        homes = [{piece.split for piece in pieces if index in piece.data} for index in range(len(lengths))]
        assert all(len(home) == 1 for home in homes)
        for split, share in zip(SPLITS[1:], held_out, strict=True):
            assert share / 2 <= spool.sizes[split] / len(written) <= share * 2


def test_too_short(tmp_path: Path, settings: DataSettings) -> None:
    (tmp_path / "short.txt").write_text("only this")
    message = r"short\.txt is too short: 9 bytes of text give train 8, validation 1, test 0; each split needs 2 or more"
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "short.txt", "bytes", settings, progress=False)
    (tmp_path / "blank.txt").write_text("?!" * 500)
    with pytest.raises(UserError, match="too short: 1 bytes of text"):
        prepare(tmp_path / "blank.txt", "text8", settings, progress=False)
    assert not list(Path(settings.cache).glob("stores/[!.]*"))


@pytest.mark.parametrize(
    "fractions", [(0.0, 0.1), (-0.1, 0.1), (0.5, 0.5), (float("nan"), 0.1), (1.0, 0.0), (0.1, -0.01)]
)
def test_impossible_fractions(fractions: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="fraction"):
        DataSettings(validation_fraction=fractions[0], test_fraction=fractions[1])


# --- splits that are folders ----------------------------------------------------------------------------------------


def corpus(root: Path, counts: dict[str, int]) -> Path:
    """`counts` files in each folder, each a text that tells which it is."""
    for folder, count in counts.items():
        (root / folder / "deep").mkdir(parents=True, exist_ok=True)
        for index in range(count):
            text = f"{folder} {index}\n" * (50 + index)
            (root / folder / ("deep" if index % 2 else ".") / f"{index:03}.txt").write_text(text)
    return root


def homes(store: TokenStore) -> dict[str, set[str]]:
    """split -> the folders that its documents come from."""
    return {split: {text.split()[0].decode() for text in found} for split, found in documents(store).items()}


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "Dev"])
def test_folders_are_splits(name: str, tmp_path: Path, settings: DataSettings) -> None:
    root = corpus(tmp_path / "in", {"train": 3, name: 2, "test": 1})
    (root / "README.md").write_text("Beside them.\n")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("hidden")
    store = prepare(root, "bytes", settings, progress=False)
    assert store.meta["split"] == "given"
    assert homes(store) == {"train": {"train"}, "validation": {name}, "test": {"test"}}
    assert [store.meta["splits"][split]["documents"] for split in SPLITS] == [3, 2, 1]


def test_folders_are_splits_for_tables_and_archives_in_them(tmp_path: Path, settings: DataSettings) -> None:
    import gzip

    root = corpus(tmp_path / "in", {"train": 2, "test": 1})
    (root / "dev").mkdir()
    (root / "dev" / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "dev 0"}\n{"text": "dev 1"}\n'))
    store = prepare(root, "bytes", settings, progress=False)
    assert homes(store)["validation"] == {"dev"}
    assert store.meta["splits"]["validation"]["documents"] == 2


def _sound(path: Path, index: int) -> None:
    from tests.data.modalities.sounds import save

    save(path.with_suffix(".wav"), np.full(40, index / 100), 16_000)


def _picture(path: Path, index: int) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((4, 4), index, np.uint8)).save(path.with_suffix(".png"))


def _piece(path: Path, index: int) -> None:
    pytest.importorskip("symusic")
    from waveletgpt.data.modalities.midi import NOTES, write_midi

    write_midi(np.array([(0, 1, index, 60)], NOTES), path.with_suffix(".mid"))


def _expression(path: Path, index: int) -> None:
    path.with_suffix(".tsv").write_text(f"[MAX {index % 10} {index // 10} ]\t{max(index % 10, index // 10)}\n")


@pytest.mark.parametrize(
    ("modality", "write"), [("audio", _sound), ("images", _picture), ("music", _piece), ("listops", _expression)]
)
@pytest.mark.parametrize("missing", [None, "val"])
def test_folders_are_splits_for_every_modality(
    missing: str | None, modality: str, write: Callable[[Path, int], None], tmp_path: Path, settings: DataSettings
) -> None:
    """As many documents as the folders have files; a split without folder takes some training files."""
    index = 0
    for folder, count in (("train", 40), ("val", 3), ("test", 2)):
        if folder != missing:
            (tmp_path / "in" / folder).mkdir(parents=True)
            for _ in range(count):
                index += 1
                write(tmp_path / "in" / folder / str(index), index)
    chosen = DataSettings(cache_dir=settings.cache_dir, image_size=4)
    store = prepare(tmp_path / "in", modality, chosen, progress=False)
    assert store.meta["split"] == "given"
    documents = [store.meta["splits"][split]["documents"] for split in SPLITS]
    assert documents[2] == 2
    assert documents[0] + documents[1] == (40 if missing else 43)
    assert 1 <= documents[1] <= 4
    if not missing:
        assert documents == [40, 3, 2]


@pytest.mark.parametrize("given", ["validation", "test"])
def test_a_split_without_folder_is_taken_from_training(given: str, tmp_path: Path, settings: DataSettings) -> None:
    missing = {"validation": "test", "test": "validation"}[given]
    root = corpus(tmp_path / "in", {"train": 100, given: 20})
    store = prepare(root, "bytes", settings, progress=False)
    found = documents(store)
    assert store.meta["split"] == "given"
    assert homes(store) == {"train": {"train"}, missing: {"train"}, given: {given}}
    assert len(found[given]) == 20
    assert len(found["train"]) + len(found[missing]) == 100
    assert not found["train"] & found[missing]
    assert 1 <= len(found[missing]) <= 12  # a twentieth, give or take a factor of two


@pytest.mark.parametrize("given", ["validation", "test"])
def test_few_training_documents_are_dealt_out_whole(given: str, tmp_path: Path, settings: DataSettings) -> None:
    root = corpus(tmp_path / "in", {"train": 2, given: 1})
    store = prepare(root, "bytes", settings, progress=False)
    assert homes(store)[given] == {given}
    assert [store.meta["splits"][split]["documents"] for split in SPLITS] == [1, 1, 1]
    (root / "train" / "deep" / "001.txt").unlink()
    missing = {"validation": "test", "test": "validation"}[given]
    with pytest.raises(UserError, match=f"too few documents to take {missing} from: add a folder {missing}"):
        prepare(root, "bytes", settings, progress=False)


def test_no_test_split_is_asked_for(tmp_path: Path, settings: DataSettings) -> None:
    chosen = DataSettings(cache_dir=settings.cache_dir, test_fraction=0.0)
    store = prepare(corpus(tmp_path / "in", {"train": 1, "val": 1}), "bytes", chosen, progress=False)
    assert homes(store) == {"train": {"train"}, "validation": {"val"}, "test": set()}


def test_a_folder_with_nothing_usable(tmp_path: Path, settings: DataSettings) -> None:
    root = corpus(tmp_path / "in", {"train": 3, "test": 1})
    (root / "valid").mkdir()
    (root / "valid" / "blob.txt").write_bytes(b"\0\1" * 100)
    with pytest.raises(UserError, match="splits of its own, but nothing in its validation split can be used"):
        prepare(root, "chars", settings, progress=False)


@pytest.mark.parametrize(
    "folders", [("train",), ("train", "car"), ("train", "test", "bus"), ("dev", "test"), ("a", "b")]
)
def test_other_folders_mean_nothing(folders: tuple[str, ...], tmp_path: Path, settings: DataSettings) -> None:
    store = prepare(corpus(tmp_path / "in", dict.fromkeys(folders, 150)), "bytes", settings, progress=False)
    assert store.meta["split"] == "hash"
    assert homes(store)["train"] == set(folders)


def test_a_chosen_folder_is_a_corpus(tmp_path: Path, settings: DataSettings) -> None:
    root = corpus(tmp_path / "in", {"train": 300, "test": 10})
    chosen = DataSettings(cache_dir=settings.cache_dir, include="train/*")
    store = prepare(root, "bytes", chosen, progress=False)
    assert store.meta["split"] == "hash"
    assert homes(store) == {split: {"train"} for split in SPLITS}


def test_what_was_taken_is_said(tmp_path: Path, settings: DataSettings, capsys: pytest.CaptureFixture[str]) -> None:
    root = corpus(tmp_path / "in", {"train": 3, "dev": 2, "test": 1})
    (root / "README.md").write_text("Beside them.\n")
    prepare(root, None, settings, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{root}: taken as chars; `modality` changes that: text8, bytes" in err
    assert f"{root}: its folders dev, test, train are the splits; left out beside them: README.md" in err


@given(point=st.floats(0, 1, exclude_max=True), own=st.sets(st.sampled_from(SPLITS)))
def test_only_training_documents_move(point: float, own: set[str]) -> None:
    settings = DataSettings(validation_fraction=0.2, test_fraction=0.3)
    for given_split in ("validation", "test"):
        assert split_of(given_split, point, settings, own) == given_split
    assert split_of("train", point, settings, own) in {"train", *SPLITS} - (own - {"train"})
    assert split_of("train", point, settings, set()) == split_of(None, point, settings, own)
