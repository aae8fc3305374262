"""What stands in a MIDI file is read as a piano plays it; what no file should hold is named."""

from __future__ import annotations

import os
import resource
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.data.modalities.scores import Event, midi, note, off, pedal, piece, rows, tempo
from tests.processes import begin
from waveletgpt.data.modalities.events import from_tokens, to_tokens
from waveletgpt.data.modalities.midi import NOTES, Unusable, read_midi, render, write_midi

pytest.importorskip("symusic")


def test_what_stands_in_a_file() -> None:
    events = [tempo(0, 1_000_000), *note(480, 240, 60, 100), tempo(960, 250_000), *note(960, 480, 64, 1)]
    assert rows(read_midi(midi(events))) == [(1.0, 1.5, 60, 100), (2.0, 2.25, 64, 1)]
    assert rows(read_midi(midi(note(0, 96, 1), ticks=96))) == [(0.0, 0.5, 1, 64)]  # 120 quarters a minute if not said
    assert rows(read_midi(midi(note(0, 480, 60), note(0, 480, 62), [tempo(0, 250_000)]))) == [
        (0.0, 0.25, 60, 64),
        (0.0, 0.25, 62, 64),
    ]


def test_pedal() -> None:
    """Released under the pedal, a key sounds until that comes up, is struck again, or the track ends."""
    second = 960
    keys = [*note(0, second, 60), *note(0, 3 * second, 62), *note(4 * second, second, 60)]
    up = read_midi(midi([*keys, pedal(100, 127), pedal(2 * second, 0)]))
    assert rows(up) == [(0, 2, 60, 64), (0, 3, 62, 64), (4, 5, 60, 64)]
    never = read_midi(midi([*keys, pedal(100, 64)]))
    assert rows(never) == [(0, 4, 60, 64), (0, 5, 62, 64), (4, 5, 60, 64)]
    assert rows(read_midi(midi([*keys, pedal(100, 63)]))) == rows(read_midi(midi(keys)))
    other = [(100, [0xB1, 64, 127]), *note(0, 480, 70, channel=1)]  # the pedal of another instrument
    assert [row for row in rows(read_midi(midi(keys, other))) if row[2] != 70] == rows(read_midi(midi(keys)))


def test_percussion_is_left_out() -> None:
    drums = note(0, 100, 35, channel=9)
    assert rows(read_midi(midi([*drums, *note(0, 960, 60)]))) == [(0, 1, 60, 64)]
    with pytest.raises(Unusable, match="no notes"):
        read_midi(midi(drums))


@hypothesis_settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pedals_hold_their_channel_and_notes_without_an_end_last(data: st.DataObject) -> None:
    """Random keys on several tracks and channels, pedals on any track, some keys never released: against an oracle."""
    ending = 5000
    tracks: list[list[tuple[int, list[int]]]] = [[] for _ in range(3)]
    pedals: dict[int, list[tuple[int, bool]]] = {0: [], 1: []}
    for channel in (0, 1):
        times = data.draw(st.lists(st.integers(1, ending - 1), max_size=4, unique=True).map(sorted))
        for i, tick in enumerate(times):
            pedals[channel].append((tick, i % 2 == 0))
            tracks[data.draw(st.integers(0, 2))].append((tick, [0xB0 | channel, 64, 127 * (i % 2 == 0)]))
    wanted = []
    keys = data.draw(st.lists(st.integers(20, 100), min_size=1, max_size=6, unique=True))
    for key in keys:
        channel, track = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 2))
        start = data.draw(st.integers(0, ending - 200))
        end = data.draw(st.none() | st.integers(start + 20, ending))
        tracks[track].append((start, [0x90 | channel, key, 64]))
        if end is not None:
            tracks[track].append((end, [0x80 | channel, key, 0]))
        released = ending if end is None else end
        down = [is_down for tick, is_down in pedals[channel] if tick <= released]
        if down and down[-1]:
            ups = [tick for tick, is_down in pedals[channel] if tick > released and not is_down]
            released = ups[0] if ups else None  # to the end of the channel
        wanted.append((start, released, key))
    for track in tracks:
        track.sort(key=lambda event: event[0])
        track.append((ending, [0xB0, 1, 0]))  # so that all end here
    found = {int(note["pitch"]): note for note in read_midi(midi(*tracks, ticks=500))}  # a tick is a millisecond
    assert sorted(found) == sorted(keys)
    for start, released, key in wanted:
        assert found[key]["start"] == pytest.approx(start / 1000, abs=1e-6)
        if released is not None:
            assert found[key]["end"] == pytest.approx(released / 1000, abs=1e-6)
        else:
            assert found[key]["end"] > found[key]["start"]


