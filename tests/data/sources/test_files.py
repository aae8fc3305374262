"""Files, folders, archives and tables give their texts, in bounded memory, and broken ones are named."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import random
import shutil
import socket
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from waveletgpt.data import MODALITIES, DataSettings, detect, find, prepare
from waveletgpt.data.modalities.encoders import load
from waveletgpt.data.sources.files import CHUNK, Document, looks_like_text
from waveletgpt.errors import UserError

SETTINGS = DataSettings()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip
MEMBERS = {"b/two.txt": b"second text", "a/one.txt": b"first text", ".hidden": b"no", "c.bin": b"\0\1\2"}


def texts(data: str | Path, settings: DataSettings = SETTINGS, binary: bool = False) -> dict[str, bytes]:
    return {document.name: document.read() for document in find(str(data), settings).documents(binary=binary)}


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_file(suffix: str, tmp_path: Path) -> None:
    content = os.urandom(1000).hex().encode()
    path = tmp_path / f"book.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](content) + COMPRESS[suffix](b" and on"))  # two streams in a row are one file
    assert texts(path) == {"book.txt": content + b" and on"}


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_tar(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"set.tar{suffix}"
    path.write_bytes(COMPRESS.get(suffix, bytes)(tar(MEMBERS)))
    assert list(texts(path).values()) == [b"second text", b"first text"]
    assert list(texts(path, DataSettings(include="a/*"))) == [f"set.tar{suffix}/a/one.txt"]
    assert b"\0\1\2" in texts(path, binary=True).values()


def test_tar_by_its_short_name(tmp_path: Path) -> None:
    (tmp_path / "set.tgz").write_bytes(gzip.compress(tar(MEMBERS)))
    assert len(texts(tmp_path / "set.tgz")) == 2


def test_zip_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(zipped(MEMBERS | {"__MACOSX/x.txt": b"no"}))
    assert texts(tmp_path / "set.zip") == {"set.zip/a/one.txt": b"first text", "set.zip/b/two.txt": b"second text"}


def test_archives_in_archives_and_folders(tmp_path: Path) -> None:
    inner = {"deep.txt.gz": gzip.compress(b"deep"), "rows.jsonl": b'{"text": "row"}\n'}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "set.tar.xz").write_bytes(lzma.compress(tar(inner)))
    assert list(texts(tmp_path).values()) == [b"deep", b"row"]


def test_nothing_is_unpacked_wherever_a_member_points(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("../outside.txt", f"{tmp_path}/absolute.txt", "fine.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"text"))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.tar").write_bytes(buffer.getvalue())
    (tmp_path / "in" / "bad.zip").write_bytes(zipped({"../../outside.txt": b"text"}))
    before = sorted(tmp_path.rglob("*"))
    assert list(texts(tmp_path / "in").values()) == [b"text"] * 4
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("suffix", [*(".txt" + end for end in COMPRESS), ".zip", ".tar", ".tar.xz", ".parquet"])
def test_truncated(suffix: str, tmp_path: Path) -> None:
    content = os.urandom(60_000).hex().encode()
    whole = {
        ".zip": zipped({"a.txt": content}), ".tar": tar({"a.txt": content}), ".parquet": b"PAR1" + content[:100],
        ".tar.xz": lzma.compress(tar({"a.txt": content})),
    }.get(suffix)  # fmt: skip
    whole = whole or COMPRESS[suffix.removeprefix(".txt")](content)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"^x\S* is truncated"):
        texts(path)


def test_tar_damaged_after_its_first_member(tmp_path: Path) -> None:
    whole = tar({"a.txt": b"a" * 600, "b.txt": b"b" * 600, "c.txt": b"c" * 600})
    for damaged in (whole[:1536] + b"?" * 512 + whole[2048:], whole[:1700]):
        (tmp_path / "x.tar").write_bytes(damaged)
        with pytest.raises(UserError, match=r"x\.tar is (broken|truncated)"):
            texts(tmp_path / "x.tar")


PLACES = st.integers(0, 100_000)


@given(damage=st.lists(st.tuples(PLACES, st.integers(0, 255)), max_size=20), cut=PLACES)
@hypothesis_settings(max_examples=60, deadline=None)
def test_damaged_archives_give_text_or_a_user_error(
    damage: list[tuple[int, int]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz")
    members = {f"{index}.txt": b"text " * 50 for index in range(3)}
    wholes = {f"a{s}": f(tar(members)) for s, f in ((".tar" + k, v) for k, v in COMPRESS.items())}
    for name, whole in ({"a.zip": zipped(members), "a.tar": tar(members)} | wholes).items():
        content = bytearray(whole)
        for place, value in damage:
            content[place % len(content)] = value
        (path / name).write_bytes(bytes(content[: cut % len(content) + 1]))
        with contextlib.suppress(UserError):
            texts(path / name)


def test_encrypted_zip(tmp_path: Path) -> None:
    content = bytearray(zipped({"a.txt": b"secret"}))
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(bytes(content))
    with pytest.raises(UserError, match="encrypted"):
        texts(tmp_path / "x.zip")


def test_folder_sorted_globbed_without_hidden_and_binary(tmp_path: Path) -> None:
    for name, content in (MEMBERS | {"b/notes.md": b"notes", ".git/x.txt": b"no", "empty.txt": b""}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "loop").symlink_to(tmp_path)
    source = find(str(tmp_path), SETTINGS)
    assert [document.name for document in source.documents(binary=False)] == ["a/one.txt", "b/notes.md", "b/two.txt"]
    assert source.skipped == ["c.bin"]
    assert source.done == source.size
    assert list(texts(tmp_path, DataSettings(include="*.md, one*"))) == ["a/one.txt", "b/notes.md"]
    assert list(texts(tmp_path, DataSettings(exclude="b/*,*.bin"))) == ["a/one.txt"]
    assert "c.bin" in texts(tmp_path, binary=True)
    assert [document.name for document in source.files()][-2:] == ["c.bin", "empty.txt"]


@pytest.mark.parametrize("modality", ["text8", "chars", "bpe"])
def test_a_binary_file_is_for_bytes(modality: str, tmp_path: Path, settings: DataSettings) -> None:
    path = tmp_path / "program.exe"
    path.write_bytes(b"MZ\0\0" * 1000)
    with pytest.raises(UserError, match=r"program\.exe looks like a binary file.*`modality=bytes`"):
        prepare(path, modality, settings, progress=False)
    store = prepare(path, "bytes", settings, progress=False)
    assert store.split("train")[:4].tolist() == list(b"MZ\0\0")
    with pytest.raises(UserError, match=r"1 binary files skipped, such as program\.exe"):
        prepare(tmp_path, modality, DataSettings(cache_dir=settings.cache_dir, include="*.exe"), progress=False)


def test_what_looks_like_text() -> None:
    assert looks_like_text("Größe, 東京".encode())
    assert looks_like_text("a few wrong bytes, as in caf\xe9".encode("latin-1"))
    assert looks_like_text("東".encode() * 30_000)  # cut within a character
    assert not looks_like_text(b"a\0b")
    assert not looks_like_text(bytes(range(1, 32)) * 10)
    assert looks_like_text("Привет, мир!".encode("cp1251") * 10)
    assert not looks_like_text(random.Random(0).randbytes(1000).replace(b"\0", b"\1"))


def touched(folder: Path, counts: dict[str, int]) -> Path:
    """So many files of each suffix."""
    for suffix, count in counts.items():
        for index in range(count):
            path = folder / f"{index % 3}" / f"{index}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({".txt": 3}, "chars"), ({".py": 5, ".md": 1, "": 1}, "chars"), ({".txt": 8, ".png": 4}, "chars"),
        ({".wav": 1}, "audio"), ({".FLAC": 2, ".ogg": 2, ".txt": 1, ".jpg": 1}, "audio"),
        ({".mp3": 3, "": 1}, "audio"),
        ({".mid": 8, ".midi": 2, ".kar": 1, ".csv": 1, "": 2}, "music"),
        ({".png": 5, ".JPEG": 5, ".webp": 1, ".json": 2}, "images"), ({".npz": 9}, "chars"),
    ],
)  # fmt: skip
def test_the_modality_is_told_by_the_names(counts: dict[str, int], expected: str, tmp_path: Path) -> None:
    chosen = DataSettings(cache_dir=str(tmp_path / "cache"))
    folder = touched(tmp_path / "in", counts)
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        archive.add(folder, "in")
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path, "in")
    for data in (folder, tmp_path / "set.tar.gz", tmp_path / "set.zip"):
        source = find(str(data), chosen)
        assert detect(source, chosen) == expected
        assert detect(source, chosen) == expected  # remembered
    only = DataSettings(cache_dir=chosen.cache_dir, include="*.md,*.txt")
    if {".md", ".txt"} & set(counts):
        for data in (folder, tmp_path / "set.tar.gz"):
            assert detect(find(str(data), only), only) == "chars"


def test_every_suffix_is_of_one_modality() -> None:
    known = [suffix for modality in MODALITIES.values() for suffix in modality.suffixes]
    assert len(known) == len(set(known)) > 30
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in known)


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ({".wav": 4, ".mid": 4}, r"4 for audio and 4 for music \(\.mid, \.wav\)"),
        ({".png": 6, ".txt": 6}, r"6 for chars and 6 for images \(\.\w+, \.\w+\)"),
        ({".wav": 1, ".mid": 2, ".png": 3, ".md": 4, "": 2}, "6 for chars and 3 for images and 2 for music and 1 for"),
    ],
)  # fmt: skip
def test_a_mix_of_kinds_is_told(counts: dict[str, int], found: str, tmp_path: Path, settings: DataSettings) -> None:
    folder = touched(tmp_path / "in", counts)
    with pytest.raises(UserError, match=rf"of several kinds.*{found}.*choose one with `modality=") as caught:
        prepare(folder, None, settings, progress=False)
    assert "\n" not in str(caught.value)
    chosen = DataSettings(cache_dir=settings.cache_dir, include="*.md,*.txt", test_fraction=0.0)
    with pytest.raises(UserError, match=r"too short|no visible files|nothing to read"):  # no longer a mix
        prepare(folder, None, chosen, progress=False)


def test_tables(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"id": 1, "text": "one,\n\"two\"", "body": "b1"}, {"id": 2, "text": None, "body": "b2"},
            {"id": 3, "text": "tre é", "body": "b3"}]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=1)
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "t.tsv").write_text('id\ttext\tbody\n1\tone, "two"\tb1\n2\t\tb2\n3\ttre é\tb3\n', "utf-8-sig")
    for name in ("t.jsonl", "t.parquet", "t.csv", "t.tsv"):
        first = b'one, "two"' if name == "t.tsv" else b'one,\n"two"'  # there is no line end in a field of TSV
        assert list(texts(tmp_path / name).values()) == [first, "tre é".encode()], name
        assert list(texts(tmp_path / name, DataSettings(column="body")).values()) == [b"b1", b"b2", b"b3"]
        with pytest.raises(UserError, match=r'no column "bodi" but id, text, body; did you mean "body"\?'):
            texts(tmp_path / name, DataSettings(column="bodi"))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress((tmp_path / "t.csv").read_bytes()))
    assert len(texts(tmp_path / "t.csv.gz")) == 2


def test_long_fields_of_tables_leave_the_limit_of_others_alone(tmp_path: Path) -> None:
    """The csv module has one limit for the whole process."""
    before = csv.field_size_limit()
    (tmp_path / "t.csv").write_text("text,n\n" + "a" * (before + 1) + ",1\nb,2\n")
    documents = find(str(tmp_path / "t.csv"), SETTINGS).documents(binary=False)
    first = next(documents)
    assert csv.field_size_limit() == before  # in the middle of the table, too
    assert [len(document.read()) for document in (first, *documents)] == [before + 1, 1]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": \n', r"x\.jsonl line 2 is not JSON"),
        ("x.jsonl", '{"text": "a"}\n[1]\n', r"x\.jsonl line 2 is not an object"),
        ("x.jsonl", '{"text": "a"}\n{"txt": "b"}\n', r"x\.jsonl line 2 has no column text or content but txt"),
        ("x.jsonl", '{"text": 5}\n', r'x\.jsonl line 1: column "text" holds int, not text'),
        ("x.jsonl", "[" * 100_000, r"x\.jsonl line 1 is not JSON"),
        ("x.csv", "id,name\n1,a\n", r"x\.csv has no column text or content but id, name: name one with `column`"),
        ("x.csv", "id,text\n1,a\n2\n", r'x\.csv line 3 has 1 fields, too few for the column "text"'),
        ("x.csv", 'id,text\n1,"a\n', r"x\.csv line 2 is broken"),
        ("x.jsonl", "\n", r"no text in"),
        ("x.txt", "", r"x\.txt is empty"),
    ],
)
def test_broken_tables_and_empty_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


@given(damage=st.lists(st.tuples(PLACES, st.integers(0, 255)), max_size=9), cut=PLACES)
@hypothesis_settings(max_examples=60, deadline=None)
def test_damaged_tables_give_text_or_a_user_error(
    damage: list[tuple[int, int]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path_factory.mktemp("fuzz")
    parquet.write_table(pyarrow.table({"text": ["one", "tré", "four"]}), path / "x.parquet", compression="none")
    (path / "x.jsonl").write_text('{"text": "one"}\n{"text": "tr\\u00e9"}\n')
    (path / "x.csv").write_text('id,text\n1,"one"\n2,"t\nwo"\n')
    for file in sorted(path.iterdir()):
        content = bytearray(file.read_bytes())
        for place, value in damage:
            content[place % len(content)] = value
        file.write_bytes(bytes(content[: len(content) - (cut % len(content) if cut % 2 else 0)]))
        with contextlib.suppress(UserError):
            texts(file)


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waveletgpt.data.sources.tables.LONGEST", 1000)
    (tmp_path / "x.jsonl").write_text('{"text": "' + "a" * 2000)
    with pytest.raises(UserError, match="line of more than"):
        texts(tmp_path / "x.jsonl")


def test_nothing_there(tmp_path: Path, settings: DataSettings) -> None:
    with pytest.raises(UserError, match=r'is no file, folder or named data set.*; did you mean "text8"\?'):
        prepare("txt8", None, settings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing to read in the folder"):
        prepare(tmp_path / "empty", None, settings)
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(UserError, match="is empty"):
        prepare(tmp_path / "empty", None, settings)
    with pytest.raises(UserError, match=r'no visible files with include "\*\.md"'):
        prepare(tmp_path / "empty", None, DataSettings(include="*.md"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        prepare(tmp_path / "pipe", None, settings)


def test_hub_loader_on_a_local_data_set(tmp_path: Path, settings: DataSettings) -> None:
    pytest.importorskip("datasets")
    for split, count in (("train", 50), ("validation", 5), ("test", 6)):
        rows = [json.dumps({"content": f"{split} {index}"}) + "\n" for index in range(count)]
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{split}.jsonl").write_text("".join(rows))
    store = prepare(f"hf:{tmp_path / 'set'}", "bytes", settings, progress=False)
    assert store.meta["split"] == "given"
    assert [store.meta["splits"][split]["documents"] for split in ("train", "validation", "test")] == [50, 5, 6]
    assert bytes(store.split("test")[:6].tolist()) == b"test 0"
    with pytest.raises(UserError, match='no column "body" but content'):
        prepare(f"hf:{tmp_path / 'set'}", "bytes", DataSettings(cache_dir=settings.cache_dir, column="body"), False)


def test_hub_out_of_reach(settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    import huggingface_hub.constants

    def fail(*_: object, **__: object) -> None:
        raise OSError("no such host")

    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that both are as before afterwards
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UserError, match=r"^hf:owner/none cannot be loaded from the hub .*check the name"):
        prepare("hf:owner/none", "bytes", settings, progress=False)
    with pytest.raises(UserError, match='tokenizer "owner/none" cannot be loaded'):
        load("owner/none")


def test_hub_name_that_is_none(settings: DataSettings) -> None:
    with pytest.raises(UserError, match="names no data set"):
        prepare("hf:", None, settings)


class _Endless(io.RawIOBase):
    """40 MB of text that is nowhere in memory."""

    left = 40 << 20

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), self.left)
        buffer[:count] = (b"some words of text 123 and on\n" * (count // 30 + 1))[:count]
        self.left -= count
        return count


@pytest.mark.parametrize("modality", ["text8", "chars", "bytes"])
def test_memory_stays_flat(
    modality: str, tmp_path: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "big.txt").write_text("stands for the big one")
    from waveletgpt.data.sources.files import Files

    def documents(self: Files, *, binary: bool) -> list[Document]:
        file = _Endless()
        return [Document("big", iter(lambda: file.read(CHUNK), b""))]

    monkeypatch.setattr(Files, "documents", documents)
    monkeypatch.setattr("waveletgpt.data.parallel.cores", lambda: 2)
    prepare(tmp_path / "big.txt", "bytes", DataSettings(cache_dir=str(tmp_path / "warm")), False)  # imports
    tracemalloc.start()
    store = prepare(tmp_path / "big.txt", modality, settings, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(store.split("train")) > 30 << 20
    # A few forms of one block, four bytes a character, and tables over all code points; the text is 40 MB.
    assert peak < 24 << 20
