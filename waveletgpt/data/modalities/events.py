"""The 388 events of the Music Transformer: notes as tokens, and any tokens as notes.

A piece is a sequence of events in real time, one event per token (Oore et al. 2018, https://arxiv.org/abs/1808.03715;
Huang et al. 2018, https://arxiv.org/abs/1809.04281; Hawthorne et al. 2018, https://arxiv.org/abs/1810.12247):

      0 .. 127   a key goes down          256 .. 355   time passes: 10 ms, 20 ms, ... 1 s
    128 .. 255   a key comes up           356 .. 387   keys that go down from now on do so with this velocity (of 32)
    388          `<|endoftext|>`, after every piece

Each time is rounded to the grid by itself, so that rounding errors do not add up. The sustain pedal becomes longer
notes: a key released while the pedal is down sounds until the pedal comes up or the key is struck again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from waveletgpt.data.modalities.midi import FRAME, NOTES

ON, OFF, SHIFT, VELOCITY, END = 0, 128, 256, 356, 388
"""The first token of each kind."""
LONGEST_SHIFT = 100
"""Longest single shift, in frames."""
VELOCITIES = 4
"""Number of MIDI velocities (1 .. 127) per step; there are 32 steps."""

EVENTS = [
    *(f"on-{key}" for key in range(128)),
    *(f"off-{key}" for key in range(128)),
    *(f"wait-{(frames + 1) * 10}ms" for frames in range(LONGEST_SHIFT)),
    *(f"velocity-{step + 1}" for step in range(32)),
]
"""The tokenizer's name of each token."""


def to_tokens(notes: np.ndarray, transpose: int = 0, tempo: float = 1.0) -> np.ndarray:
    """The events of `NOTES` on the grid, (T,) uint16, without the token that ends the piece.

    Notes are moved by `transpose` semitones (those outside the 128 keys are left out) and played `tempo` times as fast.
    Each note lasts at least one frame. At the same time, keys come up before others go down.
    """
    pitch = notes["pitch"].astype(np.int64) + transpose
    notes, pitch = notes[(pitch >= 0) & (pitch < 128)], pitch[(pitch >= 0) & (pitch < 128)]
    start = np.rint(notes["start"] / (FRAME * tempo)).astype(np.int64)
    end = np.rint(notes["end"] / (FRAME * tempo)).astype(np.int64)
    start, end, pitch, velocity = _apart(start, end, pitch, (notes["velocity"].astype(np.int64) - 1) // VELOCITIES)
    frame = np.concatenate([end, start])
    event = np.concatenate([pitch + OFF, pitch + ON])
    step = np.concatenate([np.full(len(end), -1), velocity])
    order = np.lexsort((event, step >= 0, frame))
    frame, event, step = frame[order], event[order], step[order]

    down = np.flatnonzero(step >= 0)
    changes = np.zeros(len(event), bool)
    changes[down] = np.diff(step[down], prepend=-1) != 0
    whole, rest = np.divmod(np.diff(frame, prepend=0), LONGEST_SHIFT)
    last = np.cumsum(whole + (rest > 0) + changes + 1) - 1  # the place of each event, after its shifts and its velocity
    tokens = np.full(last[-1] + 1 if len(last) else 0, SHIFT + LONGEST_SHIFT - 1, np.uint16)
    tokens[last] = event
    tokens[last[changes] - 1] = VELOCITY + step[changes]
    tokens[(last - changes - 1)[rest > 0]] = SHIFT + rest[rest > 0] - 1
    return tokens


def _apart(
    start: np.ndarray, end: np.ndarray, pitch: np.ndarray, velocity: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Notes in whole frames: each lasts at least one, and no two of a key sound at the same time."""
    order = np.lexsort((start, pitch))
    start, end, pitch, velocity = start[order], end[order], pitch[order], velocity[order]
    same = np.append(np.diff(pitch) == 0, False)
    following = np.append(start[1:], 0)
    keep = ~(same & (following == start))
    limit = np.where(same, following, np.iinfo(np.int64).max)
    end = np.minimum(np.maximum(end, start + 1), limit)
    return start[keep], end[keep], pitch[keep], velocity[keep]


def from_tokens(tokens: Sequence[int]) -> tuple[np.ndarray, Counter[str]]:
    """The `NOTES` of any sequence of tokens, and how often something was skipped, cut short or closed at the end."""
    repaired: Counter[str] = Counter()
    sounding: dict[int, tuple[int, int]] = {}
    notes: list[tuple[float, float, int, int]] = []
    frame = 0
    velocity = 64

    def close(pitch: int) -> None:
        start, loudness = sounding.pop(pitch)
        if start == frame:
            repaired["notes without length"] += 1
        notes.append((start * FRAME, max(frame, start + 1) * FRAME, pitch, loudness))

    for token in map(int, tokens):
        if ON <= token < OFF:
            if token in sounding:
                repaired["keys struck while down"] += 1
                close(token)
            sounding[token] = (frame, velocity)
        elif token < SHIFT and token >= OFF:
            if token - OFF in sounding:
                close(token - OFF)
            else:
                repaired["releases of keys that are up"] += 1
        elif SHIFT <= token < VELOCITY:
            frame += token - SHIFT + 1
        elif VELOCITY <= token < END:
            velocity = min(127, (token - VELOCITY) * VELOCITIES + VELOCITIES - 1)  # the middle of the step
        elif token == END:
            repaired["keys left down"] += len(sounding)
            for pitch in list(sounding):
                close(pitch)
        else:
            repaired["unknown tokens"] += 1
    repaired["keys left down"] += len(sounding)
    for pitch in list(sounding):
        close(pitch)
    found = np.array(notes, NOTES)
    return found[np.lexsort((found["pitch"], found["start"]))], +repaired
