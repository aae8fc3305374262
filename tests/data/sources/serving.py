"""A web server of this machine for a test, and downloads that go to it at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import HTTPServer
from typing import TypeVar

import pytest

from waveletgpt.data.sources import download

Server = TypeVar("Server", bound=HTTPServer)


@contextlib.contextmanager
def serving(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serve until the end; downloads wait for nothing between tries, and know of no proxy."""
    monkeypatch.setattr(download, "PAUSE", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
