"""The token store: a folder of memory-mapped tokens, the same for every modality.

    tokens-train.bin  tokens-validation.bin  tokens-test.bin    uint16, or uint32 where the vocabulary needs it
    meta.json                                                   what it holds and where that came from
    tokenizer/                                                  Hugging Face files, if the modality has a tokenizer

Below it what every store needs: written aside and published in one step, by one process while the others wait.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Self, TypeVar

import numpy as np

from waveletgpt.errors import UserError, suggest
from waveletgpt.locks import locked

FORMAT = 1
SPLITS = ("train", "validation", "test")

_Store = TypeVar("_Store")


class TokenStore:
    """Tokens on disk, in three splits that don't overlap. Open it with `TokenStore.open(path)`."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TokenStore:
        """The store in the folder `path`.

        Raises UserError if there is none, or if it is not whole.
        """
        return cls(Path(path), read_meta(Path(path), "token store", FORMAT, cls._files))

    @staticmethod
    def _files(meta: dict[str, Any]) -> dict[str, int]:
        width = np.dtype(meta["dtype"]).itemsize
        str(meta["modality"]), int(meta["vocab_size"])
        files = {f"tokens-{split}.bin": int(meta["splits"][split]["tokens"]) * width for split in SPLITS}
        return files | {f"tokenizer/{name}": size for name, size in meta["tokenizer_files"].items()}

    @property
    def modality(self) -> str:
        return str(self.meta["modality"])

    @property
    def vocab_size(self) -> int:
        return int(self.meta["vocab_size"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the data's content and the settings that made these tokens."""
        return str(self.meta["fingerprint"])

    def split(self, name: str) -> np.ndarray:
        """The tokens of "train", "validation" or "test": a read-only memory map, 1-D, uint16 or uint32."""
        if name not in SPLITS:
            raise UserError(f'no split "{name}": there are {", ".join(SPLITS)}{suggest(name, SPLITS)}')
        dtype = np.dtype(self.meta["dtype"])
        if not self.meta["splits"][name]["tokens"]:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(self.path / f"tokens-{name}.bin", dtype=dtype, mode="r")

    def bytes_per_token(self, split: str) -> float | None:
        """UTF-8 bytes of normalised text per token (bits per byte = nats per token / ln 2 / this); None if not text."""
        counts = self.meta["splits"][split]
        return counts["bytes"] / counts["tokens"] if counts.get("bytes") and counts["tokens"] else None

    def load_tokenizer(self) -> Any:
        """The Hugging Face tokenizer saved with the tokens; None for a modality without one."""
        if not self.meta.get("tokenizer_files"):
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path / "tokenizer")

    def end_of_documents(self) -> int:
        """The token that ends each document.

        Raises:
            UserError: these tokens are not documents one after the other.
        """
        end = getattr(self.load_tokenizer(), "eos_token_id", None)
        if end is None or self.meta.get("record"):
            raise UserError(f"training.packing: tokens of {self.modality} have none that ends a document; leave it out")
        return int(end)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {self.meta['splits'][split]['tokens']:,}" for split in SPLITS)
        return f"TokenStore({str(self.path)!r}, {self.modality}, vocabulary {self.vocab_size:,}, tokens: {sizes})"


class FolderWriter:
    """Writes a store in a temporary folder beside `path` and publishes it in one step: a half-made one is never seen.

    `scratch` is for intermediate files. What a killed process, or a Ctrl-C, has left is taken over if it had `save`d,
    with the state in `saved`. Otherwise leaving the block without publishing removes everything, and `remove_leftovers`
    what a killed process left.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str, identity: dict[str, Any] | None = None) -> None:
        """`identity` is what `fingerprint` is the hash of: content and settings, recorded so that one can read them."""
        self.path = Path(path)
        self.fingerprint = fingerprint
        self.identity = identity or {}
        self._open: dict[str, BinaryIO] = {}

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.folder = _temporary_folder(self.path)
        self.saved: dict[str, Any] = {}
        """What the process before had saved; empty where there is nothing to go on from."""
        for left in _leftovers(self.path):
            with contextlib.suppress(OSError, ValueError):  # nothing was saved, or another process took it
                saved = json.loads((left / _STATE).read_bytes())
                if (saved["fingerprint"], saved.get("layout")) == (self.fingerprint, _LAYOUT):
                    left.rename(self.folder)  # onto an empty one
                    self.saved = saved["state"]
                    break
        self.scratch = self.folder / "scratch"
        self.scratch.mkdir(exist_ok=True)
        return self

    def save(self, state: dict[str, Any]) -> None:
        """Record the progress, `state`, for a process that continues; the files it names are on the disk already."""
        with (self.folder / f"{_STATE}.new").open("w") as file:
            json.dump({"fingerprint": self.fingerprint, "layout": _LAYOUT, "state": state}, file)
            sync(file)
        (self.folder / f"{_STATE}.new").replace(self.folder / _STATE)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._open.values():
            with contextlib.suppress(OSError):  # on a full disk closing flushes, and fails, again
                file.close()
        stopped = kind is not None and not issubclass(kind, Exception)
        if stopped and (self.folder / _STATE).is_file():
            self.folder.rename(_temporary_folder(self.path, process=0))  # process 0: counts as one that has ended
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str, size: int = 0) -> BinaryIO:
        """The file `name` of the store, opened for writing after `size` bytes when it is first asked for."""
        if name not in self._open:
            path = self.folder / name
            if size and path.stat().st_size < size:
                raise UserError(f"{path} is truncated: remove {self.folder} and prepare the data again")
            self._open[name] = path.open("r+b" if size else "wb")
            self._open[name].truncate(size)
            self._open[name].seek(size)
        return self._open[name]

    def _close(self) -> None:
        for file in self._open.values():
            sync(file)
            file.close()
        (self.folder / _STATE).unlink(missing_ok=True)
        shutil.rmtree(self.scratch)

    def publish(self, meta: dict[str, Any], opens: Callable[[Path], object], others: Iterable[Path] = ()) -> None:
        """Publish the folder under its name, with `meta` as its meta.json; `others` are files in it that
        were not opened here.

        `opens` raises UserError for an incomplete store.
        """
        self._close()
        self._publish(meta, opens, others)

    def _publish(self, meta: dict[str, Any], opens: Callable[[Path], object], others: Iterable[Path] = ()) -> None:
        """Write meta.json and give the folder its name; if another process was first, its store stays.

        `opens` raises UserError for an incomplete store; `others` are files that were not opened here.
        """
        identified = {"fingerprint": self.fingerprint, "identity": self.identity}
        (self.folder / "meta.json").write_text(json.dumps({**meta, **identified}, indent=1) + "\n")
        for path in [self.folder / "meta.json", *others, self.folder]:
            _sync(path)
        _publish(self.folder, self.path, opens)


class StoreWriter(FolderWriter):
    """Writes a token store in bounded memory:

        with StoreWriter(path, modality="bytes", fingerprint=key) as writer:
            writer.begin(vocab_size=257)
            writer.append("train", tokens, documents=1, size=1000)
            writer.finish(source={...})

    Leaving the block without `finish` leaves nothing behind.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, modality: str, fingerprint: str, identity: dict[str, Any] | None = None
    ) -> None:
        super().__init__(path, fingerprint, identity)
        self.modality = modality
        self.counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}

    @property
    def tokenizer_folder(self) -> Path:
        """Where the modality saves its tokenizer's files."""
        return self.folder / "tokenizer"

    def begin(self, vocab_size: int) -> None:
        """Set the number of distinct tokens, which decides how many bytes a token takes."""
        self.vocab_size = vocab_size
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        for split in SPLITS:
            self._file(f"tokens-{split}.bin")

    def state(self) -> dict[str, Any]:
        """What `go_on` needs, once all that was appended is on the disk."""
        for file in self._open.values():
            sync(file)
        return {"vocab_size": self.vocab_size, "counts": self.counts}

    def go_on(self, state: dict[str, Any]) -> None:
        """Instead of `begin`: append to what there was when `state` was given; what came after it is dropped."""
        self.vocab_size, self.counts = state["vocab_size"], state["counts"]
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        for split in SPLITS:
            self._file(f"tokens-{split}.bin", self.counts[split]["tokens"] * self.dtype.itemsize)

    def append(self, split: str, tokens: np.ndarray, *, documents: int = 0, size: int = 0) -> None:
        """Add `tokens` (1-D integers in 0 .. vocab_size-1), which end `documents` documents and stand for `size` bytes.

        Raises ValueError for a token that is out of range.
        """
        if len(tokens):
            if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size:
                raise ValueError(f"token out of range 0 .. {self.vocab_size - 1}: {tokens.min()} .. {tokens.max()}")
            self._file(f"tokens-{split}.bin").write(np.ascontiguousarray(tokens, self.dtype).data)
        counts = self.counts[split]
        counts["tokens"] += len(tokens)
        counts["documents"] += documents
        counts["bytes"] += size

    def finish(self, **meta: Any) -> None:
        """Publish the store; `meta` is recorded in meta.json. If another process was first, its store stays."""
        self._close()
        tokenizer = sorted(self.tokenizer_folder.glob("*"))
        content = {
            "format": FORMAT,
            "modality": self.modality,
            "vocab_size": self.vocab_size,
            "dtype": self.dtype.name,
            "splits": self.counts,
            "tokenizer_files": {file.name: file.stat().st_size for file in tokenizer},
            **meta,
        }
        self._publish(content, TokenStore.open, tokenizer)


