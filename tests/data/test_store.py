"""A store is whole or not there, however it came about."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import with_meta
from waveletgpt.data import DataSettings, StoreWriter, TokenStore, prepare
from waveletgpt.data.modalities.audio import write_wav
from waveletgpt.data.modalities.text import TextModality
from waveletgpt.data.store import remove_leftovers
from waveletgpt.errors import UserError, suggest


def write(path: Path, vocab_size: int = 300, **meta: Any) -> TokenStore:
    with StoreWriter(path, modality="bytes", fingerprint="f" * 64) as writer:
        writer.begin(vocab_size)
        writer.append("train", np.arange(vocab_size), documents=1, size=600)
        writer.append("train", np.arange(5, dtype=np.uint8))
        writer.append("validation", np.array([3, 4]))
        writer.finish(**meta)
    return TokenStore.open(path)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_what_is_written_is_read(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    store = write(tmp_path / "store", vocab_size, note="kept")
    assert store.split("train").dtype == dtype
    assert store.split("train").tolist() == [*range(vocab_size), *range(5)]
    assert isinstance(store.split("train"), np.memmap)
    assert store.split("test").tolist() == []
    assert (store.vocab_size, store.modality, store.fingerprint) == (vocab_size, "bytes", "f" * 64)
    assert store.meta["note"] == "kept"
    assert store.bytes_per_token("train") == 600 / (vocab_size + 5)
    assert store.bytes_per_token("validation") is None
    assert store.load_tokenizer() is None
    with pytest.raises(UserError, match='did you mean "validation"'):
        store.split("valid")
    with pytest.raises(ValueError, match="read-only"):
        store.split("train")[0] = 1


def test_a_token_out_of_range(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", modality="bytes", fingerprint="") as writer:
        writer.begin(10)
        for bad in (10, -1):
            with pytest.raises(ValueError, match="out of range"):
                writer.append("train", np.array([bad]))
    assert not list(tmp_path.iterdir())


def _remove(name: str) -> Any:
    return lambda path: (path / name).unlink()


DAMAGE = {
    "truncated": (lambda path: os.truncate(path / "tokens-train.bin", 100), "is truncated"),
    "missing tokens": (_remove("tokens-test.bin"), "is missing"),
    "missing tokenizer": (_remove("tokenizer/tokenizer.json"), "is missing"),
    "empty tokenizer": (lambda path: os.truncate(path / "tokenizer/tokenizer.json", 0), "is truncated"),
    "no description": (_remove("meta.json"), "not a token store"),
    "truncated description": (lambda path: os.truncate(path / "meta.json", 50), "is damaged"),
    "binary description": (lambda path: (path / "meta.json").write_bytes(b"\xff\0"), "is damaged"),
    "other description": (lambda path: (path / "meta.json").write_text("[]"), "is damaged"),
    "wrong counts": (with_meta("splits", {"train": 3}), "is damaged"),
    "wrong type": (with_meta("dtype", "nonsense"), "is damaged"),
    "a later format": (with_meta("format", 99), "has format 99"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_refused_and_made_again(damage: str, folder: Path, settings: DataSettings) -> None:
    store = prepare(folder, "bytes", settings, progress=False)
    tokens = store.split("train").tolist()
    harm, message = DAMAGE[damage]
    harm(store.path)
    with pytest.raises(UserError, match=message) as caught:
        TokenStore.open(store.path)
    assert "prepare the data again" in str(caught.value)
    again = prepare(folder, "bytes", settings, progress=False)
    assert again.path == store.path
    assert again.split("train").tolist() == tokens
    assert [path.name for path in store.path.parent.iterdir() if not path.name.endswith(".lock")] == [store.path.name]


def test_no_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", Path(__file__)):
        with pytest.raises(UserError, match="is not a token store"):
            TokenStore.open(path)


def test_second_call_returns_what_is_there(
    folder: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(folder, "chars", settings, progress=False)
    made = (first.path / "meta.json").stat()
    long_ago = time.time() - 100
    for path in folder.rglob("*.txt"):
        os.utime(path, (long_ago, long_ago))
    assert prepare(folder, "chars", settings, progress=False).fingerprint == first.fingerprint
    monkeypatch.setattr("waveletgpt.data.sources.files._update", lambda *_: pytest.fail("the content was read again"))
    assert prepare(folder, "chars", settings, progress=False).path == first.path
    assert (first.path / "meta.json").stat() == made


def test_content_and_settings_make_the_store(folder: Path, settings: DataSettings, tmp_path: Path) -> None:
    def path(modality: str = "chars", data: Path = folder, **changes: Any) -> Path:
        chosen = DataSettings(**{"cache_dir": settings.cache_dir, "vocab_size": 300, **changes})
        return prepare(data, modality, chosen, progress=False).path

    paths = [path(), path("bytes"), path("bpe"), path("bpe", vocab_size=280), path(validation_fraction=0.1),
             path(include="a/*"), path(exclude="a/*")]  # fmt: skip
    assert len(set(paths)) == len(paths)
    assert path(vocab_size=280) == paths[0]  # has no part in characters
    moved = shutil.copytree(folder, tmp_path / "moved" / folder.name)
    assert path(data=moved) == paths[0]  # the same content elsewhere
    file = next(folder.rglob("*.txt"))
    stat = file.stat()
    file.write_text(file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert path() != paths[0]


@pytest.mark.parametrize("reading", ["waveletgpt.data.READING", "waveletgpt.data.modalities.audio.READ"])
def test_another_reading_is_another_store_unless_a_run_has_begun_with_the_one_before(
    reading: str, folder: Path, settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, modality = folder, "bytes"
    if "audio" in reading:
        data, modality = tmp_path / "sounds", "audio"
        data.mkdir()
        write_wav(data / "x", np.sin(np.arange(40_000) / 9), 16_000)
    before = prepare(data, modality, settings, progress=False)
    monkeypatch.setattr(reading, 99 if "READING" in reading else {"audio_reading": 99})
    capsys.readouterr()
    assert prepare(data, modality, settings, begun=[tmp_path, before.path]).path == before.path
    assert "going on with the tokens of" in capsys.readouterr().err
    after = prepare(data, modality, settings, progress=False)
    assert after.fingerprint != before.fingerprint
    other = DataSettings(cache_dir=settings.cache_dir, validation_fraction=0.2)
    assert prepare(data, modality, other, progress=False, begun=[before.path]).path != before.path


def test_unknown_modality(folder: Path, settings: DataSettings) -> None:
    with pytest.raises(UserError, match=r'no modality "byte": there are text8.*; did you mean "bytes"\?'):
        prepare(folder, "byte", settings)


def test_suggestions() -> None:
    assert suggest("bites", ["text8", "bytes"]) == '; did you mean "bytes"?'
    assert suggest("zzz", ["text8", "bytes"]) == ""


def _prepare(folder: Path, settings: DataSettings, queue: Any) -> None:
    queue.put(str(prepare(folder, "bytes", settings, progress=False).path))


def _prepare_slowly(folder: Path, settings: DataSettings, queue: Any) -> None:
    encode = TextModality._encode

    def slowly(*arguments: Any) -> None:
        encode(*arguments)
        queue.put("encoded")
        time.sleep(60)

    TextModality._encode = slowly  # type: ignore[method-assign]  # in a process of its own
    prepare(folder, "bytes", settings, progress=False)


def test_a_killed_preparation_leaves_no_store(folder: Path, settings: DataSettings) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_prepare_slowly, args=(folder, settings, queue))
    process.start()
    assert queue.get(timeout=60) == "encoded"
    process.kill()
    process.join()
    stores = settings.cache / "stores"
    left = [path.name for path in stores.iterdir() if not path.name.endswith(".lock")]
    assert len(left) == 1
    assert left[0].startswith(".")
    store = prepare(folder, "bytes", settings, progress=False)
    assert [path.name for path in stores.iterdir() if not path.name.endswith(".lock")] == [store.path.name]


@pytest.mark.parametrize("locks", [True, False])
def test_processes_at_once(locks: bool, folder: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    if not locks:  # as on file systems without
        monkeypatch.setitem(sys.modules, "fcntl", None)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_prepare, args=(folder, settings, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    paths = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(paths) == 1
    assert TokenStore.open(paths.pop()).meta["splits"]["train"]["documents"] > 200
    assert len([path for path in (settings.cache / "stores").iterdir() if not path.name.endswith(".lock")]) == 1


def test_the_work_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with StoreWriter(path, modality="bytes", fingerprint="") as writer:
        remove_leftovers(path)
        assert writer.folder.exists()
        (tmp_path / ".store.tmp-elsewhere-1-x").mkdir()
        remove_leftovers(path)
        assert (tmp_path / ".store.tmp-elsewhere-1-x").exists()


def test_interrupted_preparation_cleans_up(
    folder: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("waveletgpt.data.modalities.text.TextModality._encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, "bytes", settings, progress=False)
    assert all(path.name.endswith(".lock") for path in (settings.cache / "stores").iterdir())


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "the disk is full at .*free some space"), (errno.EROFS, "Read-only")]
)
def test_a_full_or_read_only_disk(
    number: int, message: str, folder: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(StoreWriter, "append", full)
    with pytest.raises(UserError, match=message):
        prepare(folder, "bytes", settings, progress=False)
    assert all(path.name.endswith(".lock") for path in (settings.cache / "stores").iterdir())


def test_cache_that_is_no_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot use .*`cache_dir`"):
        prepare(folder, "bytes", DataSettings(cache_dir=str(tmp_path / "file")), progress=False)


def test_importing_data_is_light() -> None:
    code = (
        "import waveletgpt.data; heavy = {'torch', 'transformers', 'pyarrow', 'datasets', 'tokenizers', 'rich', "
        "'zstandard'} & set(sys.modules); assert not heavy, heavy"
    )
    package = Path(sys.modules["waveletgpt"].__file__ or "").parent
    # The package itself may register its models on import; `waveletgpt --help` doesn't, and neither does this.
    stub = f"import types, sys; m = types.ModuleType('waveletgpt'); m.__path__ = [{str(package)!r}]; "
    subprocess.run([sys.executable, "-c", stub + "sys.modules['waveletgpt'] = m; " + code], check=True)
