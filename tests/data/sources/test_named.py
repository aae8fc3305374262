"""Named sets: known, fetched from where they lie, resumed, verified."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.data.sources.serving import serving
from waveletgpt.data import MODALITIES, NAMED, SPLITS, DataSettings, NamedSet, prepare
from waveletgpt.data.sources.download import download, recorded
from waveletgpt.data.sources.named import fetch
from waveletgpt.errors import UserError

CONTENT = bytes(range(256)) * 2000
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content`; `cut` breaks each answer off after so many bytes, `ranges` says whether it resumes."""

    content = CONTENT
    cut: int | None = None
    ranges = True
    requests: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.requests.append(asked)
        content = self.server.content
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if self.path != "/set.bin":
            self.send_error(404)
        elif start >= len(content):
            self.send_error(416)
        else:
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            stop = len(content) if self.server.cut is None else start + self.server.cut
            self.wfile.write(content[start:stop])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server(("127.0.0.1", 0), Handler)
    found.requests = []
    with serving(found, monkeypatch):
        yield found


def url(server: Server, name: str = "set.bin") -> str:
    return f"http://127.0.0.1:{server.server_port}/{name}"


def get(server: Server, path: Path, size: int | None = len(CONTENT), sha: str | None = SHA) -> Path:
    return download(url(server), path, size=size, sha=sha, progress=False)


def test_download_once(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "set.bin"
    assert get(server, path).read_bytes() == CONTENT
    assert get(server, path) == path
    assert server.requests == [None]
    assert sorted(file.name for file in path.parent.iterdir()) == [".set.bin.lock", "set.bin"]


def test_resumed_after_breaks(server: Server, tmp_path: Path) -> None:
    server.cut = 200_000
    assert get(server, tmp_path / "set.bin").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=200000-", "bytes=400000-"]


def test_resumed_in_a_later_run(server: Server, tmp_path: Path) -> None:
    server.cut = 50_000
    with pytest.raises(UserError, match=r"broke off 5 times, at 250,000 bytes .*run it again to go on"):
        get(server, tmp_path / "set.bin")
    assert not (tmp_path / "set.bin").exists()
    server.cut = None
    assert get(server, tmp_path / "set.bin").read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=250000-"


def test_server_that_does_not_resume(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "set.bin.part").write_bytes(b"the beginning of something")
    assert get(server, tmp_path / "set.bin").read_bytes() == CONTENT


def test_part_longer_than_the_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.bin.part").write_bytes(bytes(len(CONTENT) + 5))
    assert get(server, tmp_path / "set.bin", size=None).read_bytes() == CONTENT


def test_part_that_was_whole_already(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.bin.part").write_bytes(CONTENT)
    assert get(server, tmp_path / "set.bin").read_bytes() == CONTENT
    assert server.requests == []


@pytest.mark.parametrize(("size", "sha"), [(len(CONTENT), "0" * 64), (len(CONTENT) - 1, SHA)])
def test_something_else_is_not_kept(size: int, sha: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gave something else: set\.bin has"):
        get(server, tmp_path / "set.bin", size, sha)
    assert [path.name for path in tmp_path.iterdir()] == [".set.bin.lock"]


def test_a_copy_that_changed(server: Server, tmp_path: Path) -> None:
    path = get(server, tmp_path / "set.bin")
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(UserError, match=r"set\.bin has SHA-256 .* remove it and get it again"):
        get(server, path)


def test_unknown_hash_is_that_of_the_first_download(server: Server, tmp_path: Path) -> None:
    path = get(server, tmp_path / "set.bin", None, None)
    assert recorded(path) == SHA
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(UserError, match="SHA-256"):
        get(server, path, None, None)


def test_unreachable(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot reach http://.*/none \(404 Not Found\); put x in .*`data_dir`"):
        download(url(server, "none"), tmp_path / "x", size=None, sha=None, progress=False)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot reach http://\S+ \(.*refused\); put set\.bin in a folder"):
        get(server, tmp_path / "set.bin")


@pytest.fixture
def known(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedSet:
    """A named set with splits of its own, served here."""
    archive = tmp_path / "made.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, words in (("train", 900), ("valid", 30), ("test", 20)):
            file.writestr(f"set/wiki.{name}.raw", f"{name} " * words)
    server.content = archive.read_bytes()
    named = NamedSet(
        "known", "", "text8", "", url(server), "set.bin.zip", len(server.content),
        hashlib.sha256(server.content).hexdigest(), splits=NAMED["wikitext-103"].splits,
    )  # fmt: skip
    monkeypatch.setitem(NAMED, "known", named)
    return named


def test_a_named_set_end_to_end(known: NamedSet, settings: DataSettings, capsys: pytest.CaptureFixture[str]) -> None:
    store = prepare("known", None, settings, progress=True)
    assert capsys.readouterr().out == ""  # the bars go to standard error
    assert store.modality == "text8"
    assert store.meta["split"] == "given"
    assert [store.meta["splits"][split]["bytes"] for split in ("train", "validation", "test")] == [5400, 180, 100]
    assert store.meta["source"]["name"] == "known"
    assert known.path(settings).is_file()


def test_data_dir(known: NamedSet, server: Server, settings: DataSettings, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    chosen = replace(settings, data_dir=str(copies))
    with pytest.raises(UserError, match=r"no set\.bin\.zip in .*copies: get it from http"):
        prepare("known", None, chosen, progress=False)
    (copies / "set.bin.zip").write_bytes(server.content[:-1] + b"?")
    with pytest.raises(UserError, match="SHA-256"):
        prepare("known", None, chosen, progress=False)
    (copies / "set.bin.zip").write_bytes(server.content)
    assert prepare("known", "bytes", chosen, progress=False).vocab_size == 257
    assert server.requests == []


def test_the_table() -> None:
    assert {"text8", "enwik8", "wikitext-103", "tiny-shakespeare", "python-stdlib"} <= set(NAMED)
    for name, named in NAMED.items():
        assert named.name == name
        assert named.modality in MODALITIES
        assert named.licence
        assert named.description
        if named.url is not None:
            assert named.file
            assert named.sha256 is None or re.fullmatch("[0-9a-f]{64}", named.sha256)


def test_the_standard_library_is_here(settings: DataSettings) -> None:
    source = fetch(NAMED["python-stdlib"], settings)
    names = [document.name for document in source.documents(binary=False)]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "/test/" in f"/{name}" or "packages/" in name or not name.endswith(".py")]
    assert names == sorted(names)
    store = prepare("python-stdlib", None, settings, progress=False)
    assert (store.modality, store.vocab_size) == ("bytes", 257)
    assert min(len(store.split(split)) for split in SPLITS) > 100_000
