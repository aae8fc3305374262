"""A preparation that was killed goes on where it was, to the same bytes; and never holds text and tokens in full."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from waveletgpt.data import DataSettings, StoreWriter, parallel, prepare, splits, store
from waveletgpt.data.modalities import text
from waveletgpt.errors import UserError


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some kilobytes stand for corpora of gigabytes."""
    monkeypatch.setattr(splits, "SEGMENT", 1 << 13)
    monkeypatch.setattr(splits, "BLOCK", 1 << 13)
    monkeypatch.setattr(text, "SAVED", 1 << 14)
    monkeypatch.setattr(text, "BATCH", 1 << 12)
    monkeypatch.setattr("waveletgpt.data.sources.files.CHUNK", 1 << 12)
    for encoder in (text.encoders.HuggingFace, text.encoders.Characters, text.encoders.Bytes):
        monkeypatch.setattr(encoder, "batch", 1 << 13)


def corpus(tmp_path: Path, prose: Callable[[int, int], str], kind: str) -> Path:
    """About 130 kB: one file, or many or a table, which are divided by their hashes."""
    if kind == "file":
        path = tmp_path / "one.txt"
        path.write_text(prose(24_000, 1), encoding="utf-8")
        return path
    if kind == "rows":
        path = tmp_path / "rows.jsonl"
        rows = [json.dumps({"text": f"{index} {prose(3, index)}"}) for index in range(9000)]
        path.write_text("\n".join(rows), encoding="utf-8")
        return path
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(300):
        (folder / f"{index:03}.txt").write_text(prose(80, index), encoding="utf-8")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def settings_in(tmp_path: Path, name: str) -> DataSettings:
    return DataSettings(cache_dir=str(tmp_path / name), vocab_size=300)


def _killed_at(data: Path, modality: str, settings: DataSettings, saves: int, how: str) -> None:
    save = StoreWriter.save
    count = 0

    def saved(writer: StoreWriter, state: dict[str, Any]) -> None:
        nonlocal count
        save(writer, state)
        count += 1
        if count == saves and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if count == saves:
            raise KeyboardInterrupt

    StoreWriter.save = saved  # type: ignore[method-assign]  # in a process of its own
    prepare(data, modality, settings, progress=False)


