"""MIDI -> tokens -> MIDI within 5 ms and a step of velocity; what no model should say is repaired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.data.modalities.scores import Event, midi, note, piece, rows, tempo
from waveletgpt.data.modalities.events import END, EVENTS, OFF, SHIFT, VELOCITY, from_tokens, to_tokens
from waveletgpt.data.modalities.midi import FRAME, NOTES, read_midi, write_midi

pytest.importorskip("symusic")

HALF_A_FRAME = FRAME / 2 + 1e-9
STEP = 4
"""Velocities to one of the 32 steps."""


def played(events: list[Event], ticks: int = 480) -> list[tuple[float, float, int, int]]:
    """What a piano does with these events, one after the other; an oracle of times and pedal."""
    seconds, micros, last = 0.0, 500_000, 0
    down: dict[int, list[int]] = {}  # key -> its notes, the oldest first
    waiting: set[int] = set()  # notes that the pedal holds
    notes: list[list[Any]] = []
    pressed = False
    events = sorted(events, key=lambda event: event[0])
    for index, (when, event) in enumerate(events):
        seconds, last = seconds + (when - last) * micros / 1e6 / ticks, when
        kind = event[0] & 0xF0
        if event[0] == 0xFF:
            micros = int.from_bytes(bytes(event[3:]))
        elif kind == 0xB0:
            pressed = event[2] >= 64
        elif kind == 0x90:
            down.setdefault(event[1], []).append(len(notes))
            notes.append([seconds, seconds, event[1], event[2]])
        else:
            waiting.add(down[event[1]].pop(0))
        if index + 1 == len(events) or events[index + 1][0] != when:  # nothing else happens at this time
            for held in waiting:
                notes[held][1] = seconds
            if not pressed:
                waiting.clear()
    return [(start, end, pitch, velocity) for start, end, pitch, velocity in notes]


@pytest.mark.parametrize("seed", range(6))
def test_there_and_back(seed: int, tmp_path: Path) -> None:
    """Within half a frame of what a piano would play, from the first note to the last: rounding, and no drift."""
    events = piece(seed)
    notes = read_midi(midi(events))
    expected: dict[tuple[int, int], list[Any]] = {}
    for start, end, pitch, velocity in played(events):
        key = (pitch, round(start / FRAME))
        known = expected.setdefault(key, [start, end, velocity])
        known[1] = max(known[1], end)
        known[0], known[2] = max((known[2], known[0]), (velocity, start))[::-1]
    for (pitch, frame), row in expected.items():  # a key struck again ends the note before
        row[1] = min([row[1], *(other[0] for (p, f), other in expected.items() if p == pitch and f > frame)])
    assert len(notes) == len(expected) > 200
    tokens = to_tokens(notes)
    write_midi(from_tokens(tokens)[0], tmp_path / "back.mid")
    back = read_midi((tmp_path / "back.mid").read_bytes())
    assert len(back) == len(expected)
    for start, end, pitch, velocity in back.tolist():
        row = expected[pitch, round(start / FRAME)]
        assert abs(start - row[0]) <= HALF_A_FRAME
        assert abs(velocity - row[2]) < STEP
        # A note has at least one frame, and never touches the next of its key.
        assert abs(end - row[1]) <= HALF_A_FRAME or round((end - start) / FRAME) == 1
    assert np.array_equal(to_tokens(back), tokens)


def test_no_drift_over_an_hour(tmp_path: Path) -> None:
    starts = [round(i * 777.7) for i in range(4000)]
    events = [tempo(0, 499_999), *(event for i, when in enumerate(starts) for event in note(when, 400, 30 + i % 60))]
    notes, repaired = from_tokens(to_tokens(read_midi(midi(events))))
    assert not repaired
    assert notes["end"].max() > 3200
    times = np.array(starts) * 0.499_999 / 480
    assert np.abs(notes["start"] - times).max() <= HALF_A_FRAME
    assert np.abs(notes["end"] - notes["start"] - 400 * 0.499_999 / 480).max() <= FRAME


def test_the_events() -> None:
    notes = np.array([(0.0, 0.5, 60, 64), (0.0, 0.5, 64, 66), (2.5, 2.51, 60, 127)], NOTES)
    names = [EVENTS[token] for token in to_tokens(notes)]
    assert names == [
        *("velocity-16", "on-60", "velocity-17", "on-64", "wait-500ms", "off-60", "off-64"),
        *("wait-1000ms", "wait-1000ms", "velocity-32", "on-60", "wait-10ms", "off-60"),
    ]
    assert len(EVENTS) == END == 388
    assert to_tokens(notes[:0]).tolist() == []


tokens_strategy = st.lists(st.integers(-3, 392) | st.sampled_from([60, 60 + OFF, SHIFT, VELOCITY, END]), max_size=120)


@hypothesis_settings(max_examples=100, deadline=None)
@given(tokens_strategy)
def test_any_tokens_make_music(tokens: list[int]) -> None:
    notes, repaired = from_tokens(tokens)
    downs = sum(0 <= token < OFF for token in tokens)
    assert len(notes) == downs
    assert (notes["end"] > notes["start"]).all()
    assert sum(repaired.values()) <= 2 * len(tokens)
    again, other = from_tokens(to_tokens(notes))
    assert not other
    assert len(again) <= len(notes)


def test_repairs_are_counted() -> None:
    notes, repaired = from_tokens([60, SHIFT + 9, 60, OFF + 62, SHIFT + 9, OFF + 60, 64, OFF + 64, 999, 70, END, 71])
    assert repaired == {
        "keys struck while down": 1,
        "releases of keys that are up": 1,
        "notes without length": 3,
        "unknown tokens": 1,
        "keys left down": 2,
    }
    assert rows(notes)[:2] == [(0.0, 0.1, 60, 64), (0.1, 0.2, 60, 64)]
    assert from_tokens([])[1] == {}


def test_transposed_and_faster() -> None:
    notes = read_midi(midi([*note(0, 960, 60), *note(960, 960, 2)]))
    assert rows(from_tokens(to_tokens(notes, transpose=-3))[0]) == [(0, 1, 57, 63)]
    assert rows(from_tokens(to_tokens(notes, tempo=2.0))[0]) == [(0, 0.5, 60, 63), (0.5, 1, 2, 63)]
