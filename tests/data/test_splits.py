"""Splits don't overlap, don't move when files are added, and stay together with their copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from waveletgpt.data import SPLITS, DataSettings, TokenStore, prepare
from waveletgpt.data.splits import Spool, split_by_content
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
    small = split_by_content(content, DataSettings(validation_fraction=0.2, test_fraction=0.3))
    large = split_by_content(content, DataSettings(validation_fraction=0.4, test_fraction=0.3))
    assert (small, large) in {(s, s) for s in SPLITS} | {("train", "validation")}


def test_hash_shares_are_near_the_fractions() -> None:
    found = [split_by_content(str(index).encode(), DataSettings()) for index in range(20_000)]
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
