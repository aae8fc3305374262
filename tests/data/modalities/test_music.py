"""MIDI -> tokens -> MIDI within 5 ms and a step of velocity; what no file should hold is skipped, what no model should
say is repaired."""

from __future__ import annotations

import io
import os
import random
import resource
import stat
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.processes import begin
from waveletgpt.data import MODALITIES, NAMED, SPLITS, DataSettings, NamedSet, TokenStore, prepare
from waveletgpt.data.modalities.music import (
    END,
    EVENTS,
    FRAME,
    MUSIC,
    NOTES,
    OFF,
    SHIFT,
    VELOCITY,
    Unusable,
    from_tokens,
    picture,
    read_midi,
    render,
    to_tokens,
    write_midi,
)
from waveletgpt.errors import UserError

pytest.importorskip("symusic")

Event = tuple[int, list[int]]
"""Ticks since the beginning, and the bytes of a MIDI event."""
HALF_A_FRAME = FRAME / 2 + 1e-9
STEP = 4
"""Velocities to one of the 32 steps."""


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


def test_repairs_are_counted(tmp_path: Path) -> None:
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
    sample = MUSIC.write_sample([60, SHIFT + 9, 60], None, tmp_path / "sample")
    assert (sample.kind, sample.path.name) == ("music", "sample.mid")
    assert len(read_midi(sample.path.read_bytes())) == 2
    assert picture(sample.path).startswith(b"\x89PNG")
    assert sample.repaired == "1 keys struck while down, 1 keys left down, 1 notes without length"
    silent = MUSIC.write_sample([END, 999], None, tmp_path / "silent")
    assert silent.repaired == "1 unknown tokens"
    assert picture(silent.path).startswith(b"\x89PNG")


def test_transposed_and_faster() -> None:
    notes = read_midi(midi([*note(0, 960, 60), *note(960, 960, 2)]))
    assert rows(from_tokens(to_tokens(notes, transpose=-3))[0]) == [(0, 1, 57, 63)]
    assert rows(from_tokens(to_tokens(notes, tempo=2.0))[0]) == [(0, 0.5, 60, 63), (0.5, 1, 2, 63)]


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    folder = tmp_path / "pieces"
    for index in range(40):
        path = folder / "ab"[index % 2] / f"{index}{('.mid', '.midi', '.kar')[index % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(midi(piece(index, 30)))
    return folder


def music(data: Path | str, cache: DataSettings, **changes: Any) -> TokenStore:
    chosen = DataSettings(**{"cache_dir": cache.cache_dir, **changes})
    return prepare(str(data), "music", chosen, progress=False)


def contents(store: TokenStore, split: str) -> list[bytes]:
    tokens = store.split(split)
    parts = np.split(tokens, np.flatnonzero(tokens == END) + 1)[:-1]
    return [part[:-1].tobytes() for part in parts]


def test_a_folder_of_pieces(pieces: Path, settings: DataSettings) -> None:
    for name in ("0.mid", "5.kar"):
        (pieces / f"copy-{name}").write_bytes(next(pieces.rglob(name)).read_bytes())
    store = music(pieces, settings)
    assert (store.vocab_size, store.modality, store.split("train").dtype) == (389, "music", np.uint16)
    found = {split: contents(store, split) for split in SPLITS}
    assert sum(map(len, found.values())) == 42
    assert all(found.values())
    assert not set(found["train"]) & {*found["validation"], *found["test"]}
    assert not set(found["validation"]) & set(found["test"])
    assert {part for parts in found.values() for part in parts} == {
        to_tokens(read_midi(path.read_bytes())).tobytes() for path in pieces.rglob("*.*")
    }
    tokenizer = store.load_tokenizer()
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == END == len(tokenizer) - 1
    assert tokenizer.decode([60, OFF + 60, SHIFT, VELOCITY]) == "on-60 off-60 wait-10ms velocity-1"
    assert tokenizer("on-60 wait-1000ms")["input_ids"] == [60, SHIFT + 99]


def test_copies_of_training_pieces_only(pieces: Path, settings: DataSettings) -> None:
    plain = music(pieces, settings)
    more = music(pieces, settings, transpose="-2,3", tempo_scale="1.05")
    assert plain.fingerprint != more.fingerprint
    assert contents(more, "validation") == contents(plain, "validation")
    assert contents(more, "test") == contents(plain, "test")
    assert len(contents(more, "train")) == 6 * len(contents(plain, "train"))
    assert contents(more, "train")[::6] == contents(plain, "train")
    assert len(set(contents(more, "train"))) == len(contents(more, "train"))


def test_few_pieces_stay_whole(tmp_path: Path, settings: DataSettings) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.mid").write_bytes(midi(piece(index, 20 + 400 * index)))
        if index == 1:
            with pytest.raises(UserError, match="has 2 pieces, too few different ones"):
                music(folder, settings)
    store = music(folder, settings)
    assert store.meta["split"] == "dealt"
    assert [len(contents(store, split)) for split in SPLITS] == [1, 1, 1]