def read_meta(
    folder: Path, what: str, format_: int, files: Callable[[dict[str, Any]], dict[str, int]]
) -> dict[str, Any]:
    """The meta.json of the store in `folder`, of which `files(meta)` must be there, with so many bytes.

    Raises UserError if it is not `what` ("token store"), of another format, or not whole.
    """
    mend = "prepare the data again"
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta["format"] != format_:
            raise UserError(f"{folder} has format {meta['format']}, this version reads format {format_}: {mend}")
        str(meta["fingerprint"])
        expected = files(meta)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not {_a(what)} (no meta.json in it): {mend}") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'meta.json'} is damaged ({type(error).__name__}: {error}): {mend}") from None
    for name, size in expected.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing: {mend}")
        if file.stat().st_size != size:
            raise UserError(f"{file} is truncated, {file.stat().st_size:,} bytes instead of {size:,}: {mend}")
    return meta


def _a(what: str) -> str:
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"


def sync(file: IO[Any]) -> None:
    """Make sure that what was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _temporary_folder(path: Path, process: int | None = None) -> Path:
    # The host and process in the name tell a later run whether the writer is still alive.
    prefix = f".{path.name}.tmp-{socket.gethostname()}-{os.getpid() if process is None else process}-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))


def _sync(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(folder: Path, path: Path, opens: Callable[[Path], object]) -> None:
    for _ in range(3):
        try:
            folder.rename(path)
        except OSError:
            if not path.exists():
                raise
            with contextlib.suppress(UserError):
                opens(path)
                return
            # The folder there is incomplete: move it away, so that the new one can take its name.
            aside = _temporary_folder(path)
            with contextlib.suppress(FileNotFoundError):  # another process put it aside first
                path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            _sync(path.parent)
            return
    raise OSError(f"cannot put the new store at {path}")


def remove_leftovers(path: Path) -> None:
    """Remove the temporary folders for the store at `path` that killed processes of this machine left, but for the one
    that got furthest of those that can be resumed."""
    left = _leftovers(path)
    for folder in left:
        if folder != left[0] or not (folder / _STATE).is_file():
            shutil.rmtree(folder, ignore_errors=True)


_STATE = "state.json"
_LAYOUT = 2
"""How a state and the files it names are written: raised when a later version cannot go on from an earlier one's."""


