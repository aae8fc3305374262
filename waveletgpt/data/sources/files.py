"""Where documents come from: files, folders, archives, tables with a column of text, the Hugging Face hub."""

from __future__ import annotations

import codecs
import contextlib
import fnmatch
import hashlib
import io
import itertools
import json
import logging
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources import tables
from waveletgpt.data.sources.archives import UNSUPPORTED, Stream, broken, expand
from waveletgpt.data.sources.encodings import Peeked, as_utf8, is_utf8, marked, unmarked
from waveletgpt.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 1 << 20
"""Number of bytes of a document read at a time."""

FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of sub-folders that are splits."""
_WORD = re.compile(rf"({'|'.join(sorted(FOLDERS, reverse=True))}|eval|evaluation)(?:set|data|split)?", re.IGNORECASE)


_ARCHIVE = re.compile(r"\.(?:zip|tar|t(?:gz|bz2?|xz|zst)|tar\.(?:gz|bz2|xz|zst|lzma))$", re.IGNORECASE)
_ABOUT = re.compile(r"(readme|licen[cs]e|copying|citation|dataset_infos?)\b", re.IGNORECASE)
"""Files about the data, which may be beside it."""


_CONTROLS = bytes({*range(32), 127} - {*b"\t\n\r\f\v\b\x1b"})


class TooLarge(Exception):
    """A file that is not read because of its size."""


@dataclass
class Document:
    """One text, recording or picture: its name, and its bytes in chunks. Read it before the next document.

    Text is UTF-8. `split` is set if the source gives the split of the document.
    """

    name: str
    chunks: Iterable[bytes]
    split: str | None = None

    def read(self, limit: int | None = None) -> bytes:
        """All its bytes at once, for formats that need the whole file; raises TooLarge beyond `limit` bytes."""
        if limit is None:
            return b"".join(self.chunks)
        content = bytearray()
        for chunk in self.chunks:
            content += chunk
            if len(content) > limit:
                raise TooLarge(f"larger than {limit >> 20} MB")
        return bytes(content)


class Source(Protocol):
    """A source of documents. They can be read any number of times, always in the same order."""

    name: str
    size: int
    """Bytes on disk, for the progress bar; 0 if unknown."""
    skipped: list[str]
    """Names of skipped files, which cannot be used."""

    @property
    def done(self) -> int:
        """How many of `size` have been read."""

    @property
    def own_splits(self) -> Set[str]:
        """The splits it comes in, each document saying which it belongs to; empty where it comes in one piece."""

    def key(self, cache: Path) -> str:
        """Identifies the documents: a hash of their content."""

    def files(self) -> Iterator[Document]:
        """Each file, archives opened, as it is."""

    def documents(self, *, binary: bool) -> Iterator[Document]:
        """Each text: files, or the rows of tables. `binary=False` passes over what is not UTF-8 text."""


class Files:
    """A file, or all files in a folder, in sorted order and without hidden files."""

    def __init__(
        self,
        path: Path,
        settings: DataSettings,
        name: str | None = None,
        splits: dict[str, str] | None = None,
        split_folders: bool = False,
    ) -> None:
        """`name` is for messages. `splits` are those of a named set: file name -> split.

        With `split_folders`, names decide the splits: those of sub-folders, else those of files, if all name a split
        and training and another split are among them. Files beside such folders are left out.
        """
        self.path = path
        self.name = name or str(path)
        self.settings = settings
        self.splits = splits or {}
        self.skipped: list[str] = []
        self.beside: list[str] = []
        """Files left out because they are beside folders of splits."""
        self._before = 0
        self._file: IO[bytes] | None = None
        self._paths = self._list()
        if not any(path.stat().st_size for _, path in self._paths):
            raise UserError(f"{self.name} is empty: there is nothing to read in it")
        self.folders: dict[str, str] = {}
        """Folders that are splits: path inside the folder or archive -> split."""
        self.split_files: dict[str, str] = {}
        """Files with the name of a split, if all files have one: path inside the folder or archive -> split."""
        self.unclear: list[str] = []
        """Folders or files with the name of a split, if others have none: then the names are not used as splits."""
        self._inside = ""
        self._archive: str | None = None
        if split_folders:
            self._find_splits()
        self.size = sum(path.stat().st_size for _, path in self._paths)

    def _list(self) -> list[tuple[str, Any]]:
        """(path inside the folder, file) of all wanted files. A file is a Path or a `RemoteFile`."""
        path = self.path
        if not path.is_dir():
            if not stat.S_ISREG(path.stat().st_mode):
                raise UserError(f"{path} is neither a file nor a folder: copy what it gives into a file first")
            return [(path.name, path)]
        found = []
        for folder, folders, names in os.walk(path):
            here = Path(folder)
            folders[:] = [name for name in folders if not name.startswith(".") and self._entered(here / name)]
            for name in names:
                file = here / name
                inside = file.relative_to(path).as_posix()
                if not name.startswith(".") and self._wanted(inside) and file.is_file():
                    found.append((inside, file))
        return self._some(found)

    def _some(self, found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """The files of a folder, sorted. Raises UserError if there is none."""
        if not found:
            globs = (("include", self.settings.include), ("exclude", self.settings.exclude))
            given = " and ".join(f'{name} "{glob}"' for name, glob in globs if glob)
            raise UserError(f"nothing to read in the folder {self.name}: no visible files{given and ' with '}{given}")
        return sorted(found, key=lambda pair: pair[0])

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, not a single file."""
        return self.path.is_dir()

    def _find_splits(self) -> None:
        """Finds splits by the names of folders, else of files, in the folder or in its only archive."""
        names = [inside for inside, _ in self._paths]
        data = [name for name in names if not _ABOUT.match(name.rpartition("/")[2])]
        if len(data) == 1 and _ARCHIVE.search(data[0]):
            self._archive = data[0]
            names = [name.removeprefix(f"{data[0]}/") for name in self._members()]
            data = [name for name in names if not _ABOUT.match(name.rpartition("/")[2])]
        parts = zip(*(name.split("/")[:-1] for name in data), strict=False)
        above = "".join(f"{part[0]}/" for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts))
        deep = [name for name in names if name.startswith(above) and "/" in name.removeprefix(above)]
        folders = sorted({above + name.removeprefix(above).partition("/")[0] for name in deep})
        for found, mapping in ((folders, self.folders), (sorted(data), self.split_files)):
            said = _splits_of(found)
            splits = {split for split in said.values() if split}
            if "train" in splits and len(splits) > 1:
                if all(said.values()):
                    mapping.update({name: split for name, split in said.items() if split})
                    kept = set(deep if mapping is self.folders else data)
                    self.beside = [name for name in names if name not in kept]
                    if self._archive is None:
                        self._paths = [(inside, path) for inside, path in self._paths if inside in kept]
                    return
                self.unclear = [name for name, split in said.items() if split]

    def _members(self) -> list[str]:
        def content() -> str:
            return json.dumps([stream.name for stream in self._streams()])

        insides, paths = zip(*self._paths, strict=True)
        what = ["members", str(self.settings.include), str(self.settings.exclude), *insides]
        found: list[str] = json.loads(remembered(self.settings.cache, what, paths, content))
        return found

    @property
    def own_splits(self) -> Set[str]:
        """The splits it comes in, each document saying which it belongs to; empty where it comes in one piece."""
        return {*self.splits.values(), *self.folders.values(), *self.split_files.values()}

    def _split(self, name: str) -> str | None:
        key = self._inside if self._archive is None else name.removeprefix(f"{self._archive}/")
        of_folder = (split for folder, split in self.folders.items() if key.startswith(f"{folder}/"))
        return self.splits.get(name.rpartition("/")[2]) or next(of_folder, None) or self.split_files.get(key)

    def _wanted(self, name: str) -> bool:
        include, exclude = self.settings.include, self.settings.exclude
        return (include is None or matches(name, include)) and (exclude is None or not matches(name, exclude))

    def _entered(self, folder: Path) -> bool:
        inside = folder.relative_to(self.path).as_posix()
        return self.settings.exclude is None or not matches(f"{inside}/", self.settings.exclude)

    def key(self, cache: Path) -> str:
        """SHA-256 over names and contents, cached in `cache` until a size or time changes."""

        def content() -> str:
            digest = hashlib.sha256()
            for inside, path in self._paths:
                digest.update(f"{inside}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
                _update(digest, path)
            return digest.hexdigest()

        insides, paths = zip(*self._paths, strict=True)
        return remembered(cache, ["content", *insides], paths, content)

    def suffixes(self, cache: Path) -> Counter[str]:
        """How many files end in `.wav`, `.txt`, ..., in lower case, with those in archives; cached as `key` is."""

        def content() -> str:
            return json.dumps(Counter(Path(stream.name).suffix.lower() for stream in self._streams()))

        insides, paths = zip(*self._paths, strict=True)
        what = ["suffixes 2", str(self.settings.include), str(self.settings.exclude), *insides]
        return Counter(json.loads(remembered(cache, what, paths, content)))

    @property
    def done(self) -> int:
        """Bytes on disk read so far."""
        return self._before + (self._file.tell() if self._file and not self._file.closed else 0)

    def _streams(self) -> Iterator[Stream]:
        self._before = 0
        self.skipped = []
        for inside, path in self._paths:
            self._inside = inside
            if path.suffix.lower() in UNSUPPORTED:
                raise UserError(f"{inside} is packed in a way that is not supported: unpack it first, or `exclude` it")
            with path.open("rb") as self._file:
                for stream in expand(Stream(inside, self._file)):
                    member = stream.name.removeprefix(f"{inside}/")
                    # Globs choose among the files of a folder, or among the members of a single archive.
                    chosen = self.is_folder or self._wanted(member)
                    if stream.file is not self._file and (not chosen or _hidden(member)):
                        continue
                    if self._archive is None or not self.own_splits or self._split(stream.name):
                        yield stream
            self._file = None
            self._before += path.stat().st_size

    def files(self) -> Iterator[Document]:
        """Each file, archives opened, as it is."""
        for stream in self._streams():
            yield Document(stream.name, _chunks(stream), self._split(stream.name))

    def documents(self, *, binary: bool) -> Iterator[Document]:
        """Each text: files, or the rows of tables. `binary=False` passes over what is not UTF-8 text.

        Raises UserError if a file given by itself is binary, or if no document is found at all.
        """
        empty, tabular = True, False
        self._utf8: list[str] = []
        for found in self._streams():
            stream, records = self._by_content(self._noted(found))
            texts = tables.rows(stream, self.settings.column, self.settings.encoding, records)
            tabular |= texts is not None
            for document in [self._whole(stream, binary)] if texts is None else map(_row, texts):
                if document is not None:
                    document.split = self._split(stream.name)
                    empty = False
                    yield document
        if self._utf8:
            log.warning(
                "%d files seem to be UTF-8 and were read as %s all the same: %s", len(self._utf8),
                self.settings.encoding, ", ".join(self._utf8[:3]) + (", ..." if len(self._utf8) > 3 else ""),
            )  # fmt: skip
        if self.settings.column is not None and not tabular:
            raise UserError(
                f'column is "{self.settings.column}", but {self.name} has no table (JSON lines, CSV, TSV, Parquet) '
                "that it could be of: leave `column` out"
            )
        if empty:
            skipped = f" ({len(self.skipped)} binary files skipped, such as {self.skipped[0]})" if self.skipped else ""
            raise UserError(f"no text in {self.name}{skipped}: `modality=bytes` takes any file")

    def _noted(self, stream: Stream) -> Stream:
        """Record a file that is UTF-8 although another encoding was named for all."""
        if not self.settings.encoding or codecs.lookup(self.settings.encoding).name == "utf-8":
            return stream
        if stream.name.lower().endswith(".parquet"):
            return stream
        with broken(stream.name):
            start = stream.file.read(CHUNK)
        if is_utf8(start):
            self._utf8.append(stream.name)
        return Stream(stream.name, io.BufferedReader(Peeked(start, stream.file)))

    def _by_content(self, stream: Stream) -> tuple[Stream, bool]:
        # JSON lines and arrays of records are often called .json.
        if not stream.name.lower().endswith(".json"):
            return stream, False
        with broken(stream.name):
            start = stream.file.read(CHUNK)
        found = Stream(stream.name, io.BufferedReader(Peeked(start, stream.file)))
        return found, tables.has_records(start, self.settings.column, self.settings.encoding)

    def _whole(self, stream: Stream, binary: bool) -> Document | None:
        if not binary or self.settings.encoding:
            with broken(stream.name):
                start = stream.file.read(CHUNK)
            if marked(start) or looks_like_text(start) or (self.settings.encoding and not binary):
                file: IO[bytes] = io.BufferedReader(Peeked(start, stream.file))
                with broken(stream.name):
                    stream = Stream(stream.name, as_utf8(file, stream.name, self.settings.encoding))
            else:
                stream = Stream(stream.name, io.BufferedReader(Peeked(start, stream.file)))
        chunks = _chunks(stream)
        first = next(chunks, b"")
        if not first:
            return None
        if not binary and not looks_like_text(first):
            if not self.path.is_dir() and "/" not in stream.name:
                if likely := unmarked(first):
                    raise UserError(f"{self.name} seems to be {likely.upper()} without a mark: try `encoding={likely}`")
                raise UserError(
                    f"{self.name} looks like a binary file, not like UTF-8 text: convert it, or use `modality=bytes`"
                )
            self.skipped.append(stream.name.encode("utf-8", "replace").decode())
            return None
        return Document(stream.name, itertools.chain([first], chunks))


def _splits_of(names: Sequence[str]) -> dict[str, str | None]:
    """The split in the last part of each name, as one of its words; None if there is none, or several.

    "eval" is validation, or the test split if another name is validation.
    """
    found: dict[str, str | None] = {}
    for name in names:
        words = filter(None, map(_WORD.fullmatch, re.findall("[A-Za-z]+", name.rpartition("/")[2])))
        said = {FOLDERS.get(word[1].lower(), "eval") for word in words}
        found[name] = said.pop() if len(said) == 1 else None
    evaluation = "test" if "validation" in found.values() else "validation"
    return {name: evaluation if split == "eval" else split for name, split in found.items()}


def report_skipped(source: Source, wanted: str, usable: int) -> None:
    """Warn about the files in `source.skipped`. Raises UserError if `usable`, the number of other files, is 0."""
    skipped = source.skipped
    names = "; ".join(skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
    if not usable:
        raise UserError(f"no {wanted} in {source.name} that can be used" + (f" ({names})" if skipped else ""))
    if skipped:
        log.warning("skipped %d files without usable %s: %s", len(skipped), wanted, names)


def remembered(cache: Path, what: Sequence[str], paths: Sequence[Any], compute: Callable[[], str]) -> str:
    """The result of `compute()`, cached until a file changes its path, size or time.

    `what` distinguishes results computed from the same files.
    """
    stats = [path.stat() for path in paths]
    listing = hashlib.sha256("\0".join(what).encode(errors="surrogateescape"))
    for path, status in zip(paths, stats, strict=True):
        place = os.path.abspath(path) if isinstance(path, Path) else str(path)
        line = f"\0{place}\0{status.st_size}\0{status.st_mtime_ns}"
        listing.update(line.encode(errors="surrogateescape"))
    memory = cache / "hashes" / listing.hexdigest()
    if memory.is_file() and (known := memory.read_text()):
        return known
    result = compute()
    # A second change within the resolution of the clock would go unnoticed: cache only if the last one is older.
    if all(time.time_ns() - status.st_mtime_ns > 2e9 for status in stats):
        with contextlib.suppress(OSError):  # the cache is optional
            memory.parent.mkdir(parents=True, exist_ok=True)
            temporary = memory.with_name(f".{memory.name}.{os.getpid()}")
            temporary.write_text(result)
            temporary.replace(memory)
    return result


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    _update(digest, path)
    return digest.hexdigest()


def _update(digest: Any, path: Any) -> None:
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)


def _row(row: tuple[str, str]) -> Document:
    return Document(row[0], [row[1].encode("utf-8", "replace")])


def _chunks(stream: Stream) -> Iterator[bytes]:
    while True:
        with broken(stream.name):
            chunk = stream.file.read(CHUNK)
        if not chunk:
            return
        yield chunk


def looks_like_text(start: bytes) -> bool:
    """Whether a file with this start is text in any encoding: no NUL and hardly any control characters."""
    start = start[: 1 << 16]
    return b"\0" not in start and len(start) - len(start.translate(None, _CONTROLS)) <= len(start) // 50


def matches(name: str, globs: str) -> bool:
    """Whether a path or its last part matches one of the globs, which are separated by commas."""
    patterns = [pattern.strip() for pattern in globs.split(",") if pattern.strip()]
    return any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(name.rpartition("/")[2], p) for p in patterns)


def _hidden(name: str) -> bool:
    return any((part.startswith(".") and part.strip(".")) or part == "__MACOSX" for part in name.split("/"))