def test_the_start_of_a_file_is_a_prompt(pieces: Path) -> None:
    path = next(pieces.rglob("0.mid"))
    whole = to_tokens(read_midi(path.read_bytes())).tolist()
    assert MUSIC.encode_prompt("", None) == [END]
    for seconds in (0.5, 2.0, 1000.0):
        prompt = MUSIC.encode_prompt(f"{path}@{seconds}", None)
        assert prompt == [END, *whole[: len(prompt) - 1]]
        assert from_tokens(prompt)[0]["start"].max() < seconds
    assert len(MUSIC.encode_prompt(str(path), None)) < len(whole)
    for wrong, message in ((f"{path}@x", "give the seconds after @"), (f"{path}@-1", "give the seconds"),
                           ("nowhere.mid", "no MIDI file"), (__file__, "not a MIDI file")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            MUSIC.encode_prompt(wrong, None)
    late = pieces / "late.mid"
    late.write_bytes(midi(note(96_000, 10, 60)))
    with pytest.raises(UserError, match="no note in its first 5 seconds"):
        MUSIC.encode_prompt(str(late), None)


def test_reports_go_on_from_the_beginnings_of_pieces(pieces: Path, settings: DataSettings) -> None:
    tokens = music(pieces, settings).split("train")
    whole = [np.frombuffer(piece, np.uint16).tolist() for piece in contents(music(pieces, settings), "train")]
    for count in (1, 3, len(whole), 2 * len(whole)):
        found = MUSIC.excerpts(tokens, count, None)
        assert len(found) == count
        chosen = [whole[i * len(whole) // count] for i in range(count)]
        assert [prompt[:60] for prompt in found] == [[END, *piece[:59]] for piece in chosen]
        assert max(map(len, found)) == 129


HUGE = 2**28 - 1
BAD = {
    "empty.mid": (b"", "not a MIDI file"),
    "film.mp4": (b"\0\0\0 ftypisom" * 1000, "not a MIDI file"),
    "cut.mid": (midi(piece(1))[:500], "broken"),
    "header.mid": (b"MThd\0\0\0\6\0\1\0\1\1\xe0", "no notes"),
    "silent.mid": (midi([tempo(0, 500_000)]), "no notes"),
    "frames.mid": (midi(note(0, 9, 60), ticks=0xE728), "broken"),
    "noticks.mid": (midi(note(0, 9, 60), ticks=0), "no ticks"),
    "years.mid": (midi([tempo(0, 16_000_000), *note(HUGE, 9, 60)], ticks=1), "longer than 24 hours"),
    "negative.mid": (
        midi([(HUGE * step, [0xB0, 1, step]) for step in range(1, 9)] + note(HUGE * 9, 9, 60)),
        "24 hours",
    ),
}


def test_what_is_no_music_is_skipped_and_named(pieces: Path, settings: DataSettings, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for name, (data, reason) in BAD.items():
        with pytest.raises(Unusable, match=reason):
            read_midi(data)
        (pieces / name).write_bytes(data)
        (bad / name).write_bytes(data)
    store = music(pieces, settings)
    assert store.meta["source"]["documents"] == 40
    assert store.meta["skipped"]["count"] == len(BAD)
    for name, (_, reason) in BAD.items():
        assert any(entry.startswith(f"{name}: ") and reason in entry for entry in store.meta["skipped"]["names"])
    with pytest.raises(UserError, match=r"no MIDI files in .*bad that can be used"):
        music(bad, settings)


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


def test_the_table_of_splits_in_other_encodings(tmp_path: Path, settings: DataSettings) -> None:
    home = tmp_path / "home"
    home.mkdir()
    rows = ["canonical_title,split,midi_filename"]
    for index in range(6):
        (home / f"{index}.mid").write_bytes(midi(piece(index, 20)))
        rows.append(f"Prélude,{SPLITS[index % 3]},2004/{index}.mid")
    (home / "notes.csv").write_bytes(b"name,about\nx,\xe9\xff\n")  # no table of splits
    table, cache = home / "table.csv", settings.cache_dir
    for encoding, chosen in (("utf-8", None), ("utf-16", None), ("cp1252", "cp1252")):
        table.write_text("\n".join(rows), encoding=encoding)
        store = prepare(home, "music", DataSettings(cache_dir=cache, encoding=chosen), progress=False)
        assert store.meta["split"] == "given"
        assert [store.meta["splits"][split]["documents"] for split in SPLITS] == [2, 2, 2]
    with pytest.raises(
        UserError, match=r"table\.csv has 6 bytes that are not UTF-8: name its encoding with `encoding`"
    ):
        prepare(home, "music", settings, progress=False)
    table.write_text("split,midi_filename\ntest," + "x" * 200_000)
    with pytest.raises(UserError, match=r"table\.csv is broken \(field larger"):
        prepare(home, "music", settings, progress=False)


def test_maestro_by_name(pieces: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table, which stands behind the files, gives the splits."""
    home = pieces.parent / "copies"
    home.mkdir()
    table = io.StringIO()
    table.write("canonical_composer,canonical_title,split,year,midi_filename\n")
    chosen = {f"{index}.midi": SPLITS[index % 3] for index in range(12)}
    with zipfile.ZipFile(home / "maestro-v3.0.0-midi.zip", "w") as archive:
        for index, (name, split) in enumerate(chosen.items()):
            archive.writestr(f"maestro-v3.0.0/2004/{name}", midi(piece(index, 20)))
            table.write(f'"Bach, J.S.",Fugue,{split},2004,2004/{name}\n')
        archive.writestr("maestro-v3.0.0/maestro-v3.0.0.csv", table.getvalue())
        archive.writestr("maestro-v3.0.0/LICENSE", "text")
    real = NAMED["maestro"]
    assert real.sha256 is not None
    file = "maestro-v3.0.0-midi.zip"
    monkeypatch.setitem(
        NAMED, "maestro", NamedSet("maestro", "", "music", "", "http://nowhere", file, include=real.include)
    )
    store = prepare("maestro", None, DataSettings(cache_dir=settings.cache_dir, data_dir=str(home)), progress=False)
    assert (store.modality, store.meta["split"], store.meta["skipped"]["count"]) == ("music", "given", 0)
    for split in SPLITS:
        wanted = [index for index in range(12) if chosen[f"{index}.midi"] == split]
        expected = {to_tokens(read_midi(midi(piece(index, 20)))).tobytes() for index in wanted}
        assert set(contents(store, split)) == expected


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transpose": "1.5"}, 'transpose is "1.5": give whole numbers from -60 to 60'),
        ({"transpose": "99"}, "give whole numbers from -60 to 60"),
        ({"tempo_scale": "fast"}, "give numbers from 0.25 to 4"),
        ({"tempo_scale": "0"}, "give numbers from 0.25 to 4"),
        ({"tempo_scale": "nan"}, "give numbers from 0.25 to 4"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataSettings(**changes)


def test_without_symusic(pieces: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "symusic", None)
    with pytest.raises(UserError, match=r"pip install 'waveletgpt\[music\]'"):
        music(pieces, settings)
    assert MODALITIES["music"] is MUSIC


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


def midi_of_tracks(tracks: list[list[tuple[int, list[int]]]]) -> bytes:
    """A file of type 1 with 500 ticks a quarter, a tick a millisecond, from (tick, message) of each track."""

    def number(value: int) -> bytes:
        parts = [value & 0x7F]
        while value := value >> 7:
            parts.append(value & 0x7F | 0x80)
        return bytes(reversed(parts))

    chunks = []
    for events in tracks:
        now, body = 0, b""
        for tick, message in events:
            body += number(tick - now) + bytes(message)
            now = tick
        chunks.append(b"MTrk" + len(body).to_bytes(4, "big") + body)
    head = b"MThd" + bytes([0, 0, 0, 6, 0, 1, 0, len(tracks)]) + (500).to_bytes(2, "big")
    return head + b"".join(chunks)


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
        track.append((ending, [0xFF, 0x2F, 0]))
    found = {int(note["pitch"]): note for note in read_midi(midi_of_tracks(tracks))}
    assert sorted(found) == sorted(keys)
    for start, released, key in wanted:
        assert found[key]["start"] == pytest.approx(start / 1000, abs=1e-6)
        if released is not None:
            assert found[key]["end"] == pytest.approx(released / 1000, abs=1e-6)
        else:
            assert found[key]["end"] > found[key]["start"]


def test_pieces_in_riff_are_prepared_as_those_without(pieces: Path, settings: DataSettings, tmp_path: Path) -> None:
    plain = prepare(pieces, "music", settings, progress=False)
    wrapped = tmp_path / "wrapped"
    for path in filter(Path.is_file, pieces.rglob("*")):
        midi = path.read_bytes()
        inside = b"RMIDdata" + len(midi).to_bytes(4, "little") + midi + b"\0" * (len(midi) % 2)
        there = wrapped / path.relative_to(pieces).with_suffix(".rmi")
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(b"RIFF" + len(inside).to_bytes(4, "little") + inside)
    found = prepare(wrapped, None, settings, progress=False)
    assert found.modality == "music"
    for split in SPLITS:
        assert sorted(found.split(split)) == sorted(plain.split(split))


def off(when: int, pitch: int, channel: int = 0) -> Event:
    return when, [0x80 | channel, pitch, 0]


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