@pytest.mark.parametrize(
    ("tracks", "seconds"),
    [
        # 480 ticks are half a second.
        ([[(0, [0x90, 60, 64]), (1920, [0xB0, 1, 0])], [off(480, 60)]], 0.5),  # its key comes up on another track
        ([[(0, [0x90, 60, 64]), (1920, [0xB0, 1, 0])], [off(480, 60, channel=1)]], 2.0),
        ([[(0, [0x90, 60, 64]), (480, [0xB0, 123, 0]), (1920, [0xB0, 1, 0])]], 0.5),  # all notes off
        ([[(0, [0x90, 60, 64]), (480, [0xB0, 120, 0]), (1920, [0xB0, 1, 0])]], 0.5),  # all sound off
        ([[pedal(0, 127), *note(0, 240, 60), (480, [0xB0, 121, 0]), pedal(1920, 0)]], 0.5),  # controllers as they were
    ],
)
def test_what_ends_a_note_that_no_one_ended(tracks: list[list[Event]], seconds: float) -> None:
    assert rows(read_midi(midi(*tracks))) == [(0.0, seconds, 60, 64)]


def test_files_that_hold_several_pieces_are_named() -> None:
    one = midi(note(0, 480, 60))
    with pytest.raises(Unusable, match="several MIDI files joined"):
        read_midi(one + midi(note(0, 480, 72)))
    two = bytearray(midi(note(0, 480, 60), note(0, 480, 72)))
    two[9] = 2
    with pytest.raises(Unusable, match="of type 2"):
        read_midi(bytes(two))


def test_headers_as_they_are_found() -> None:
    one = midi(note(0, 480, 60))
    expected = rows(read_midi(one))
    assert rows(read_midi(one[:7] + b"\x08" + one[8:14] + b"\0\0" + one[14:])) == expected  # longer than usual
    wrapped = b"RIFF\0\0\0\0RMIDdata" + len(one).to_bytes(4, "little") + one
    twice = b"RIFF\0\0\0\0RMIDdata" + len(wrapped).to_bytes(4, "little") + wrapped
    piped = b"RIFF\0\0\0\0RMIDdata\0\0\0\0" + one
    for data in (wrapped, twice, piped):
        assert rows(read_midi(data)) == expected


@given(before=st.binary(max_size=9), after=st.binary(max_size=9))
def test_midi_inside_riff_is_read(before: bytes, after: bytes) -> None:
    """With other chunks around, of odd length too."""
    notes = np.array([(0.0, 0.5, 60, 80), (0.5, 1.25, 64, 90)], NOTES)
    with tempfile.TemporaryDirectory() as folder:
        write_midi(notes, Path(folder) / "a.mid")
        midi = (Path(folder) / "a.mid").read_bytes()

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) % 2)

    inside = b"RMID" + chunk(b"LIST", before) + chunk(b"data", midi) + chunk(b"DISP", after)
    np.testing.assert_array_equal(read_midi(b"RIFF" + len(inside).to_bytes(4, "little") + inside), read_midi(midi))
    with pytest.raises(Unusable, match="without MIDI data"):
        read_midi(b"RIFF" + (4).to_bytes(4, "little") + b"RMID" + chunk(b"LIST", before))


