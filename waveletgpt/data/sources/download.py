"""Downloads that can be interrupted. They are resumed and verified before the file gets its name."""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from waveletgpt.data.progress import bar
from waveletgpt.data.sources.files import CHUNK, remembered, sha256
from waveletgpt.data.store import exclusive
from waveletgpt.errors import UserError

ATTEMPTS = 5
PAUSE = 1.0
"""Seconds to wait after the first break; the wait grows with each further one."""
TIMEOUT = 30.0
"""Seconds to wait for an answer."""
# Some servers refuse Python's default user agent.
_AGENT = "Mozilla/5.0 (compatible; waveletgpt)"


def download(
    url: str,
    path: Path,
    *,
    size: int | None,
    sha: str | None,
    progress: bool = True,
    cache: Path | None = None,
    mend: str | None = None,
) -> Path:
    """Download `url` to `path` unless the file is there, and check its `size` in bytes and SHA-256 `sha` if known.

    If `sha` is not known, that of the first download is recorded in `path`.sha256 and checked later. Raises UserError
    if the address cannot be reached (the message ends with `mend`), or gives another file.
    """
    mend = mend or f"put {path.name} in a folder and give that with `data_dir`"
    with exclusive(path):
        if not path.exists():
            part = path.with_name(path.name + ".part")
            if size is None or not part.exists() or part.stat().st_size < size:
                _fetch(url, part, path.name, size, progress, mend)
            try:
                verify(part, size=size, sha=sha, name=path.name)
            except UserError as error:
                part.unlink()
                raise UserError(f"{url} gave something else: {error}") from None
            if sha is None:
                _record(path).write_text(sha256(part))
            part.replace(path)
        verify(path, size=size, sha=sha or recorded(path), name=str(path), cache=cache)
    return path


def recorded(path: Path) -> str | None:
    """The SHA-256 recorded at the first download; None without a record."""
    return _record(path).read_text().strip() if _record(path).is_file() else None


def verify(path: Path, *, size: int | None, sha: str | None, name: str, cache: Path | None = None) -> None:
    """Raises UserError if the file is not the expected one. `cache` keeps the hashes of unchanged files."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise UserError(f"{name} has {found:,} bytes instead of {size:,}: remove it and get it again")
    if sha is None:
        return
    digest = remembered(cache, ["sha256"], [path], lambda: sha256(path)) if cache else sha256(path)
    if digest != sha:
        raise UserError(f"{name} has SHA-256 {digest[:16]}... instead of {sha[:16]}...: remove it and get it again")


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _fetch(url: str, part: Path, name: str, size: int | None, progress: bool, mend: str) -> None:
    reason: object = "connection closed"
    with bar(f"downloading {name}", size or 0, progress) as advance:
        for attempt in range(ATTEMPTS):
            time.sleep(PAUSE * attempt)
            have = part.stat().st_size if part.exists() else 0
            headers = {"User-Agent": _AGENT} | ({"Range": f"bytes={have}-"} if have else {})
            try:
                with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
                    if _receive(answer, part, have, advance):
                        return
            except urllib.error.HTTPError as error:
                if error.code != 416:
                    raise _unreachable(url, mend, f"{error.code} {error.reason}") from error
                part.unlink()  # 416: the partial file is longer than the server's: start again
            except urllib.error.URLError as error:
                raise _unreachable(url, mend, error.reason) from error
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
    have = part.stat().st_size if part.exists() else 0
    raise UserError(f"{url} broke off {ATTEMPTS} times, at {have:,} bytes ({reason}): run it again to go on from there")


def _receive(answer: http.client.HTTPResponse, part: Path, have: int, advance: Callable[[int], None]) -> bool:
    """Append the server's answer to `part`, or replace it if the server sent the file from its beginning.

    Returns whether the file is complete."""
    if answer.status != 206:
        have = 0
    length = answer.headers.get("Content-Length")
    total = have + int(length) if length else None
    with part.open("ab" if have else "wb") as file:
        while block := answer.read(CHUNK >> 4):
            file.write(block)
            have += len(block)
            advance(have)
        file.flush()
        os.fsync(file.fileno())
    return total is None or have == total


def _unreachable(url: str, mend: str, reason: object) -> UserError:
    return UserError(f"cannot reach {url} ({reason}); {mend}")
