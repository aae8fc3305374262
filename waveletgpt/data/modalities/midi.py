"""Notes of MIDI files: read, written, heard and drawn.

The library symusic parses a file and its tempos. Which channel a note is on, when a pedal lets it go and what ends a
note that no event ended is read here, because symusic does not say.
"""

from __future__ import annotations

import bisect
import io
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from waveletgpt.data.modalities.modality import Unusable
from waveletgpt.errors import UserError

log = logging.getLogger(__name__)

NOTES = np.dtype([("start", "<f8"), ("end", "<f8"), ("pitch", "u1"), ("velocity", "u1")])
"""Notes of a piece: seconds, key 0 .. 127, velocity 1 .. 127; in the order of their starts, then keys."""
FRAME = 0.01
"""Seconds in which notes of one key count as one: the grid of the tokens."""
HOURS = 24
"""Longer pieces are skipped: a few bytes can claim years of silence."""
RENDER_SECONDS = 120
"""Seconds that rendering a sample may take."""


def library() -> Any:
    """The module symusic; raises UserError if it is not installed."""
    try:
        import symusic
    except ImportError:
        raise UserError("music needs the library symusic: pip install 'waveletgpt[music]'") from None
    return symusic


def read_midi(data: bytes) -> np.ndarray:
    """The notes of a MIDI file, as `NOTES`: all tracks but percussion, with tempo map and sustain pedal.

    A pedal holds the notes of its channel on all tracks. A note without an end lasts until its channel is silenced
    (controllers 120 and 123 to 127), its key comes up on another track, or its own track ends. If notes of one key
    start together, the loudest counts. If a key is struck while it sounds, the note before ends.
    Raises Unusable if it is broken, too long, or has no notes.
    """
    data = _unwrapped(data)
    if not data.startswith(b"MThd"):
        raise Unusable("not a MIDI file")
    data = _checked(data)
    try:
        score = library().Score.from_midi(data)
        tempos = score.tempos.numpy() if len(score.tempos) else {"time": np.empty(0), "mspq": np.empty(0)}
        parts = _channels(data)
        per_quarter = score.ticks_per_quarter
    except UserError:
        raise
    # For broken files the parser raises RuntimeError, and sometimes ValueError and others.
    except Exception as error:
        raise Unusable(f"broken ({str(error) or type(error).__name__})") from error
    if not parts:
        raise Unusable("no notes in it")
    if per_quarter < 1:
        raise Unusable("broken (no ticks in a quarter note)")
    clock = _TempoMap(per_quarter, tempos)
    notes = np.concatenate([_played(keys, clock, controls) for keys, controls in parts])
    if notes["end"].max() > HOURS * 3600:
        raise Unusable(f"longer than {HOURS} hours")
    return _one_sound_a_key(notes)


def _unwrapped(data: bytes) -> bytes:
    """The MIDI file inside a RIFF file of type RMID (.rmi, and often .mid); any other data as it is."""
    for _ in range(4):  # some files are wrapped twice
        if data[:4] != b"RIFF" or data[8:12] != b"RMID":
            return data
        place, inner = 12, b""
        while place + 8 <= len(data) and not inner:
            name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
            if name == b"data":
                inner = data[place + 8 :][: size or None]  # a file written to a pipe has no size
            place += 8 + size + size % 2  # chunks begin at even places
        if not inner:
            raise Unusable("broken (a RIFF file without MIDI data)")
        data = inner
    raise Unusable("broken (RIFF in RIFF)")


def _checked(data: bytes) -> bytes:
    """A MIDI file whose tracks sound together, with a header of the usual length.

    Raises Unusable for joined files, and for type 2, whose tracks are separate pieces.
    """
    size = int.from_bytes(data[4:8], "big")
    if data[8:10] == b"\0\2" and int.from_bytes(data[10:12], "big") > 1:
        raise Unusable("of type 2, whose tracks are pieces of their own: save each as a file")
    place = 8 + size
    while place + 8 <= len(data):
        if data[place : place + 4] == b"MThd":
            raise Unusable("several MIDI files joined: split them")
        place += 8 + int.from_bytes(data[place + 4 : place + 8], "big")
    return data if size <= 6 else data[:4] + b"\0\0\0\6" + data[8:14] + data[8 + size :]


PERCUSSION = 9
"""The channel whose keys are drums."""
SILENCING = (120, *range(123, 128))
"""Controllers that end all notes of their channel."""


