"""Compressed files and archives as streams. Nothing is unpacked to disk, so paths in an archive cannot do harm."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import logging
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from waveletgpt.errors import UserError

log = logging.getLogger(__name__)

_ALIASES = {".tgz": ".tar.gz", ".tbz": ".tar.bz2", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}


UNSUPPORTED = frozenset((".7z", ".rar", ".lz", ".lz4", ".lzo", ".z", ".br", ".cab", ".sz"))
"""Suffixes of files that are packed in other ways."""


class Stream(NamedTuple):
    """Bytes with a name, e.g. `reviews.tar.xz/train/pos/1_9.txt`. Read it before the next one is requested."""

    name: str
    file: IO[bytes]


def _zstandard(file: IO[bytes]) -> IO[bytes]:
    import zstandard

    # The largest window of the format (zstd --long=31). Memory grows only as the window fills.
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
    ".lzma": _xz,
    ".zst": _zstandard,
}


def expand(stream: Stream, inner: str | None = None) -> Iterator[Stream]:
    """The plain files inside `stream`, also in nested archives; `stream` itself if its name is not of an archive.

    `inner` is the name without the compressions removed so far. Raises UserError for broken or encrypted archives.
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
        # Joined archives have zeros between them.
        archive = tarfile.open(fileobj=stream.file, mode="r|", tarinfo=_Member, ignore_zeros=True)  # noqa: SIM115
    links = 0
    with archive:
        while True:
            with broken(stream.name):
                member = archive.next()
            if member is None:
                break
            archive.members.clear()  # type: ignore[attr-defined]  # or it remembers every member
            links += member.islnk()
            if member.isreg():
                file = archive.extractfile(member)
                assert file is not None
                yield from expand(Stream(f"{stream.name}/{member.name}", file))
    if links:
        log.warning("%s: %d members are links to others, and are left out", stream.name, links)
    if not getattr(archive, "ended", False):
        log.warning("%s ends without the mark of its end: it may be truncated", stream.name)


class _Member(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        # After the first member tarfile takes a damaged header for the end; the rest would be lost without an error.
        try:
            found = super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            archive.ended = True  # type: ignore[attr-defined]
            raise
        archive.ended = False  # type: ignore[attr-defined]
        return found


def _zip_members(stream: Stream) -> Iterator[Stream]:
    if isinstance(stream.file, tarfile.ExFileObject) or not stream.file.seekable():
        raise UserError(f"{stream.name} is a zip inside another archive: unpack the outer one first")
    with broken(stream.name):
        try:
            archive = zipfile.ZipFile(stream.file)
        except zipfile.BadZipFile as error:
            stream.file.seek(0)
            # A ZIP's directory is at its end.
            if "not a zip file" in str(error) and stream.file.read(4) == _ZIP_MEMBER:
                raise EOFError("no directory at its end") from None
            raise
    with archive:
        with broken(stream.name):
            _nothing_beside(stream, archive)
        members = [(info.filename.replace("\\", "/"), info) for info in archive.infolist()]  # Windows writes either
        for inside, member in sorted(members, key=lambda pair: pair[0]):
            if not inside.endswith("/"):
                name = f"{stream.name}/{inside}"
                with broken(name):
                    file = archive.open(member)
                with file:
                    yield from expand(Stream(name, file))


_ZIP_MEMBER, _ZIP_END = b"PK\3\4", b"PK\5\6"


def _nothing_beside(stream: Stream, archive: zipfile.ZipFile) -> None:
    """Raises UserError if a ZIP has another archive before it, or bytes after it, that its directory does not list.

    A program in front of the archive, which unpacks it, is allowed.
    """
    file, directory = stream.file, archive.start_dir
    first = min((info.header_offset for info in archive.infolist()), default=directory)
    if first < 0:
        raise zipfile.BadZipFile("its directory is of another file")
    end = file.seek(0, io.SEEK_END)
    file.seek(directory)
    tail = file.read(end - directory)  # the directory, as it is in memory already
    at = len(tail) - 22 if tail[-22:-18] == _ZIP_END and tail[-2:] == b"\0\0" else tail.rfind(_ZIP_END)
    after = tail[at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") :]
    if after.strip(b"\0"):
        what = "another archive" if _ZIP_MEMBER in after else f"{len(after):,} bytes"
        raise UserError(f"{stream.name} is a ZIP with {what} after its end, which would not be read: split it")
    file.seek(0)
    rest, joined = b"", first > 0 and file.read(4) == _ZIP_MEMBER
    file.seek(0)
    while first > 0 and not joined and (block := file.read(min(1 << 20, first))):
        first -= len(block)
        block = rest + block
        joined = any(_ends_a_zip(block, place) for place in _places(block, _ZIP_END))
        rest = block[-21:]
    if joined:
        raise UserError(f"{stream.name} is several ZIPs joined, of which only the last could be read: split it")


def _places(block: bytes, mark: bytes) -> Iterator[int]:
    at = block.find(mark)
    while at >= 0:
        yield at
        at = block.find(mark, at + 1)


def _ends_a_zip(block: bytes, at: int) -> bool:
    """Whether the record at this place ends an archive that is on one disk and has members."""
    disk, other, here, total = struct.unpack_from("<HHHH", block, at + 4) if at + 22 <= len(block) else (1,) * 4
    return disk == other == 0 and here == total > 0


@contextlib.contextmanager
def broken(name: str) -> Iterator[None]:
    """Turns exceptions of archive readers into a UserError that names the file and the cause."""
    try:
        yield
    except UserError:
        raise
    except (
        EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile, RuntimeError, NotImplementedError,
        OSError, struct.error, UnicodeDecodeError,
    ) as error:  # fmt: skip
        reason = (str(error) or type(error).__name__).rstrip(".")
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a damaged length seeks before 0
            raise  # a fault of the disk, not of the file's content
        if any(word in reason.lower() for word in ("encrypt", "password")):
            raise UserError(f"{name} is encrypted: unpack it with its password first") from error
        if isinstance(error, NotImplementedError) or any(word in reason.lower() for word in _UNSUPPORTED):
            raise UserError(f"{name} is packed in a way that is not supported ({reason}): pack it anew") from error
        if isinstance(error, EOFError) or any(word in reason.lower() for word in _TRUNCATED):
            raise UserError(f"{name} is truncated, its end is missing ({reason}): get it again") from error
        raise UserError(f"{name} is broken ({reason}): get it again") from error


_UNSUPPORTED = ("unsupported", "not supported", "too much memory", "dictionary", "span multiple disks")
_TRUNCATED = ("unexpected end of data", "not a gzipped file (b'\\x1f')", "truncated header", "ended before the end")


class _Frames(io.RawIOBase):
    """Reads all joined streams of one compression, and raises if one is damaged or cut off. Python's readers of bz2 and
    xz end silently if the bytes after the first stream are damaged, and that of zstandard if a frame is cut off.
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
                # Read little at a time: one compressed kilobyte can hold many megabytes.
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
        except EOFError:
            raise
        except self._errors as error:
            raise OSError(str(error)) from error
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count