def _leftovers(path: Path) -> list[Path]:
    """What killed processes of this machine left, the one last saved first."""
    start = f".{path.name}.tmp-{socket.gethostname()}-"
    found = []
    for folder in path.parent.glob(f".{path.name}.tmp-*"):
        process = folder.name.removeprefix(start).split("-")[0]
        if folder.name.startswith(start) and process.isdigit() and not _alive(int(process)):
            found.append(folder)

    def saved(folder: Path) -> float:
        state = folder / _STATE
        return state.stat().st_mtime if state.is_file() else 0.0

    return sorted(found, key=saved, reverse=True)


def _alive(process: int) -> bool:
    if not process:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time prepare the store at `path`; the others wait and then find it made.

    Only saves double work: where locks don't exist, publishing is still atomic.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.parent / f".{path.name}.lock"
    file.touch()
    with locked(file, wait=True):
        yield


def made_once(path: Path, opens: Callable[[Path], _Store], make: Callable[[], None]) -> _Store:
    """The store at `path` if it is whole, else made by `make` while other processes wait; `opens` raises UserError."""
    with contextlib.suppress(UserError):
        return opens(path)
    with exclusive(path):
        with contextlib.suppress(UserError):  # another process made it meanwhile
            return opens(path)
        remove_leftovers(path)
        make()
    return opens(path)


@contextlib.contextmanager
def disk_errors(cache: Path) -> Iterator[None]:
    """Turns what goes wrong with files (a full disk, a cache that is no folder) into a UserError."""
    try:
        yield
    except OSError as error:
        place = error.filename or cache
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full at {cache}: free some space or set `cache_dir`") from error
        raise UserError(f"cannot use {place} ({error.strerror or error}): check it, or set `cache_dir`") from error
