"""Sound files with several joined streams, or with a length in the header that was never filled in.

Decoders read only the first stream and trust the length in its header, without a warning. This module cuts a file into
its streams, and fills in lengths that are missing because the file was written to a pipe.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22", re.DOTALL)
"""The beginning of a FLAC stream: its mark and the header of its first block."""
_MP3 = re.compile(rb"(?:Xing|Info)\x00\x00\x00[\x00-\x0f]", re.DOTALL)
"""Marks of the number of frames in the first frame of an MP3 stream, 36, 21 or 13 bytes after its start."""


def streams(path: Path) -> Iterator[Path | BinaryIO]:
    """The streams of a file in order: the path if the file is one complete stream, else parts of its bytes.

    Raises OSError if the file cannot be read.
    """
    if path.stat().st_size < 64:
        yield path
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        starts = _starts(data)
        if len(starts) > 1:
            for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
                yield io.BufferedReader(Part(data, start, end))
        elif lengths := _lengths(data):
            yield io.BufferedReader(Part(data, 0, len(data), lengths))
        else:
            yield path


class Part(io.RawIOBase):
    """The bytes of `data` from `start` to `end` as a file, without a copy. `instead` replaces some: {place: bytes}."""

    def __init__(self, data: mmap.mmap, start: int, end: int, instead: dict[int, bytes] | None = None) -> None:
        self._data, self._start, self._size = data, start, end - start
        self._instead = instead or {}
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        first, last = self._place, min(self._size, self._place + len(buffer))
        if last <= first:
            return 0
        block = bytearray(self._data[self._start + first : self._start + last])
        for place, changed in self._instead.items():
            for i, byte in enumerate(changed, place):
                if first <= i < last:
                    block[i - first] = byte
        buffer[: len(block)] = block
        self._place = last
        return len(block)


def _starts(data: mmap.mmap) -> list[int]:
    """Where the streams begin. Only one start if nothing is joined, or if the format is not one that can be split."""
    if data[:4] == b"OggS":
        return _ogg_links(data)
    if data[:4] == b"fLaC":
        return [match.start() for match in _FLAC.finditer(data)] or [0]
    if data[:3] == b"ID3" or (data[0] == 0xFF and data[1] & 0xE0 == 0xE0):
        return _mp3_files(data)
    return [0]


def _ogg_links(data: mmap.mmap) -> list[int]:
    """Starts of the links of a chained file: pages of type "begin of stream" after pages of other types (RFC 3533)."""
    starts, place, beginning = [0], 0, True
    while place + 27 <= len(data):
        if data[place : place + 4] != b"OggS":  # other bytes between the pages
            place = data.find(b"OggS", place)
            if place < 0:
                break
            continue
        begins = bool(data[place + 5] & 2)
        if begins and not beginning:
            starts.append(place)
        beginning = begins
        table = data[place + 27 : place + 27 + data[place + 26]]
        place += 27 + len(table) + sum(table)
    return starts


def _mp3_files(data: mmap.mmap) -> list[int]:
    """Starts of joined files, found by the frames that hold the length of each. A tag between two files stays with the
    first, whose decoder ignores it."""
    starts = []
    for match in _MP3.finditer(data):
        for offset in (36, 21, 13):
            start = match.start() - offset
            if start >= 0 and data[start] == 0xFF and data[start + 1] & 0xE0 == 0xE0:
                starts.append(start)
                break
    return [0, *starts[1:]] if starts else [0]


_UNKNOWN = (0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


def _lengths(data: mmap.mmap) -> dict[int, bytes]:
    """Replacements for lengths in a file's header that were never filled in: {place: bytes}; empty for other files."""
    if data[:4] == b"caff":
        return _caf_length(data)
    if data[:4] == b".snd" and data[8:12] == b"\0\0\0\0" and len(data) > 28:
        return {8: b"\xff\xff\xff\xff"}  # means "unknown"
    if data[:4] not in (b"RIFF", b"RF64") or data[8:12] != b"WAVE":
        return {}
    place, long = 12, 0
    while place + 8 <= len(data):
        name, size = data[place : place + 4], struct.unpack("<I", data[place + 4 : place + 8])[0]
        rest = len(data) - place - 8
        if name == b"ds64" and size >= 24:  # RF64 has its long lengths here
            long = place + 8
        if name == b"data":
            if data[:4] == b"RF64":
                told = struct.unpack("<Q", data[long + 8 : long + 16])[0] if long else rest
                if told not in _UNKNOWN and told <= rest:
                    return {}
                return {long: struct.pack("<QQ", len(data) - 8, rest)} if long else {}
            # Other chunks may follow an empty one; sound written to a pipe goes on to the end of the file.
            if size or not rest or re.fullmatch(rb"[A-Za-z0-9 ]{4}", data[place + 8 : place + 12]):
                return {}
            most = 0xFFFFFFFF
            return {4: struct.pack("<I", min(len(data) - 8, most)), place + 4: struct.pack("<I", min(rest, most))}
        place += 8 + size + size % 2
    return {}


def _caf_length(data: mmap.mmap) -> dict[int, bytes]:
    """Replaces the length by -1, which in Core Audio means that the sound goes on to the end of the file."""
    place = 8
    while place + 12 <= len(data):
        name, size = data[place : place + 4], struct.unpack(">q", data[place + 4 : place + 12])[0]
        if name == b"data" and size in (-1, 0):
            return {place + 4: struct.pack(">q", len(data) - place - 12)}
        if size < 0:
            break
        place += 12 + size
    return {}
