"""Files of records with a column of text: JSON lines, CSV, TSV, Parquet. They are read one record at a time."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from waveletgpt.data.sources.archives import Stream, broken
from waveletgpt.data.sources.encodings import as_utf8, begin
from waveletgpt.errors import UserError, suggest

GUESSES = ("text", "content")
LONGEST = 1 << 28
"""The longest line, in bytes. A longer one is not of a table, and must not fill the memory."""

Row = tuple[str, str]
"""(name, text) of a record."""


def rows(
    stream: Stream, column: str | None, encoding: str | None = None, records: bool = False
) -> Iterator[Row] | None:
    """The records that have text in `column`; None if the file's name is not of a table.

    Tables of text are UTF-8, or in the encoding of their mark, or in `encoding`.
    `records`: the file is JSON with records (see `has_records`), whatever its name.

    Raises UserError for a missing column, and for a broken line, with its number.
    """
    suffix = "json" if records else stream.name.lower().rpartition(".")[2]
    reader = _READERS.get(suffix) if suffix != "json" or records else None
    if reader and suffix != "parquet":
        with broken(stream.name):
            stream = Stream(stream.name, as_utf8(stream.file, stream.name, encoding))
    return reader(stream, column) if reader else None


def has_records(start: bytes, column: str | None = None, encoding: str | None = None) -> bool:
    """Whether a JSON file with this start holds records: an array of objects, several objects, or one with a text.

    Any other JSON file is a text. A single object is a record if it has the `column`, or one of `GUESSES`.
    """
    text = begin(start, encoding).lstrip()
    if text.startswith("["):
        return text[1:].lstrip().startswith("{")
    try:
        record, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    names = GUESSES if column is None else (*GUESSES, column)
    return isinstance(record, dict) and (
        any(isinstance(record.get(name), str) for name in names) or text[end:].lstrip().startswith("{")
    )


def choose(name: str, column: str | None, columns: Sequence[str]) -> str:
    """The column of `name` to read: `column` if given, else the first of `GUESSES` that exists."""
    if column is None:
        found = next((guess for guess in GUESSES if guess in columns), None)
        if found is None:
            raise UserError(
                f"{name} has no column {' or '.join(GUESSES)} but {', '.join(columns)}: name one with `column`, "
                "or leave the file out with `exclude`"
            )
        return found
    if column not in columns and column.isdecimal() and int(column) < len(columns):
        return columns[int(column)]
    if column not in columns:
        raise UserError(f'{name} has no column "{column}" but {", ".join(columns)}{suggest(column, columns)}')
    return column


def headerless(row: Sequence[str], column: str | None) -> bool:
    """Whether a table's first row looks like data, with a number, a sentence or a repeated field.

    Names of columns are short words that differ.
    """
    if any(name in row for name in GUESSES) or row == [*map(str, range(len(row)))]:  # default names of unnamed columns
        return False
    if column is not None and column in row and not column.isdecimal():
        return False
    return len(set(row)) < len(row) or any(len(name) > 60 or name.count(" ") > 3 or _is_number(name) for name in row)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _shown(row: Sequence[str]) -> str:
    return ", ".join(f'"{field[:20]}..."' if len(field) > 20 else f'"{field}"' for field in row[:3])


def text_of(value: Any, name: str, column: str) -> str:
    """The text in a record; "" without a value."""
    if value is None or isinstance(value, str):
        return value or ""
    found = type(value).__name__
    raise UserError(f'{name}: column "{column}" holds {found}, not text: name another with `column`')


def _lines(stream: Stream) -> Iterator[str]:
    while True:
        with broken(stream.name):
            line = stream.file.readline(LONGEST + 1)
        if not line:
            return
        if len(line) > LONGEST:
            raise UserError(f"{stream.name} has a line of more than {LONGEST >> 20} MB: is it what its name says?")
        yield line.decode()


def _json_lines(stream: Stream, column: str | None) -> Iterator[Row]:
    for number, line in enumerate(_lines(stream), 1):
        if not line.strip():
            continue
        name = f"{stream.name} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} is not JSON ({error}): mend or remove it") from None
        if not isinstance(record, dict):
            raise UserError(f'{name} is not an object like {{"text": "..."}}: mend or remove it')
        chosen = choose(name, column, list(record))
        if text := text_of(record[chosen], name, chosen):
            yield name, text


class _Text:
    """A stream as text, read in parts: `text` from `place` on is in memory. Broken bytes raise UserError."""

    def __init__(self, stream: Stream) -> None:
        self.name, self._file, self._decode = stream.name, stream.file, codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.place, self.ended = "", 0, False

    def more(self) -> None:
        """Read at least as much again, so that a long record is not parsed over and over."""
        self.text, self.place = self.text[self.place :], 0
        with broken(self.name):
            block = self._file.read(max(1 << 16, len(self.text)))
        self.text, self.ended = self.text + self._decode(block, final=not block), not block
        if len(self.text) > LONGEST:
            raise UserError(f"{self.name} has a record of more than {LONGEST >> 20} MB: is it what its name says?")

    def next(self, passed: str = " \t\r\n") -> str:
        """The next character that is not in `passed`; "" at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in passed:
                self.place += 1
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self.more()


