"""Recordings that are broken, hostile or endless: read as far as they go, or skipped, named and counted."""

from __future__ import annotations

import logging
import struct
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.data.modalities.sounds import RATE, all_tokens, encoded, oracle, pcm, save, speech, whole
from waveletgpt.data import SPLITS, DataSettings, prepare
from waveletgpt.data.modalities import audio, mulaw
from waveletgpt.data.modalities.audio import Unusable, recording
from waveletgpt.errors import UserError


def no_rate(content: bytes) -> bytes:
    return content[:24] + struct.pack("<I", 0) + content[28:]


def test_broken_files_are_skipped_named_and_counted(
    tmp_path: Path, settings: DataSettings, caplog: pytest.LogCaptureFixture
) -> None:
    good = encoded(pcm(speech(1)))
    flac = encoded(speech(1), form="FLAC")
    folder = tmp_path / "in"
    folder.mkdir()
    broken = {
        "empty.wav": b"", "header.wav": good[:44], "half-header.wav": good[:20], "garbage.mp3": bytes(range(256)) * 8,
        "no-rate.wav": no_rate(good), "truncated.flac": flac[: len(flac) // 2], "readme.txt": b"Recorded by us.",
        "slow.wav": encoded(np.zeros(1000), 100), "table.mat": encoded(np.zeros(1000), form="MAT5"),
    }  # fmt: skip
    for name, content in {"good.wav": good, **broken}.items():
        (folder / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        store = prepare(folder, "audio", settings, progress=False)
    assert store.meta["source"]["documents"] == 1
    skipped = store.meta["skipped"]
    assert skipped["count"] == len(broken)
    assert {name.split(" ")[0] for name in skipped["names"]} == set(broken)
    assert "slow.wav (100 samples a second)" in skipped["names"]
    assert "readme.txt (Format not recognised)" in skipped["names"]
    assert "header.wav (no samples)" in skipped["names"]
    assert [record.message for record in caplog.records if "skipped 9 files" in record.message]
    assert set(whole(store).tolist()) <= set(oracle(pcm(speech(1)) / 32768).tolist())


def test_the_rest_of_a_truncated_wav_is_used(tmp_path: Path, settings: DataSettings) -> None:
    levels = pcm(speech(1))
    (tmp_path / "cut.wav").write_bytes(encoded(levels)[:20_044])
    assert np.array_equal(all_tokens(tmp_path / "cut.wav", settings), oracle(levels[:10_000] / 32768))


def test_a_file_broken_in_the_middle_leaves_nothing_behind(
    tmp_path: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio, "BLOCK", 4096)
    flac = encoded(speech(2, seed=1), form="FLAC")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.flac").write_bytes(flac[: len(flac) * 3 // 4])
    levels = pcm(speech(2))
    save(tmp_path / "in" / "b.wav", levels)
    with pytest.raises(Unusable):
        for _ in recording(tmp_path / "in" / "a.flac", RATE):
            pass
    store = prepare(tmp_path / "in", "audio", settings, progress=False)
    assert np.array_equal(store.split("train"), oracle(levels / 32768)[: len(store.split("train"))])


@pytest.mark.parametrize("content", [{"a.wav": b"no sound"}, {"a.txt": b"text", "b.wav": b"RIFF"}])
def test_nothing_usable(content: dict[str, bytes], tmp_path: Path, settings: DataSettings) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=r"no recordings in .* that can be used \(a\.\w+ \(Format not recognised"):
        prepare(tmp_path, "audio", settings, progress=False)


def test_too_short(tmp_path: Path, settings: DataSettings) -> None:
    with pytest.raises(UserError, match="is too short: 10 tokens give"):
        prepare(save(tmp_path / "click.wav", np.zeros(10)), "audio", settings, progress=False)


FUZZED = [
    encoded(speech(0.2), RATE, form, subtype)
    for form, subtype in (
        ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"),
        ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"), ("CAF", "ALAC_16"),
    )
]  # fmt: skip


@hypothesis_settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.integers(0, len(FUZZED) - 1),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6),
    head=st.booleans(),
)
def test_any_bytes_are_read_or_refused(
    kind: int, cut: float, flips: list[tuple[float, int]], head: bool, tmp_path: Path
) -> None:
    """Flipped bits (with `head` among the first 64 bytes) and cut ends: samples that are numbers, or Unusable."""
    content = bytearray(FUZZED[kind])
    for place, mask in flips:
        content[int(place * (min(64, len(content)) if head else len(content)))] ^= mask
    path = tmp_path / "fuzzed"
    path.write_bytes(content[: max(1, round(len(content) * (1 - cut**4)))])
    total = 0
    try:
        for block in recording(path, RATE):
            assert block.dtype == np.float32
            assert block.ndim == 1
            assert np.isfinite(block).all()
            total += len(block)
            if total > 100 * RATE:  # a header may claim hours; blocks stay small
                break
    except Unusable:
        pass


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from([b"", b"RIFF", b"fLaC", b"OggS", b"\xff\xfb\x90", b"FORM", b"ID3", b".snd", b"caff"]),
       rest=st.binary(max_size=400))  # fmt: skip
def test_garbage_is_read_or_refused(start: bytes, rest: bytes, tmp_path: Path) -> None:
    (tmp_path / "garbage").write_bytes(start + rest)
    try:
        for block in recording(tmp_path / "garbage", RATE):
            assert np.isfinite(block).all()
    except Unusable:
        pass


@pytest.mark.parametrize("form", ["wav", "flac"])
def test_ten_hours_of_silence_take_little_memory(form: str, tmp_path: Path) -> None:
    """At the lowest rate, to be quick: what is held is a block, whatever the rate. The FLAC has some hundred KB."""
    path = tmp_path / f"night.{form}"
    samples = 10 * 3600 * 1000
    if form == "wav":
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 1000, 0, "NONE", ""))
            file.writeframes(bytes(2))
        with path.open("r+b") as raw:  # a hole, so that nothing is written
            raw.seek(4)
            raw.write(struct.pack("<I", 36 + 2 * samples))
            raw.seek(40)
            raw.write(struct.pack("<I", 2 * samples))
            raw.truncate(44 + 2 * samples)
    else:
        with soundfile.SoundFile(path, "w", 1000, 1, format="FLAC", subtype="PCM_16") as flac:
            for _ in range(10):
                flac.write(np.zeros(samples // 10, np.int16))
    chosen = DataSettings(cache_dir=str(tmp_path / "cache"), sample_rate=1000)
    tracemalloc.start()
    store = prepare(path, "audio", chosen, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(len(store.split(split)) for split in SPLITS) == samples - 2 * 1000
    assert (np.asarray(store.split("test")) == mulaw.SILENCE).all()
    assert peak < 80e6
