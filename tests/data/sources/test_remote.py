"""Data at addresses: an object store, a web server that knows no ranges, and what goes wrong with them."""

from __future__ import annotations

import gzip
import importlib
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import WORDS
from tests.data.sources.serving import serving
from waveletgpt.data import DataSettings, Files, find, prepare
from waveletgpt.data.sources import remote
from waveletgpt.data.sources.hub import Hub
from waveletgpt.errors import UserError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fsspec's own store in the memory, at memory://."""
    monkeypatch.setitem(remote.PACKAGES, "memory", "fsspec")
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def upload(system: Any, folder: Path, place: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"{place}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def test_a_folder_is_what_it_is_here(memory: Any, folder: Path, settings: DataSettings) -> None:
    (folder / ".hidden").write_text("no")
    (folder / "b" / "more.txt.gz").write_bytes(gzip.compress(b"packed text " * 100))
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        archive.writestr("in/it.txt", "text in an archive " * 50)
    upload(memory, folder, "/bucket/corpus")
    here, there = find(str(folder), settings), find("memory://bucket/corpus/", settings)
    assert there.key(settings.cache) == here.key(settings.cache)
    assert there.size == here.size
    for binary in (True, False):
        want = [(document.name, document.read()) for document in here.documents(binary=binary)]
        assert [(document.name, document.read()) for document in there.documents(binary=binary)] == want
    local = prepare(folder, "bytes", settings, progress=False)
    assert prepare("memory://bucket/corpus", "bytes", settings, progress=False).path == local.path


def test_globs_and_splits(memory: Any, tmp_path: Path, settings: DataSettings) -> None:
    for name in ("train/a.txt", "train/b.md", "test/c.txt", "drop/d.txt"):
        memory.pipe_file(f"/bucket/{name}", name.encode())
    chosen = DataSettings(cache_dir=settings.cache_dir, include="*.txt", exclude="drop/")
    found = find("memory://bucket", chosen)
    assert isinstance(found, Files)
    assert found.own_splits == {"train", "test"}
    assert [(d.name, d.split) for d in found.documents(binary=False)] == [
        ("test/c.txt", "test"),
        ("train/a.txt", "train"),
    ]
    with pytest.raises(UserError, match=r'nothing to read in the folder memory://bucket: .* include "\*\.wav"'):
        find("memory://bucket", DataSettings(include="*.wav"))
    with pytest.raises(UserError, match="there is nothing at memory://nowhere: check the address"):
        find("memory://nowhere", settings)


def test_a_file_is_what_it_is_here(memory: Any, tmp_path: Path, settings: DataSettings) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS) * 300, encoding="utf-8")
    memory.pipe_file("/bucket/text.txt", path.read_bytes())
    local = prepare(path, "chars", settings, progress=False)
    assert prepare("memory://bucket/text.txt", "chars", settings, progress=False).path == local.path