def _json_values(stream: Stream, column: str | None) -> Iterator[Row]:
    """The objects of an array, or one after the other, with any line breaks."""
    text, decode, number = _Text(stream), json.JSONDecoder().raw_decode, 0
    in_array = text.next() == "["
    text.place += in_array
    while (following := text.next()) and not (in_array and following == "]"):
        number += 1
        name = f"{stream.name} record {number}"
        if in_array and number > 1:
            if following != ",":
                raise UserError(f"{name} is not JSON (no comma before it): mend or remove it")
            text.place += 1
            text.next()
        while True:
            try:
                record, text.place = decode(text.text, text.place)
                break
            except (ValueError, RecursionError) as error:
                if text.ended or isinstance(error, RecursionError):
                    raise UserError(f"{name} is not JSON ({error}), or the file is truncated: mend it") from None
            text.more()
        if not isinstance(record, dict):
            raise UserError(f'{name} is not an object like {{"text": "..."}}: mend or remove it')
        chosen = choose(name, column, list(record))
        if found := text_of(record[chosen], name, chosen):
            yield name, found
    if in_array and not following:
        raise UserError(f"{stream.name} is truncated, the end of its array is missing: get it again")
    text.place += in_array
    if text.next():
        raise UserError(f"{stream.name} goes on after the end of its array: make one array of it, or JSON lines")


def _long_fields(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The rows of a csv.reader, with fields as long as lines may be. The limit of the process is restored."""
    while True:
        before = csv.field_size_limit(LONGEST)
        try:
            row = next(reader, None)
        finally:
            csv.field_size_limit(before)
        if row is None:
            return
        yield row


def _separated(separator: str) -> Callable[[Stream, str | None], Iterator[Row]]:
    def read(stream: Stream, column: str | None) -> Iterator[Row]:
        # In TSV nothing is quoted: a quote is a character.
        reader = csv.reader(
            _lines(stream), delimiter=separator, strict=True,
            quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL,
        )  # fmt: skip
        chosen = ""
        index = -1
        try:
            for row in _long_fields(reader):
                name = f"{stream.name} line {reader.line_num}"
                if not row:
                    continue
                if index < 0:
                    if headerless(row, column):
                        if column is None or not column.isdecimal():
                            raise UserError(
                                f"{stream.name} seems to have no header, its first row is {_shown(row)}: choose one of "
                                f"its {len(row)} columns by position, `column=0 ... {len(row) - 1}`, or add a header"
                            )
                        if int(column) >= len(row):
                            raise UserError(f"{stream.name} has no column {column}: give 0 ... {len(row) - 1}")
                        index, chosen = int(column), column
                    elif column is not None and column not in row and column.isdecimal() and int(column) < len(row):
                        index, chosen = int(column), column
                        continue
                    else:
                        chosen = choose(stream.name, column, row)
                        index = row.index(chosen)
                        continue
                if len(row) <= index:
                    raise UserError(f'{name} has {len(row)} fields, too few for the column "{chosen}": mend it')
                if row[index]:
                    yield name, row[index]
        except csv.Error as error:
            raise UserError(f"{stream.name} line {reader.line_num} is broken ({error}): mend or remove it") from None

    return read


def _parquet(stream: Stream, column: str | None) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{stream.name}: Parquet needs pyarrow: pip install 'waveletgpt[hub]'") from None
    if not stream.file.seekable():
        raise UserError(f"{stream.name} is Parquet inside an archive: unpack it first")
    number = 0
    try:
        file = parquet.ParquetFile(stream.file)
        chosen = choose(stream.name, column, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=1024, columns=[chosen]):
            for value in batch.column(0).to_pylist():
                number += 1
                name = f"{stream.name} row {number}"
                if text := text_of(value, name, chosen):
                    yield name, text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        stream.file.seek(0)
        begins = stream.file.read(4) == b"PAR1"
        stream.file.seek(-min(4, stream.file.seek(0, io.SEEK_END)), io.SEEK_END)
        if begins and stream.file.read(4) not in (b"PAR1", b"PARE"):
            raise UserError(f"{stream.name} is truncated, its end is missing: get it again") from error
        raise UserError(f"{stream.name} is broken ({reason}): get it again") from error


_READERS: dict[str, Callable[[Stream, str | None], Iterator[Row]]] = {
    "jsonl": _json_lines,
    "ndjson": _json_lines,
    "json": _json_values,
    "csv": _separated(","),
    "tsv": _separated("\t"),
    "parquet": _parquet,
}
