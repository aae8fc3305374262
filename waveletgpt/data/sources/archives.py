"""Compressed files and archives as streams: nothing is unpacked to disk, so no member's path can lead anywhere."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from waveletgpt.errors import UserError

_ALIASES = {".tgz": ".tar.gz", ".tbz": ".tar.bz2", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}


class Stream(NamedTuple):
    """Bytes with a name, e.g. `reviews.tar.xz/train/pos/1_9.txt`; to be read before the next one is asked for."""

    name: str
    file: IO[bytes]


def _zstandard(file: IO[bytes]) -> IO[bytes]:
    import zstandard

    # As far as the format goes (zstd --long=31); the memory is taken as the window fills.
    new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    return io.BufferedReader(_Frames(file, new, (zstandard.ZstdError,)), 1 << 17)


def _bzip2(file: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(_Frames(file, bz2.BZ2Decompressor, (OSError, ValueError)), 1 << 17)


def _xz(file: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(_Frames(file, lzma.LZMADecompressor, (lzma.LZMAError,)), 1 << 17)


_OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".bz2": _bzip2,
    ".xz": _xz,
    ".zst": _zstandard,
}


def expand(stream: Stream, inner: str | None = None) -> Iterator[Stream]:
    """The plain files inside `stream`, as deep as archives go; `stream` itself if its name is of none.

    `inner` is the name without the compressions taken off so far. Raises UserError for broken or encrypted archives.
    """
    name = inner or stream.name
    for alias, meaning in _ALIASES.items():
        if name.lower().endswith(alias):
            name = name[: -len(alias)] + meaning
    suffix = "." + name.lower().rpartition(".")[2]
    if suffix in _OPENERS:
        with broken(stream.name):
            opened = _OPENERS[suffix](stream.file)
        yield from expand(Stream(stream.name, opened), name[: -len(suffix)])
    elif suffix == ".tar":
        yield from _tar_members(stream)
    elif suffix == ".zip":
        yield from _zip_members(stream)
    else:
        yield Stream(name, stream.file)


def _tar_members(stream: Stream) -> Iterator[Stream]:
    with broken(stream.name):
        # Joined archives have zeros in their middle.
        archive = tarfile.open(fileobj=stream.file, mode="r|", tarinfo=_Member, ignore_zeros=True)  # noqa: SIM115
    with archive:
        while True:
            with broken(stream.name):
                member = archive.next()
            if member is None:
                return
            archive.members.clear()  # type: ignore[attr-defined]  # or it remembers every member
            if member.isreg():
                file = archive.extractfile(member)
                assert file is not None
                yield from expand(Stream(f"{stream.name}/{member.name}", file))


class _Member(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        # After the first member tarfile takes a damaged header for the end, and what follows would be lost silently.
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None


def _zip_members(stream: Stream) -> Iterator[Stream]:
    if not stream.file.seekable():
        raise UserError(f"{stream.name} is a zip inside another archive: unpack the outer one first")
    with broken(stream.name):
        archive = zipfile.ZipFile(stream.file)
    with archive:
        members = [(info.filename.replace("\\", "/"), info) for info in archive.infolist()]  # Windows writes either
        first = min((info.header_offset for _, info in members), default=0)
        if first:
            stream.file.seek(0)
            if stream.file.read(4) == b"PK\3\4":
                raise UserError(f"{stream.name} is several ZIPs joined, of which only the last could be read: split it")
        for inside, member in sorted(members, key=lambda pair: pair[0]):
            if not inside.endswith("/"):
                name = f"{stream.name}/{inside}"
                with broken(name):
                    file = archive.open(member)
                with file:
                    yield from expand(Stream(name, file))


@contextlib.contextmanager
def broken(name: str) -> Iterator[None]:
    """Turns what the readers of archives raise into a UserError that names the file."""
    try:
        yield
    except (
        EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile, RuntimeError, NotImplementedError,
        OSError,
    ) as error:  # fmt: skip
        reason = str(error)
        if "encrypted" in reason or "password" in reason:
            raise UserError(f"{name} is encrypted: unpack it with its password first") from error
        if isinstance(error, NotImplementedError) or "too much memory" in reason:
            raise UserError(f"{name} is packed in a way that is not supported ({reason}): pack it anew") from error
        raise UserError(f"{name} cannot be read, it is broken or truncated ({error}): get it again") from error


class _Frames(io.RawIOBase):
    """Streams of one compression in a row, all of them: Python's own readers of bz2 and xz take whatever follows the
    first stream for rubbish and end silently, and zstandard's where a frame is cut off. This one raises.
    """

    def __init__(self, file: IO[bytes], new: Callable[[], Any], errors: tuple[type[Exception], ...]) -> None:
        self._file = file
        self._new = new
        self._errors = errors
        self._frame: Any = new()
        self._rest = b""
        self._out = memoryview(b"")
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._out:
                if self._frame.eof:
                    self._rest = self._frame.unused_data
                    self._frame = self._new()
                    self._begun = False
                # A small step: one compressed kilobyte can hold many megabytes.
                block = self._rest or self._file.read(1 << 10)
                self._rest = b""
                if not block:
                    if self._begun:
                        raise EOFError("compressed file ended before the end of the stream")
                    return 0
                if not self._begun:
                    block = block.lstrip(b"\0")  # between streams, and after the last, there may be padding
                    if not block:
                        continue
                self._begun = True
                self._out = memoryview(self._frame.decompress(block))
        except self._errors as error:
            raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count
