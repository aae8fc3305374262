"""Files at addresses: `s3://`, `gs://`, `az://` and `hf://datasets/` through fsspec, `https://` as a download.

Files of fsspec are listed and read in blocks, like the local files of `Files`; only the tokens are kept. Files of a web
server are downloaded once and kept, so that the server need not support reading in parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any

from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.download import download
from waveletgpt.data.sources.files import Files, matches
from waveletgpt.errors import UserError

PACKAGES = {
    "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "hf": "huggingface_hub",
}  # fmt: skip
"""The library for addresses, by the word before ://."""
WEB = ("http", "https")
BLOCK = 1 << 23
"""Number of bytes requested at a time."""


def is_address(data: str) -> bool:
    """Whether `data` is such an address."""
    return data.partition("://")[0] in (*PACKAGES, *WEB) and "://" in data


def at_address(data: str, settings: DataSettings, progress: bool = True) -> Files:
    """The files at an address. Raises UserError if it cannot be reached, or the library for it is not installed."""
    if data.partition("://")[0] not in WEB:
        return RemoteFiles(data, settings)
    parts = urllib.parse.urlsplit(data)
    name = PurePosixPath(urllib.parse.unquote(parts.path)).name or "data"
    place = settings.cache / "downloads" / "web" / hashlib.sha256(data.encode()).hexdigest()[:16] / name
    mend = "check the address and the connection"
    path = download(data, place, size=None, sha=None, progress=progress, cache=settings.cache, mend=mend)
    return Files(path, settings, data, split_folders=True)


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address, with the methods of `Path` that `Files` uses."""

    system: Any
    address: str
    info: Mapping[str, Any]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.address).suffix

    def stat(self) -> Any:
        return SimpleNamespace(st_size=int(self.info["size"]), st_mtime_ns=0)

    def open(self, mode: str = "rb") -> IO[bytes]:
        return io.BufferedReader(_Reader(self), 1 << 20)

    def __str__(self) -> str:
        """The address, with the time and hash that the service gives for the content."""
        return f"{self.address} {sorted((key, str(value)) for key, value in self.info.items())}"


class _Reader(io.RawIOBase):
    """The bytes of a remote file. Any fault, such as an early end, raises UserError."""

    def __init__(self, file: RemoteFile) -> None:
        self._size, self._address = file.stat().st_size, file.address
        with _reaching(self._address):
            self._file = file.system.open(file.address, "rb", block_size=BLOCK, cache_type="readahead")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _reaching(self._address):
            at = self._file.tell()
            block = self._file.read(len(buffer))
        if not block and at < self._size:
            raise UserError(f"{self._address} broke off at {at:,} of {self._size:,} bytes: run it again")
        buffer[: len(block)] = block
        return len(block)

    def seek(self, offset: int, whence: int = 0) -> int:
        with _reaching(self._address):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextlib.contextmanager
def _reaching(address: str) -> Iterator[None]:
    """Turns any exception of the services' libraries into a UserError that names the address."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is nothing at {address}: check the address") from error
    except ImportError as error:
        package = PACKAGES[address.partition("://")[0]]
        mend = "'waveletgpt[remote]'" if package in ("s3fs", "gcsfs", "adlfs") else package
        raise UserError(f"{address} needs {package}: pip install {mend}") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        mend = "check the address, the access and the connection"
        raise UserError(f"cannot read {address} ({reason}): {mend}") from error


class RemoteFiles(Files):
    """A file at an address, or all files below it, in sorted order and without hidden files."""

    def __init__(self, address: str, settings: DataSettings) -> None:
        self._address = address.rstrip("/")
        with _reaching(self._address):
            import fsspec

            self._system, self._place = fsspec.core.url_to_fs(self._address)
            self._single = self._system.isfile(self._place)
        super().__init__(Path(self._address), settings, address, split_folders=True)

    @property
    def is_folder(self) -> bool:
        return not self._single

    def _list(self) -> list[tuple[str, Any]]:
        scheme = self._address.partition("://")[0]
        with _reaching(self._address):
            if self._single:
                place = PurePosixPath(self._address).name
                return [(place, RemoteFile(self._system, self._address, self._system.info(self._place)))]
            there = self._system.find(self._place, detail=True)
        found = []
        for place, info in there.items():
            inside = place.removeprefix(self._place).lstrip("/")
            if inside and not inside.endswith("/") and self._visible(inside) and self._wanted(inside):
                found.append((inside, RemoteFile(self._system, f"{scheme}://{place}", info)))
        if not there:
            raise UserError(f"there is nothing at {self._address}: check the address")
        return self._some(found)

    def _visible(self, inside: str) -> bool:
        parts = inside.split("/")
        exclude = self.settings.exclude
        folders = ["/".join(parts[: i + 1]) + "/" for i in range(len(parts) - 1)]
        return not any(part.startswith(".") for part in parts) and not (
            exclude is not None and any(matches(folder, exclude) for folder in folders)
        )