SMALL = midi(piece(2, 8))


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_files(data: st.DataObject) -> None:
    """Whatever a file holds: notes in order and bounds, or a reason."""
    if data.draw(st.booleans()):
        content = bytearray(SMALL)
        for _ in range(data.draw(st.integers(0, 10))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    else:
        one = st.integers(0, 255).map(lambda b: [b])
        events = one | st.just([0x90, 60, 64]) | st.just([0x80, 60, 0]) | st.just([0xFF, 0x51, 3, 255, 255, 255])
        delta = st.sampled_from([b"\0", b"\x10", b"\xff\xff\xff\x7f"])
        body = b"".join(d + bytes(e) for d, e in data.draw(st.lists(st.tuples(delta, events), max_size=40)))
        ticks = data.draw(st.integers(0, 65535)).to_bytes(2)
        size = len(body) + data.draw(st.sampled_from([0, 0, 0, 1, 1000, 2**31]))
        content = bytearray(b"MThd\0\0\0\6\0\0\0\1" + ticks + b"MTrk" + size.to_bytes(4) + body)
    try:
        notes = read_midi(bytes(content))
    except Unusable:
        return
    assert len(notes)
    assert (notes["start"] >= 0).all()
    assert (np.diff(notes["start"]) >= 0).all()
    assert (notes["velocity"] >= 1).all()
    tokens = to_tokens(notes)
    assert len(tokens) <= 4 * len(notes) + 24 * 3600
    assert not from_tokens(tokens)[1]


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, the least of three: what else the machine does takes none."""
    taken = []
    for _ in range(3):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def test_time_grows_as_the_notes_do() -> None:
    """Ten times the notes take ten times as long, not a hundred."""
    files = [many_notes(thousands) for thousands in (10, 100)]
    few, many = (seconds(lambda data=data: to_tokens(read_midi(data))) for data in files)  # type: ignore[misc]
    assert many < 25 * few


def many_notes(thousands: int) -> bytes:
    """A MIDI file of so many thousand notes, one after the other."""
    one = b"\0\x90\x3c\x40\x05\x80\x3c\0"
    body = b"".join(one[:2] + bytes([i % 100 + 10]) + one[3:6] + bytes([i % 100 + 10]) + one[7:] for i in range(1000))
    body = body * thousands + b"\0\xff\x2f\0"
    return b"MThd\0\0\0\6\0\0\0\1\1\xe0MTrk" + len(body).to_bytes(4) + body


def test_a_million_notes(tmp_path: Path) -> None:
    """Some hundred megabytes, not gigabytes; of a process, since tracing every allocation takes most of a minute."""
    process = begin(read_a_million, tmp_path / "found", out=tmp_path / "out", err=tmp_path / "err")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    notes, tokens, more = map(int, (tmp_path / "found").read_text().split())
    assert notes == 1_000_000
    assert tokens < 4_000_000
    assert more < 500e6


def read_a_million(found: Path) -> None:
    """Writes the numbers of notes and tokens, and by how many bytes the most memory this process had has grown."""
    data = many_notes(1000)
    before = most_memory()
    notes = read_midi(data)
    tokens = to_tokens(notes)
    found.write_text(f"{len(notes)} {len(tokens)} {most_memory() - before}")


def most_memory() -> int:
    """The most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_rendering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fluidsynth and a font there is a WAV file too; without, silently not; its failures leave nothing behind."""
    path = tmp_path / "piece.mid"
    write_midi(np.array([(0, 1, 60, 64)], NOTES), path)
    font = tmp_path / "my font.sf2"
    font.write_bytes(b"font")
    monkeypatch.setenv("SOUNDFONT", str(font))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert render(path) is None
    program = tmp_path / "bin" / "fluidsynth"
    program.parent.mkdir()
    program.write_text(f'#!{sys.executable}\nimport sys\nopen(sys.argv[6], "w").write("|".join(sys.argv[7:]))\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    assert render(path) == path.with_suffix(".wav")
    assert path.with_suffix(".wav").read_text() == f"{font}|{path}"
    program.write_text(f'#!{sys.executable}\nimport sys\nopen(sys.argv[6], "w").write("half")\nsys.exit(1)\n')
    assert render(path) is None
    assert sorted(os.listdir(tmp_path)) == ["bin", "my font.sf2", "piece.mid"]
