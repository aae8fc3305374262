"""MIDI files written byte by byte: an oracle for what reads them."""

from __future__ import annotations

import random

import numpy as np

Event = tuple[int, list[int]]
"""Ticks since the beginning, and the bytes of a MIDI event."""


def number(value: int) -> bytes:
    """A MIDI number of variable length."""
    found = [value & 127]
    while value := value >> 7:
        found.append(value & 127 | 128)
    return bytes(reversed(found))


def midi(*tracks: list[Event], ticks: int = 480) -> bytes:
    """A MIDI file, written byte by byte: an oracle for what reads it."""
    out = b"MThd" + bytes([0, 0, 0, 6, 0, 1]) + len(tracks).to_bytes(2) + ticks.to_bytes(2)
    for events in tracks:
        body, last = b"", 0
        for when, event in sorted(events, key=lambda event: event[0]):
            body, last = body + number(when - last) + bytes(event), when
        body += b"\0\xff\x2f\0"
        out += b"MTrk" + len(body).to_bytes(4) + body
    return out


def tempo(when: int, micros: int) -> Event:
    return when, [0xFF, 0x51, 3, *micros.to_bytes(3)]


def note(when: int, length: int, pitch: int, velocity: int = 64, channel: int = 0) -> list[Event]:
    return [(when, [0x90 | channel, pitch, velocity]), (when + length, [0x80 | channel, pitch, 0])]


def off(when: int, pitch: int, channel: int = 0) -> Event:
    return when, [0x80 | channel, pitch, 0]


def pedal(when: int, value: int) -> Event:
    return when, [0xB0, 64, value]


def rows(notes: np.ndarray) -> list[tuple[float, float, int, int]]:
    return [(round(start, 6), round(end, 6), pitch, velocity) for start, end, pitch, velocity in notes.tolist()]


def piece(seed: int, count: int = 300) -> list[Event]:
    """Notes with tempo changes, pedal, and keys struck while they sound."""
    rng = random.Random(seed)
    events = [tempo(0, 512_347)]  # so that no time is halfway between two frames
    when = 0
    for _ in range(count):
        gap = rng.choice([0, 7, 60, 113, 480])
        when += gap
        events += note(when, rng.choice([1, 30, 200, 900, 3000]), rng.randrange(40, 60), rng.randrange(1, 128))
        if gap and rng.random() < 0.2:  # never twice at one time
            events.append(pedal(when + 3, rng.choice([0, 63, 64, 127])))
        if rng.random() < 0.1:
            events.append(tempo(when + 5, rng.randrange(200_000, 1_500_000)))
    return events