def test_the_content_is_read_again_only_when_it_changes(
    memory: Any, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/bucket/x.txt", b"text " * 100)
    first = find("memory://bucket/x.txt", settings).key(settings.cache)
    with monkeypatch.context() as patched:
        patched.setattr("waveletgpt.data.sources.files._update", lambda *_: pytest.fail("read again"))
        assert find("memory://bucket/x.txt", settings).key(settings.cache) == first
    memory.pipe_file("/bucket/x.txt", b"texT " * 100)
    assert find("memory://bucket/x.txt", settings).key(settings.cache) != first


def test_what_breaks_off_is_noticed(memory: Any, settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/bucket/x.txt", bytes(range(65, 90)) * 100_000)
    source = find("memory://bucket/x.txt", settings)
    whole = memory.open

    class Cut:
        """A connection that ends early, without saying so."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def read(self, count: int) -> bytes:
            return self.file.read(min(count, max(0, 2_000_000 - self.file.tell())))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(type(memory), "open", lambda self, *a, **k: Cut(whole(*a, **k)))
    with pytest.raises(UserError, match=r"x\.txt broke off at 2,000,000 of 2,500,000 bytes: run it again"):
        prepare("memory://bucket/x.txt", "bytes", settings, progress=False)
    with pytest.raises(UserError, match="broke off at 2,000,000"):
        _ = [document.read() for document in source.files()]


def test_what_is_not_installed(settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.import_module("fsspec.registry")._registry
    for name in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, name, None)
    for scheme in ("s3", "gs", "az"):
        monkeypatch.delitem(known, scheme, raising=False)
    for address, package in (("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs"), ("az://b/x", "adlfs")):
        with pytest.raises(UserError, match=rf"{address} needs {package}: pip install 'waveletgpt\[remote\]'"):
            find(address, settings)


def test_a_hub_file_is_no_hub_set(settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def url_to_fs(address: str) -> Any:
        asked.append(address)
        raise FileNotFoundError

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    with pytest.raises(UserError, match=r"there is nothing at hf://datasets/owner/name/x\.txt"):
        find("hf://datasets/owner/name/x.txt", settings)
    assert asked == ["hf://datasets/owner/name/x.txt"]
    assert isinstance(find("hf:owner/name", settings), Hub)


class Server(ThreadingHTTPServer):
    """Knows no ranges; `cut` breaks each answer off after so many bytes."""

    content = b"text of the web, " * 40_000
    cut: int | None = None
    requests = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        if not self.path.startswith("/deep/page%20one.txt"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.cut])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(Server(("127.0.0.1", 0), Handler), monkeypatch) as found:
        yield found


def test_the_web_without_ranges(server: Server, tmp_path: Path, settings: DataSettings) -> None:
    address = f"http://127.0.0.1:{server.server_port}/deep/page%20one.txt?version=1"
    local = tmp_path / "page one.txt"
    local.write_bytes(server.content)
    found = prepare(address, "bytes", settings, progress=False)
    assert found.fingerprint == prepare(local, "bytes", settings, progress=False).fingerprint
    prepare(address, "bytes", settings, progress=False)
    assert server.requests == 1
    with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1.*404"):
        find(f"http://127.0.0.1:{server.server_port}/none.txt", settings, progress=False)


def test_a_truncated_download_is_noticed(server: Server, settings: DataSettings) -> None:
    server.cut = 100_000
    with pytest.raises(UserError, match=r"broke off 5 times, at 100,000 bytes"):
        find(f"http://127.0.0.1:{server.server_port}/deep/page%20one.txt", settings, progress=False)
    assert server.requests == 5


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """An S3 of its own on this machine."""
    pytest.importorskip("s3fs")
    servers = pytest.importorskip("moto.server")
    with pytest.MonkeyPatch.context() as patched:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "AWS_PROFILE"):
            patched.delenv(name, raising=False)
        patched.setenv("AWS_ACCESS_KEY_ID", "test")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patched.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = servers.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        server.start()
        patched.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        import s3fs

        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        yield system
        server.stop()


def test_an_object_store(s3: Any, folder: Path, settings: DataSettings) -> None:
    for path in sorted(folder.rglob("*.txt"))[30:]:
        path.unlink()
    (folder / "long.txt").write_bytes(b"many blocks of text " * 600_000)
    upload(s3, folder, "bucket/corpus")
    local = prepare(folder, "bytes", settings, progress=False)
    assert prepare("s3://bucket/corpus", "bytes", settings, progress=False).path == local.path
    one = prepare(folder / "long.txt", "text8", settings, progress=False)
    assert prepare("s3://bucket/corpus/long.txt", "text8", settings, progress=False).path == one.path
    with pytest.raises(UserError, match="nothing at s3://bucket/none"):
        find("s3://bucket/none", settings)
    with pytest.raises(UserError, match="s3://no-such-bucket"):
        find("s3://no-such-bucket/x", settings)


def test_packed_and_truncated_in_an_object_store(s3: Any, settings: DataSettings) -> None:
    packed = gzip.compress(bytes(range(65, 91)) * 40_000)
    s3.pipe_file("bucket/whole.txt.gz", packed)
    s3.pipe_file("bucket/part.txt.gz", packed[:-200])
    (document,) = find("s3://bucket/whole.txt.gz", settings).documents(binary=False)
    assert document.name == "whole.txt"
    with pytest.raises(UserError, match=r"part\.txt\.gz is truncated|is truncated"):
        prepare("s3://bucket/part.txt.gz", "bytes", settings, progress=False)
