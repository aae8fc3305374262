"""Recordings become clips of one length, in splits that share no recording."""

from __future__ import annotations

import logging
import shutil
import tracemalloc
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soxr
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.classify.recordings import RATE, folders, noise, prepared, stems
from tests.data.modalities.sounds import pcm, save, speech
from waveletgpt.classify import clips
from waveletgpt.classify.clips import pieces, read_clips
from waveletgpt.classify.settings import TaskSettings
from waveletgpt.data import SPLITS
from waveletgpt.errors import UserError


def snr(truth: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise, decibels."""
    return float(10 * np.log10((truth**2).sum() / ((truth - found) ** 2).sum()))


def test_samples_are_those_of_the_recording(tmp_path: Path, chosen: TaskSettings) -> None:
    """The clips of a recording, one after the other, are what it was; the rest that is dropped is under half a clip."""
    sounds = {
        f"{label}{index}": noise(10 * index + label, 0.3 + 0.45 * index) for label in (0, 1) for index in range(12)
    }
    for name, levels in sounds.items():
        save(tmp_path / "in" / f"class {name[0]}" / f"{name}.wav", levels, RATE)
    store = prepared(tmp_path / "in", chosen)
    assert (store.kind, store.modality, store.sample_rate, store.n_inputs) == ("waveform", "audio", RATE, 1)
    assert store.classes == ("class 0", "class 1")
    assert store.max_length == RATE
    seen = set()
    for split in SPLITS:
        examples = store.split(split)
        found = defaultdict(list)
        for index, stem in enumerate(stems(store, split)):
            found[examples.clips[index], stem].append(examples.raw(index)[0])
            assert store.classes[examples.labels[index]] == f"class {stem[0]}"
        assert sorted(clip for clip, _ in found) == list(range(len(found)))
        for (_, stem), parts in found.items():
            levels = sounds[stem]
            joined = np.concatenate(parts)
            assert np.array_equal(joined, levels[: len(joined)])
            assert len(levels) - len(joined) < (RATE / 2 if len(levels) > RATE else 1)
            assert all(len(part) == RATE for part in parts[:-1])
            assert stem not in seen
            seen.add(stem)
        item = examples[0]
        np.testing.assert_array_equal(item["input_values"].numpy() * 32768, examples.raw(0)[0])
    assert seen == set(sounds)


@hypothesis_settings(max_examples=100)
@given(st.integers(1, 3000), st.integers(1, 500))
def test_pieces_cover_a_recording(samples: int, length: int) -> None:
    """In order and without gaps; all but the last as long as asked for, which is at least half of it, or alone."""
    levels = np.arange(samples)
    found = list(pieces(levels, length))
    joined = np.concatenate(found)
    assert np.array_equal(joined, levels[: len(joined)])
    assert all(len(piece) == length for piece in found[:-1])
    assert len(found) == 1 or length / 2 <= len(found[-1]) <= length
    assert samples - len(joined) < max(1, length / 2) or len(found) == 0


def test_a_tone_survives(tmp_path: Path) -> None:
    """At its own rate within the rounding to 16 bits, from any format that is as exact; at another one as a tone."""
    times = np.arange(16_000) / 16_000
    tone = 0.8 * np.sin(2 * np.pi * 440 * times)
    for form, subtype in (("WAV", "FLOAT"), ("WAV", "PCM_24"), ("WAV", "DOUBLE"), ("FLAC", "PCM_24")):
        path = save(tmp_path / "tone", tone, 16_000, form, subtype)
        (found,) = read_clips(path, 16_000, 1.0)
        assert found.dtype == np.int16
        assert snr(tone, found / 32768) >= 80
    (found,) = read_clips(path, 8000, 1.0)
    assert len(found) == 8000
    assert snr(tone[::2][500:-500], found[500:-500] / 32768) >= 70


def test_16_bit_recordings_come_back_as_they_were(tmp_path: Path) -> None:
    levels = np.arange(-32768, 32768).astype(np.int16)
    (found,) = read_clips(save(tmp_path / "all.wav", levels, 16_000), 16_000, 10.0)
    assert np.array_equal(found, levels)


def test_beyond_full_scale_is_clipped(tmp_path: Path) -> None:
    loud = np.array([0.5, 1.0, 1.5, -1.0, -1.5, np.nan, np.inf], np.float32)
    (found,) = read_clips(save(tmp_path / "loud.wav", loud, 8000, subtype="FLOAT"), 8000, 1.0)
    assert found.tolist() == [16384, 32767, 32767, -32768, -32768, 0, 0]


def test_channels_and_rate(tmp_path: Path, chosen: TaskSettings) -> None:
    """Stereo at 44.1 kHz: what soxr makes of the mean of both."""
    both = np.stack([speech(1, 44_100), speech(1, 44_100, 1)], axis=1).astype(np.float32)
    (found,) = read_clips(save(tmp_path / "both.wav", both, 44_100, subtype="FLOAT"), 16_000, 1.0)
    expected = soxr.resample(both.mean(axis=1), 44_100, 16_000)
    np.testing.assert_allclose(found / 32768, expected, atol=1 / 32768)


def test_the_rest_of_a_long_recording_is_left_out(
    tmp_path: Path, chosen: TaskSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clips, "LONGEST", 3.0)
    for index in range(24):
        save(tmp_path / "in" / "ab"[index % 2] / f"{index}.wav", noise(index, 3.0), RATE)
    save(tmp_path / "in" / "a" / "long.wav", noise(99, 20.0), RATE)
    with caplog.at_level(logging.WARNING):
        store = prepared(tmp_path / "in", chosen)
    assert sum(len(store.split(split)) for split in SPLITS) == 25 * 3
    assert store.meta["source"]["cut"] == 1
    assert "only the first 3 seconds of 1 recordings are used" in caplog.text


def test_a_night_takes_little_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "night.flac", np.zeros(5_000_000, np.int16), RATE, "FLAC")
    tracemalloc.start()
    found = read_clips(path, RATE, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == clips.LONGEST
    assert peak < 40e6


def test_a_file_that_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("no sound")
    with pytest.raises(UserError, match=r"a\.wav cannot be read as a recording \(Format not recognised"):
        read_clips(tmp_path / "a.wav", RATE, 1.0)
    levels = pcm(speech(2.2))
    found = read_clips(save(tmp_path / "b.wav", levels), 16_000, 1.0)
    assert [len(piece) for piece in found] == [16_000, 16_000]
    assert np.array_equal(np.concatenate(found), levels[:32_000])


def test_copies_are_in_one_split(tmp_path: Path, chosen: TaskSettings) -> None:
    """Whatever they are called, also where the splits are given; test keeps them."""
    folders(tmp_path / "in" / "train", 20)
    folders(tmp_path / "in" / "test", 5, start=100)
    for name in ("a", "b"):
        shutil.copy(tmp_path / "in/test/high/h100.wav", tmp_path / f"in/train/high/{name}.wav")
    store = prepared(tmp_path / "in", chosen)
    assert "h100" in stems(store, "test")
    assert store.meta["recordings"]["train"] + store.meta["recordings"]["validation"] == 40
    assert store.meta["source"]["copies_left_out"] == 2


def test_numbers_of_recordings(tmp_path: Path, chosen: TaskSettings) -> None:
    """So many recordings, with all their clips and classes in their shares; the same ones for the same seed."""
    for index in range(60):
        save(tmp_path / "in" / "abc"[index % 3] / f"{index}.wav", noise(index, 2.0), RATE)
    fewer = replace(chosen, train_examples=9, validation_examples=6, test_examples=3)
    store = prepared(tmp_path / "in", fewer)
    assert store.meta["recordings"] == {"train": 9, "validation": 6, "test": 3}
    assert [len(store.split(split)) for split in SPLITS] == [18, 12, 6]
    assert np.bincount(store.split("train").labels).tolist() == [6, 6, 6]
    other = prepared(tmp_path / "in", replace(fewer, data_seed=1))
    assert set(stems(other, "train")) != set(stems(store, "train"))
    everything = prepared(tmp_path / "in", chosen)
    assert set(stems(store, "test")) <= set(stems(everything, "test"))
    with pytest.raises(UserError, match=r"test_examples is 99, but .* has 6 for test: give at most that"):
        prepared(tmp_path / "in", replace(chosen, test_examples=99))


def test_found_again_until_something_changes(tmp_path: Path, chosen: TaskSettings) -> None:
    folders(tmp_path / "in")
    store = prepared(tmp_path / "in", chosen)
    times = {path: path.stat().st_mtime_ns for path in store.path.iterdir()}
    again = prepared(tmp_path / "in", chosen)
    assert again.path == store.path
    assert {path: path.stat().st_mtime_ns for path in again.path.iterdir()} == times
    changed = (replace(chosen, clip_seconds=0.1), replace(chosen, sample_rate=2000), replace(chosen, data_seed=1))
    others = [prepared(tmp_path / "in", settings) for settings in changed]
    assert len({store.path, *(other.path for other in others)}) == 4
    assert others[0].max_length == 100
    assert others[1].max_length == 1000
    elsewhere = replace(chosen, cache_dir=str(tmp_path / "other cache"))
    twin = prepared(tmp_path / "in", elsewhere)
    for split in SPLITS:
        for kind in ("data", "labels", "clips"):
            first, second = (one.path / f"{kind}-{split}.bin" for one in (store, twin))
            assert first.read_bytes() == second.read_bytes()