def _channels(data: bytes) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Notes and pedals of each channel that has notes, all tracks together, in ticks.

    symusic has read the file before, but it gives neither channels nor notes without an end.
    """
    notes: dict[int, list[tuple[int, int, int, int]]] = {}
    pedals: dict[int, list[tuple[int, int, int]]] = {}
    ups: dict[tuple[int, int], list[int]] = {}  # where a key comes up that is not down on the same track
    left: list[tuple[int, int, int, int, int]] = []  # start, end of the track, channel, key, velocity
    for track in _tracks(data):
        sounding: dict[tuple[int, int], list[tuple[int, int]]] = {}
        tick = 0
        for tick, status, first, second in _messages(track):
            kind, channel = status >> 4, status & 15
            if channel == PERCUSSION:
                continue
            if kind == 0x9 and second:
                sounding.setdefault((channel, first), []).append((tick, second))
            elif kind in (0x8, 0x9) and sounding.get((channel, first)):
                start, velocity = sounding[channel, first].pop(0)
                notes.setdefault(channel, []).append((start, tick - start, first, velocity))
            elif kind in (0x8, 0x9):
                ups.setdefault((channel, first), []).append(tick)
            elif kind == 0xB and first in SILENCING:
                for key in [key for of, key in sounding if of == channel]:
                    ended = sounding.pop((channel, key))
                    notes.setdefault(channel, []).extend((start, tick - start, key, loud) for start, loud in ended)
            elif kind == 0xB and first in (64, 121):  # 121 resets controllers
                pedals.setdefault(channel, []).append((tick, 64, second if first == 64 else 0))
        left += [(start, tick, *key, loud) for key, held in sounding.items() for start, loud in held]
    for start, end, channel, key, velocity in sorted(left):
        others = ups.get((channel, key), [])
        others.sort()
        following = bisect.bisect_right(others, start)
        stop = others.pop(following) if following < len(others) else end
        notes.setdefault(channel, []).append((start, stop - start, key, velocity))
    return [
        (
            dict(zip(("time", "duration", "pitch", "velocity"), np.array(played, np.int64).T, strict=True)),
            dict(
                zip(
                    ("time", "number", "value"),
                    np.array(pedals.get(channel, []), np.int64).reshape(-1, 3).T,
                    strict=True,
                )
            ),
        )
        for channel, played in sorted(notes.items())
    ]


def _tracks(data: bytes) -> Iterator[bytes]:
    """The track chunks of a MIDI file."""
    place = 0
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "big")
        if data[place : place + 4] == b"MTrk":
            yield data[place + 8 : place + 8 + size]
        place += 8 + size


def _messages(track: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(tick, status, first, second) of a track's channel messages, and a last one of status 0 at its end.

    Source: Standard MIDI Files 1.0. Raises IndexError if the track breaks off.
    """
    place = tick = running = 0

    def number() -> int:
        nonlocal place
        value = 0
        while True:
            byte = track[place]
            place += 1
            value = value << 7 | byte & 0x7F
            if byte < 0x80:
                return value

    while place < len(track):
        tick += number()
        status = track[place]
        if status >= 0xF0:
            place += 1
            if status == 0xFF:
                place += 1
                if track[place - 1] == 0x2F:
                    break
                size = number()
                place += size
            elif status in (0xF0, 0xF7):
                size = number()
                place += size
            else:
                place += {0xF1: 1, 0xF2: 2, 0xF3: 1}.get(status, 0)
            continue
        if status >= 0x80:
            running = status
            place += 1
        elif not running:
            raise IndexError("data before the first status")
        first = track[place]
        two = running >> 4 not in (0xC, 0xD)
        second = track[place + 1] if two else 0
        place += 1 + two
        yield tick, running, first & 0x7F, second & 0x7F
    yield tick, 0, 0, 0


class _TempoMap:
    """Converts ticks to seconds with a score's tempo map."""

    def __init__(self, per_quarter: int, tempos: dict[str, np.ndarray]) -> None:
        order = np.argsort(tempos["time"], kind="stable")
        self._ticks = np.concatenate([[0], tempos["time"][order]]).astype(np.float64)
        self._rates = np.concatenate([[500_000], tempos["mspq"][order]]) / (1e6 * per_quarter)
        self._seconds = np.concatenate([[0], np.cumsum(np.diff(self._ticks) * self._rates[:-1])])

    def __call__(self, ticks: np.ndarray) -> np.ndarray:
        if len(ticks) and ticks.min() < 0:
            raise Unusable("broken (negative times)")
        last = np.searchsorted(self._ticks, ticks, "right") - 1
        return self._seconds[last] + (ticks - self._ticks[last]) * self._rates[last]