@pytest.mark.parametrize(
    ("modality", "kind", "saves", "how"),
    [
        ("bytes", "file", 2, "kill"),  # while reading
        ("bytes", "file", 12, "kill"),  # while encoding
        ("bytes", "rows", 12, "kill"),
        ("text8", "many", 3, "kill"),
        ("text8", "many", 11, "Ctrl-C"),
        ("chars", "many", 13, "kill"),
        ("bpe", "file", 12, "Ctrl-C"),
        ("bpe", "many", 12, "kill"),
    ],
)
def test_what_was_killed_goes_on_to_the_same_store(
    modality: str, kind: str, saves: int, how: str, tmp_path: Path, prose: Callable[[int, int], str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = corpus(tmp_path, prose, kind)
    whole = prepare(data, modality, settings_in(tmp_path, "whole"), progress=False)
    settings = settings_in(tmp_path, "killed")
    process = multiprocessing.get_context("fork").Process(
        target=_killed_at, args=(data, modality, settings, saves, how)
    )
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if how == "kill" else 1)
    stores = settings.cache / "stores"
    (left,) = [path for path in stores.iterdir() if not path.name.endswith(".lock")]
    assert (left / "state.json").is_file()

    written: list[int] = []
    write = splits._Segments.write
    monkeypatch.setattr(splits._Segments, "write", lambda s, data: written.append(len(data)) or write(s, data))
    encoded: list[int] = []
    append = StoreWriter.append

    def counted(writer: StoreWriter, split: str, tokens: Any, **more: int) -> None:
        encoded.append(more["size"])
        append(writer, split, tokens, **more)

    monkeypatch.setattr(StoreWriter, "append", counted)
    again = prepare(data, modality, settings)
    assert "going on with a preparation that was stopped" in capsys.readouterr().err
    assert content(again.path) == content(whole.path)
    assert [path.name for path in stores.iterdir() if not path.name.endswith(".lock")] == [again.path.name]
    size = sum(split["bytes"] for split in whole.meta["splits"].values())
    if saves > 9:  # all had been read by then
        assert not written
        assert sum(encoded) < size - (1 << 13)
    else:
        assert 0 < sum(written) < size - (1 << 13)


def test_no_document_is_lost_between_what_is_noted(tmp_path: Path, prose: Callable[[int, int], str]) -> None:
    data = corpus(tmp_path, prose, "rows")
    made = prepare(data, "bytes", settings_in(tmp_path, "cache"), progress=False)
    texts = [json.loads(line)["text"].encode() for line in data.read_text(encoding="utf-8").splitlines()]
    found = []
    for tokens in map(made.split, store.SPLITS):
        ends = np.flatnonzero(tokens == 256) + 1
        found += [part[:-1].astype(np.uint8).tobytes() for part in np.split(tokens, ends)[:-1]]
    assert sorted(found) == sorted(texts)


@pytest.mark.parametrize("kind", ["file", "many"])
def test_disk_never_holds_more_than_twice_the_corpus(
    kind: str, tmp_path: Path, prose: Callable[[int, int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, settings = corpus(tmp_path, prose, kind), settings_in(tmp_path, "cache")
    peak = 0
    append = StoreWriter.append

    def measured(writer: StoreWriter, *arguments: Any, **more: Any) -> None:
        nonlocal peak
        append(writer, *arguments, **more)
        for file in writer._open.values():
            file.flush()
        files = [p for p in settings.cache.rglob("*") if p.name.startswith(("tokens-", "documents-"))]
        peak = max(peak, sum(path.stat().st_size for path in files))

    monkeypatch.setattr(StoreWriter, "append", measured)
    made = prepare(data, "bytes", settings, progress=False)
    size = sum(split["bytes"] for split in made.meta["splits"].values())
    # Two bytes a token; what was encoded since it was last noted is still there as text.
    assert 2 * size <= peak < 2 * size + 2 * (1 << 14) + 2 * (1 << 13)


@pytest.mark.parametrize("modality", ["bytes", "chars", "text8", "bpe"])
def test_no_file_is_held_that_is_not_needed(
    modality: str, tmp_path: Path, prose: Callable[[int, int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step of reading and encoding: all that lies in the cache, against the text."""
    data, settings = corpus(tmp_path, prose, "file"), settings_in(tmp_path, "cache")
    reading = encoding = 0
    append, end_document = StoreWriter.append, splits.Spool.end_document

    def held() -> int:
        return sum(path.stat().st_size for path in settings.cache.rglob("*") if path.name.endswith(".bin"))

    def appended(writer: StoreWriter, *arguments: Any, **more: Any) -> None:
        nonlocal encoding
        append(writer, *arguments, **more)
        for file in writer._open.values():
            file.flush()
        encoding = max(encoding, held())

    def ended(spool: splits.Spool, *arguments: Any) -> None:
        nonlocal reading
        end_document(spool, *arguments)
        spool._text.sync()
        reading = max(reading, held())

    monkeypatch.setattr(StoreWriter, "append", appended)
    monkeypatch.setattr(splits.Spool, "end_document", ended)
    made = prepare(data, modality, settings, progress=False)
    text_size = sum(split["bytes"] for split in made.meta["splits"].values())
    tokens = sum(2 * split["tokens"] for split in made.meta["splits"].values())
    # The text of a step and of a batch (two blocks), and the file in which it begins.
    kept = 4 * (1 << 13)
    assert reading <= text_size + 32
    assert tokens <= encoding <= max(text_size, tokens) + kept + 32
    assert tokens <= 2 * text_size + 2


@pytest.mark.parametrize("modality", ["bytes", "chars", "text8", "bpe"])
@pytest.mark.parametrize("kind", ["file", "many"])
def test_the_store_is_the_same_on_any_number_of_cores_and_however_it_is_cut(
    modality: str, kind: str, tmp_path: Path, prose: Callable[[int, int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = corpus(tmp_path, prose, kind)
    made = []
    for cores, size in ((1, 1 << 20), (1, 1 << 12), (2, 4093), (5, 611)):
        monkeypatch.setattr(parallel, "cores", lambda cores=cores: cores)
        for module, name in ((splits, "BLOCK"), (text, "BATCH"), (text, "SAVED")):
            if (modality, name) != ("bpe", "BLOCK"):  # pairs are trained on blocks
                monkeypatch.setattr(module, name, size)
        monkeypatch.setattr("waveletgpt.data.sources.files.CHUNK", 3 * size + 1)
        monkeypatch.setattr(text.encoders.Characters, "batch", size)
        whole = prepare(data, modality, settings_in(tmp_path, f"{cores}-{size}"), progress=False)
        made.append(content(whole.path))
    assert all(one == made[0] for one in made)


def test_what_goes_wrong_on_another_thread_is_told_here(
    tmp_path: Path, prose: Callable[[int, int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, settings = corpus(tmp_path, prose, "file"), settings_in(tmp_path, "cache")
    encode, count = text.encoders.Bytes.encode, 0

    def broken(encoder: text.encoders.Bytes, pieces: list[bytes]) -> list[np.ndarray]:
        nonlocal count
        count += 1
        if count == 5:
            raise UserError("one clear line")
        return encode(encoder, pieces)

    monkeypatch.setattr(text.encoders.Bytes, "encode", broken)
    with pytest.raises(UserError, match=r"^one clear line$"):
        prepare(data, "bytes", settings, progress=False)
    assert all(path.name.endswith(".lock") for path in (settings.cache / "stores").iterdir())
    monkeypatch.undo()
    assert prepare(data, "bytes", settings, progress=False)


def stopped(path: Path, fingerprint: str, error: type[BaseException], state: dict[str, Any]) -> dict[str, Any]:
    """Write at a store, be stopped by `error`; what the one before had saved."""
    with contextlib.suppress(error), StoreWriter(path, modality="bytes", fingerprint=fingerprint) as writer:
        found = writer.saved
        writer.begin(257)
        writer.save(state)
        raise error
    return found


def test_other_data_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "store"
    assert stopped(path, "a", KeyboardInterrupt, {"spool": 1}) == {}
    assert stopped(path, "b", ValueError, {}) == {}
    assert len([*tmp_path.iterdir()]) == 1
    assert stopped(path, "a", ValueError, {}) == {"spool": 1}
    assert not [*tmp_path.iterdir()]  # what is wrong with the data is wrong the next time, too


def test_a_damaged_leftover_is_named(tmp_path: Path) -> None:
    stopped(tmp_path / "store", "a", KeyboardInterrupt, {})
    counts = {split: {"documents": 0, "tokens": 5, "bytes": 5} for split in store.SPLITS}
    with StoreWriter(tmp_path / "store", modality="bytes", fingerprint="a") as writer:
        for file in writer.folder.glob("tokens-*"):
            assert file.stat().st_size == 0
        with pytest.raises(UserError, match=r"tokens-train\.bin is truncated: remove"):
            writer.go_on({"vocab_size": 257, "counts": counts})


def test_reading_twice_the_same(tmp_path: Path, prose: Callable[[int, int], str]) -> None:
    """Segments, pieces and places: from any piece on the rest is as it was."""
    spool = splits.Spool(tmp_path)
    for index in range(40):
        spool.end_document("train", spool.write(prose(300 * (index % 3), index).encode()))
    spool.divide(DataSettings())
    cut = object.__new__(text.encoders.HuggingFace).cut
    pieces = [*spool.pieces(cut)]
    assert b"".join(piece.data for piece in pieces) == spool._text.read(0, spool.size)
    for at in range(0, len(pieces), 5):
        spool.free(pieces[at].place[0])
        assert [*spool.pieces(cut, since=pieces[at].place)] == pieces[at + 1 :]
