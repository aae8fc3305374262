"""Text in other encodings, converted to UTF-8. A mark in the file or the user names the encoding; bytes that cannot be
decoded are an error."""

from __future__ import annotations

import codecs
import io
from typing import IO, Any

from waveletgpt.errors import UserError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, as it begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_STEP = 1 << 17
_ENOUGH = 30
"""Letters outside ASCII that a guess needs at least: many encodings share most letters."""
_SAMPLE = 1 << 16
"""Bytes an encoding is guessed from."""


def marked(start: bytes) -> bool:
    """Whether a file with this start has a mark of UTF-16 or UTF-32."""
    return any(start.startswith(mark) for mark, name in _MARKS if name != "utf-8")


def begin(start: bytes, encoding: str | None = None) -> str:
    """The text at the start of a file, as far as it can be decoded."""
    mark, found = next(((mark, found) for mark, found in _MARKS if start.startswith(mark)), (b"", encoding or "utf-8"))
    return start[len(mark) :].decode(found, "ignore")


def unmarked(start: bytes) -> str | None:
    """The likely kind of UTF-16 of a file without a mark (every second byte is 0); None if it is not UTF-16."""
    start = start[: min(_SAMPLE, len(start) // 2 * 2)]
    for name, zeros, others in (("utf-16-le", start[1::2], start[::2]), ("utf-16-be", start[::2], start[1::2])):
        if len(zeros) > 3 and zeros.count(0) > 0.7 * len(zeros) and b"\0" not in others:
            return name
    return None


class Utf8File(io.RawIOBase):
    """A file as UTF-8 without a mark. It is decoded as its mark says, else from `encoding`, else from UTF-8.

    For bytes that are not of the encoding, reading raises UserError with their number and a guess.
    """

    def __init__(self, file: IO[bytes], name: str, encoding: str | None, choosable: bool = True) -> None:
        self._file = file
        self._name = name
        self._choosable = choosable
        start = file.read(_STEP)
        while start and len(start) < 4 and (more := file.read(4)):
            start += more
        mark, found = next(((mark, found) for mark, found in _MARKS if start.startswith(mark)), (b"", None))
        if not (found or encoding) and (likely := unmarked(start)):
            mend = f"try `encoding={likely}`" if choosable else "save it as UTF-8"
            raise UserError(f"{name} seems to be {likely.upper()} without a mark: {mend}")
        self._encoding = found or encoding or "utf-8"
        self._as_is = codecs.lookup(self._encoding).name == "utf-8"
        self._decoder = codecs.getincrementaldecoder(self._encoding)("strict")
        self._next = start[len(mark) :]
        self._started = False
        self._ended = False
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out and not self._ended:
            block = self._next or self._file.read(_STEP)
            self._next = b""
            self._ended = not block
            state = self._decoder.getstate()[0]
            try:
                text = self._decoder.decode(block, final=self._ended)
            except UnicodeError:
                raise self._refused(state + block) from None
            if self._as_is:  # all but a character that is not complete yet, without encoding it again
                whole = state + block
                self._out = memoryview(whole)[: len(whole) - len(self._decoder.getstate()[0])]
            else:
                self._out = memoryview(text.encode("utf-8", "replace"))
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count

    def _refused(self, block: bytes) -> UserError:
        wrong = 0

        def count(error: UnicodeError) -> tuple[str, int]:
            nonlocal wrong
            assert isinstance(error, UnicodeDecodeError)
            wrong += error.end - error.start
            return "", error.end

        codecs.register_error("waveletgpt-count", count)
        decoder = codecs.getincrementaldecoder(self._encoding)("waveletgpt-count")
        sample = block[:_SAMPLE]
        while block:
            decoder.decode(block)
            block = self._file.read(_STEP)
            # Guess from the lines that are not ASCII.
            sample += b"" if len(sample) >= _SAMPLE else block[: _SAMPLE - len(sample)]
        decoder.decode(b"", final=True)
        guess = _guess(b"\n".join(line for line in sample.splitlines() if not line.isascii()))
        if self._choosable:
            mend = f"try `encoding={guess}`" if guess else "name its encoding with `encoding`"
            mend += ", leave it out with `exclude`, or mend it"
        else:
            mend = f"save it as UTF-8{f' (it seems to be {guess})' if guess else ''}"
        return UserError(f"{self._name} has {wrong:,} bytes that are not {self._encoding.upper()}: {mend}")


def _guess(sample: bytes) -> str | None:
    import charset_normalizer

    if len(sample) - len(sample.translate(None, bytes(range(128, 256)))) < _ENOUGH:
        return None

    best = charset_normalizer.from_bytes(sample).best()
    if best is None or best.encoding in ("utf_8", "ascii"):
        return None
    # Of several encodings that give the same text, take the most common.
    return "cp1252" if "cp1252" in best.could_be_from_charset else best.encoding


def is_utf8(start: bytes) -> bool:
    """Whether a file with this start (and no mark) has letters outside ASCII that are all UTF-8."""
    if start.startswith(codecs.BOM_UTF8):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return not start.isascii()


def as_utf8(file: IO[bytes], name: str, encoding: str | None) -> IO[bytes]:
    """`file` as UTF-8 without a mark; messages call it `name`."""
    return io.BufferedReader(Utf8File(file, name, encoding), _STEP)


def decoded(content: bytes, name: str, encoding: str | None = None, choosable: bool = True) -> str:
    """A whole table as text, decoded as its mark says, else from `encoding`, else from UTF-8.

    Raises UserError as `Utf8File` does. `choosable`: whether the user can name an encoding.
    """
    return Utf8File(io.BytesIO(content), name, encoding, choosable).readall().decode()


class Peeked(io.RawIOBase):
    """A file whose beginning has been read already."""

    def __init__(self, start: bytes, file: IO[bytes]) -> None:
        self._start = memoryview(start)
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._start[: len(buffer)] or self._file.read(len(buffer))
        buffer[: len(block)] = block
        self._start = self._start[len(block) :]
        return len(block)