def _played(keys: dict[str, np.ndarray], clock: _TempoMap, controls: dict[str, np.ndarray]) -> np.ndarray:
    """The notes of one track in seconds. Notes released while the pedal is down last until it comes up."""
    notes = np.empty(len(keys["time"]), NOTES)
    notes["pitch"], notes["velocity"] = np.clip(keys["pitch"], 0, 127), np.clip(keys["velocity"], 1, 127)
    starts = keys["time"].astype(np.int64)
    ends = starts + keys["duration"]
    pedal = controls["number"] == 64
    order = np.argsort(controls["time"][pedal], kind="stable")
    times, down = controls["time"][pedal][order].astype(np.int64), (controls["value"][pedal] >= 64)[order]
    if len(times):
        # For each release: whether the pedal is down then, and when it next comes up (or the track ends).
        state = np.searchsorted(times, ends, "right") - 1
        ups = np.append(times[~down], max(ends.max(), times[-1]))
        lifted = ups[np.searchsorted(ups[:-1], ends, "right")]
        ends = np.where((state >= 0) & down[np.maximum(state, 0)], np.maximum(ends, lifted), ends)
    notes["start"], notes["end"] = clock(starts), clock(ends)
    return notes


def _one_sound_a_key(notes: np.ndarray) -> np.ndarray:
    """End each note where its key is struck again. Of notes of one key in the same frame, keep one."""
    frames = np.rint(notes["start"] / FRAME)
    notes = notes[np.lexsort((notes["velocity"], frames, notes["pitch"]))]
    frames = np.rint(notes["start"] / FRAME)
    new = np.append(True, (np.diff(notes["pitch"].astype(int)) != 0) | (np.diff(frames) != 0))
    ends = np.maximum.reduceat(notes["end"], np.flatnonzero(new))
    notes = notes[np.append(np.flatnonzero(new)[1:], len(notes)) - 1]
    struck = np.append(notes["start"][1:], np.inf)
    struck[np.flatnonzero(np.diff(notes["pitch"]))] = np.inf
    notes["end"] = np.minimum(ends, struck)
    return notes[np.lexsort((notes["pitch"], notes["start"]))]


def write_midi(notes: np.ndarray, path: Path) -> None:
    """Write `NOTES` as a piano's MIDI file with a tick per millisecond."""
    symusic = library()
    score = symusic.Score(500)  # at 120 quarters a minute
    track = symusic.Track(program=0, name="piano")
    start = np.rint(notes["start"] * 1000).astype(np.int32)
    track.notes = symusic.Note.from_numpy(
        time=start,
        duration=np.rint(notes["end"] * 1000).astype(np.int32) - start,
        pitch=notes["pitch"].astype(np.int8),
        velocity=notes["velocity"].astype(np.int8),
        ttype="tick",
    )
    score.tracks.append(track)
    score.tempos.append(symusic.Tempo(0, 120))
    path.write_bytes(score.dumps_midi())


def render(path: Path, font: str | None = None) -> Path | None:
    """Write the sound of a MIDI file beside it, as WAV; None without fluidsynth or a sound font.

    The font is `font`, $SOUNDFONT, or one of the system's. Errors of fluidsynth are logged, not raised, because the
    MIDI file is enough.
    """
    program = shutil.which("fluidsynth")
    font = font or os.environ.get("SOUNDFONT") or next((str(file) for file in _fonts()), None)
    if not (program and font):
        return None
    target = path.with_suffix(".wav")
    command = [program, "-ni", "-q", "-r", "44100", "-F", str(target.resolve()), font, str(path.resolve())]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=RENDER_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s could not be rendered: %s", path, error)
        target.unlink(missing_ok=True)
        return None
    return target if target.is_file() else None


def _fonts() -> list[Path]:
    folders = [Path("/usr/share/sounds/sf2"), Path("/usr/share/sounds/sf3"), Path("/usr/share/soundfonts")]
    return [file for folder in folders for file in sorted(folder.glob("*.sf[23]"))]


def picture(path: Path) -> bytes:
    """The piano roll of a MIDI file as PNG: keys over seconds, louder notes darker."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    try:
        notes = read_midi(path.read_bytes())
    except Unusable:  # a sample may have no notes
        notes = np.empty(0, NOTES)
    figure = Figure(figsize=(8, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    lines = [[(note["start"], note["pitch"]), (note["end"], note["pitch"])] for note in notes]
    roll = LineCollection(lines, linewidths=2.5, capstyle="butt", cmap="Blues")
    roll.set_array(notes["velocity"].astype(float))
    roll.set_clim(-40, 127)
    axes.add_collection(roll)
    low, high = (int(notes["pitch"].min()), int(notes["pitch"].max())) if len(notes) else (48, 72)
    octaves = range(low // 12 * 12, high + 13, 12)
    axes.set(xlim=(0, float(notes["end"].max(initial=1.0))), ylim=(low - 2, high + 2), xlabel="seconds", ylabel="key")
    axes.set_yticks(list(octaves), [f"C{octave // 12 - 1}" for octave in octaves])
    axes.set_ylim(low - 2, high + 2)
    axes.grid(axis="y", alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
