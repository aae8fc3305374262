"""Recordings become the mu-law codes that an independent oracle gives, and sound again; broken files do no harm."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import struct
import sys
import tarfile
import tempfile
import tracemalloc
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.helpers import tiny_recipe
from waveletgpt.data import SPLITS, DataSettings, TokenStore, audio, mulaw, prepare
from waveletgpt.data.audio import AUDIO, Unusable, picture, recording
from waveletgpt.data.splits import Spool, point_of, split_of
from waveletgpt.errors import UserError
from waveletgpt.evaluation import evaluate_run, generate_from_run
from waveletgpt.training import train

RATE = 16_000


def speech(seconds: float = 2.0, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Something like speech: syllables of a gliding voice with falling harmonics, and hisses between; (samples,)."""
    random = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate)) / rate
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * times + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    voice = sum(np.sin(k * phase) / k**1.3 for k in range(1, 25))
    hiss = random.standard_normal(len(times)) * 0.3
    syllables = np.clip(np.sin(2 * np.pi * 2.5 * times), 0, None)
    sound = voice * syllables + hiss * np.clip(-np.sin(2 * np.pi * 2.5 * times), 0, 1) ** 4
    return sound / np.abs(sound).max() * 0.9


def pcm(samples: np.ndarray) -> np.ndarray:
    """As 16-bit integers."""
    return np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)


def encoded(samples: np.ndarray, rate: int = RATE, form: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def save(path: Path, samples: np.ndarray, rate: int = RATE, form: str = "WAV", subtype: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(samples, rate, form, subtype))
    return path


def oracle(levels: np.ndarray) -> np.ndarray:
    """Mu-law codes of samples in [-1, 1], by the places between the levels instead of by rounding."""
    between = [2 * (code + 0.5) / 255 - 1 for code in range(255)]
    places = [math.copysign((256 ** abs(f) - 1) / 255, f) for f in between]
    return np.searchsorted(places, levels, side="right")


def whole(store: TokenStore) -> np.ndarray:
    """All tokens, in the order of the files where the split is by position."""
    return np.concatenate([store.split(split) for split in SPLITS])


def all_tokens(path: Path, settings: DataSettings) -> np.ndarray:
    """The tokens of one recording, whole."""
    return np.concatenate([mulaw.encode(block) for block in recording(path, settings.sample_rate)])


def snr(truth: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise, decibels."""
    return float(10 * np.log10((truth**2).sum() / ((truth - found) ** 2).sum()))


# --- the code -------------------------------------------------------------------------------------------------------


def test_each_code_is_the_middle_of_its_level() -> None:
    codes = np.arange(256, dtype=np.uint8)
    levels = mulaw.decode(codes)
    assert np.array_equal(mulaw.encode(levels), codes)
    assert (np.diff(levels) > 0).all()
    assert levels[0] == -1
    assert levels[255] == 1
    np.testing.assert_allclose(levels, -levels[::-1], atol=1e-7)


def test_code_of_every_16_bit_sample() -> None:
    levels = np.arange(-32768, 32768) / 32768
    codes = mulaw.encode(levels)
    assert np.array_equal(codes, oracle(levels))
    assert (np.diff(codes.astype(int)) >= 0).all()
    assert codes[32768] == mulaw.SILENCE


@given(st.floats(width=32, allow_nan=False))
def test_error_of_a_sample_is_half_a_step(sample: float) -> None:
    """A step is d f = 2 / 255, and d x / d f = ln(256) (|x| + 1 / 255)."""
    clipped = min(1.0, max(-1.0, sample))
    found = float(mulaw.decode(mulaw.encode(np.array([sample], np.float32)))[0])
    assert abs(found - clipped) <= 1 / 255 * math.log(256) * (abs(clipped) + 1 / 255) * 1.02


# --- files -> tokens ------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_oracle(tmp_path: Path, settings: DataSettings) -> None:
    levels = pcm(speech(3))
    path = save(tmp_path / "voice.wav", levels)
    store = prepare(path, "audio", settings, progress=False)
    expected = oracle(levels / 32768)
    assert store.vocab_size == 256
    assert store.meta["dtype"] == "uint16"
    assert store.meta["split"] == "position"
    assert [len(store.split(split)) for split in SPLITS] == [43_200 - 240, 2400 - 240, 2400]
    assert store.meta["gap"] == 240  # a tenth of the smaller split, as one second is more
    assert np.array_equal(store.split("train"), expected[:42_960])
    assert np.array_equal(store.split("validation"), expected[43_200:45_360])
    assert np.array_equal(store.split("test"), expected[45_600:])
    assert store.bytes_per_token("train") is None


def test_gap_of_a_second_in_a_long_recording(tmp_path: Path) -> None:
    chosen = DataSettings(cache_dir=str(tmp_path / "cache"), sample_rate=1000, test_fraction=0.0)
    store = prepare(save(tmp_path / "long.wav", np.zeros(400_000), 1000), "audio", chosen, progress=False)
    assert store.meta["gap"] == 1000
    assert [len(store.split(split)) for split in SPLITS] == [379_000, 20_000, 0]


def test_wav_to_tokens_to_wav(tmp_path: Path, settings: DataSettings) -> None:
    """Speech survives with mu-law's own error, and tokens exactly."""
    sound = speech(4)
    path = save(tmp_path / "voice.wav", pcm(sound))
    store = prepare(path, "audio", settings, progress=False)
    tokenizer = store.load_tokenizer()
    tokens = AUDIO.encode_prompt(f"{path}@4", tokenizer)
    sample = AUDIO.write_sample(tokens, tokenizer, tmp_path / "again")
    assert (sample.kind, sample.path.name, sample.text) == ("audio", "again.wav", None)
    found, rate = soundfile.read(sample.path)
    assert rate == RATE
    assert soundfile.info(sample.path).subtype == "PCM_16"
    assert snr(sound, found) >= 35
    assert AUDIO.encode_prompt(f"{sample.path}@4", tokenizer) == tokens


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 48_000])
def test_resampling(rate: int, tmp_path: Path) -> None:
    """Any rate: what soxr makes of the whole at once; and a tone stays the tone it is."""
    sound = speech(2, rate).astype(np.float32)
    path = save(tmp_path / "voice.wav", sound, rate, subtype="FLOAT")
    found = np.concatenate(list(recording(path, RATE)))
    assert np.array_equal(found, soxr.resample(sound, rate, RATE))
    tone = save(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate), rate, subtype="FLOAT")
    found = np.concatenate(list(recording(tone, RATE)))
    assert len(found) == RATE
    truth = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    assert snr(truth[1000:-1000], found[1000:-1000]) > 80


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
@pytest.mark.parametrize("block", [256, 3001])
def test_blocks_are_the_whole(block: int, rate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = np.stack([speech(1, rate), speech(1, rate, 1)], axis=1)
    path = save(tmp_path / "voice.flac", both, rate, "FLAC")
    at_once = np.concatenate(list(recording(path, RATE)))
    monkeypatch.setattr(audio, "BLOCK", block)
    pieces = list(recording(path, RATE))
    assert len(pieces) > 10
    assert np.array_equal(np.concatenate(pieces), at_once)


@pytest.mark.parametrize("channels", [2, 5, 99])
def test_channels_are_averaged(channels: int, tmp_path: Path) -> None:
    sound = np.random.default_rng(0).uniform(-1, 1, (3000, channels))
    path = save(tmp_path / "many.wav", sound, subtype="DOUBLE")
    found = np.concatenate(list(recording(path, RATE)))
    np.testing.assert_allclose(found, sound.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("form", "subtype", "decibels"),
    [
        ("WAV", "PCM_U8", 25), ("WAV", "PCM_24", 37), ("WAV", "PCM_32", 37), ("WAV", "FLOAT", 37), ("WAV", "ULAW", 30),
        ("WAVEX", "PCM_16", 37), ("RF64", "PCM_16", 37), ("FLAC", "PCM_16", 37), ("FLAC", "PCM_24", 37),
        ("AIFF", "PCM_16", 37), ("AU", "PCM_16", 37), ("CAF", "ALAC_16", 37), ("OGG", "VORBIS", 8), ("OGG", "OPUS", 8),
        ("MP3", "MPEG_LAYER_III", 8),
    ],
)  # fmt: skip
def test_formats(form: str, subtype: str, decibels: float, tmp_path: Path, settings: DataSettings) -> None:
    """By content, whatever the file is called; the lossy ones may move the hiss."""
    sound = speech(2)
    path = save(tmp_path / "something", sound, RATE, form, subtype)
    found = mulaw.decode(all_tokens(path, settings))
    assert abs(len(found) - len(sound)) <= 1200  # MP3 fills up frames
    found = np.pad(found, (0, max(0, len(sound) - len(found))))[: len(sound)]
    assert snr(sound, found) >= decibels


def test_samples_that_are_no_number_are_silent(tmp_path: Path, settings: DataSettings) -> None:
    sound = np.zeros((2000, 2), np.float32)
    sound[:, 0] = 0.5
    for place, value in ((100, np.nan), (200, np.inf), (300, -np.inf), (400, 3e38), (500, 7.0)):
        sound[place, 0] = value
    expected = np.full(2000, oracle(np.array(0.25)))
    expected[[100, 200, 300, 400]] = mulaw.SILENCE
    expected[500] = 255
    path = save(tmp_path / "odd.wav", sound, subtype="FLOAT")
    assert np.array_equal(all_tokens(path, settings), expected)
    resampled = np.concatenate(list(recording(path, 44_100)))
    assert np.isfinite(resampled).all()


def test_sample_rate_is_a_setting(tmp_path: Path) -> None:
    path = save(tmp_path / "voice.wav", speech(2))
    chosen = [DataSettings(cache_dir=str(tmp_path / "cache"), sample_rate=rate) for rate in (16_000, 8000)]
    stores = [prepare(path, "audio", one, progress=False) for one in chosen]
    assert stores[0].fingerprint != stores[1].fingerprint
    assert stores[1].meta["sample_rate"] == 8000
    tokenizer = stores[1].load_tokenizer()
    assert len(AUDIO.encode_prompt(str(path), tokenizer)) == 8000
    with wave.open(str(AUDIO.write_sample([128], tokenizer, tmp_path / "one").path)) as file:
        assert file.getframerate() == 8000
    with pytest.raises(UserError, match="sample_rate is 0: give 1000 to 192000"):
        DataSettings(sample_rate=0)
    with pytest.raises(UserError, match="goes with --modality bpe only"):
        prepare(path, "audio", DataSettings(tokenizer="gpt2", cache_dir=str(tmp_path / "cache")), progress=False)


def test_archives_give_what_the_folder_gives(tmp_path: Path, settings: DataSettings) -> None:
    files = {f"{name}.{form.lower()}": encoded(speech(1, seed=i), RATE, form) for i, (name, form) in
             enumerate([("a", "WAV"), ("b", "FLAC"), ("c", "OGG")])}  # fmt: skip
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content)
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "in", "in")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as zipped:
        for name, content in files.items():
            zipped.writestr(f"in/{name}", content)
    stores = [prepare(tmp_path / name, "audio", settings, progress=False) for name in ("in", "set.tar.gz", "set.zip")]
    first, *others = [[np.sort(store.split(split)) for split in SPLITS] for store in stores]
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    only = DataSettings(cache_dir=settings.cache_dir, include="*.flac")
    assert prepare(tmp_path / "set.tar.gz", "audio", only, progress=False).meta["source"]["documents"] == 1


# --- splits ---------------------------------------------------------------------------------------------------------


def tones(folder: Path, count: int, length: Callable[[int], int] = lambda index: 1000) -> Path:
    """Recordings that are one code throughout, so that tokens tell which they came from."""
    for index in range(count):
        save(folder / f"{index:03}.wav", np.full(length(index), mulaw.decode(np.uint8(index))), subtype="FLOAT")
    return folder


@pytest.mark.parametrize("count", [12, 30, 60, 250])
def test_no_recording_is_in_two_splits(count: int, tmp_path: Path, settings: DataSettings) -> None:
    store = prepare(tones(tmp_path / "in", count), "audio", settings, progress=False)
    assert store.meta["split"] in ("hash", "dealt")
    assert store.meta["gap"] == 0
    found = [set(store.split(split).tolist()) for split in SPLITS]
    assert set.union(*found) == set(range(count))
    assert sum(map(len, found)) == count
    assert [counts["documents"] for counts in store.meta["splits"].values()] == [len(one) for one in found]
    for split in ("validation", "test"):
        assert 0.025 <= len(store.split(split)) / (1000 * count) <= 0.1


def test_copies_stay_together(tmp_path: Path, settings: DataSettings) -> None:
    tones(tmp_path / "in", 30)
    for path in sorted((tmp_path / "in").iterdir()):
        path.with_name(f"copy-{path.name}").write_bytes(path.read_bytes())
    store = prepare(tmp_path / "in", "audio", settings, progress=False)
    assert sum(len(set(store.split(split).tolist())) for split in SPLITS) == 30


def test_few_long_recordings_are_held_out_at_the_end(tmp_path: Path, settings: DataSettings) -> None:
    store = prepare(tones(tmp_path / "in", 4, lambda index: 5000), "audio", settings, progress=False)
    assert store.meta["split"] == "position"
    assert store.meta["source"]["documents"] == 4
    assert whole(store).tolist() == sorted(whole(store).tolist())  # in the order of the names, codes 0 to 3
    assert set(store.split("validation").tolist()) == set(store.split("test").tolist()) == {3}
    assert sum(counts["documents"] for counts in store.meta["splits"].values()) == 4


def test_youtube_mix_in_its_own_splits(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "youtubemix.zip", "w") as archive:
        for code, clip in enumerate((0, 211, 212, 225, 226, 240)):
            level = np.full(500, mulaw.decode(np.uint8(code)))
            archive.writestr(f"youtubemix/out{clip:03}.wav", encoded(level, subtype="FLOAT"))
    chosen = DataSettings(cache_dir=str(tmp_path / "cache"), data_dir=str(tmp_path))
    store = prepare("youtube-mix", None, chosen, progress=False)
    assert (store.modality, store.meta["split"]) == ("audio", "given")
    assert [set(store.split(split).tolist()) for split in SPLITS] == [{0, 1}, {2, 3}, {4, 5}]


@hypothesis_settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    unit=st.sampled_from([1, 2, 6]),
    gap=st.integers(0, 50),
    held_out=st.tuples(st.floats(0.01, 0.4), st.sampled_from([0.0, 0.05, 0.3])),
)
def test_splits_of_a_spool(lengths: list[int], unit: int, gap: int, held_out: tuple[float, float]) -> None:
    """Whatever the lengths: what is read back is what was written, less the gaps, each part of it in one split."""
    chosen = DataSettings(validation_fraction=held_out[0], test_fraction=held_out[1])
    with tempfile.TemporaryDirectory() as folder, Spool(Path(folder)) as spool:
        for index, length in enumerate(lengths):
            point = point_of(bytes([index]))
            spool.write(b"broken")
            spool.drop_document()
            spool.end_document(split_of(None, point, chosen), spool.write(bytes([index]) * length * unit), point)
        spool.divide(chosen, unit=unit, gap=gap)
        pieces = list(spool.pieces(lambda block: len(block) // unit * unit))
    assert all(len(piece.data) % unit == 0 for piece in pieces)
    for split in SPLITS:
        assert sum(len(piece.data) for piece in pieces if piece.split == split) == spool.sizes[split]
    written = b"".join(bytes([index]) * length * unit for index, length in enumerate(lengths))
    read = b"".join(piece.data for piece in pieces)
    if spool.method == "position":
        gaps = 2 if held_out[1] else 1
        assert len(written) - len(read) == spool.gap * unit * gaps
        assert spool.gap <= gap
        assert written.startswith(b"".join(piece.data for piece in pieces if piece.split == "train"))
        last = [piece.data for piece in pieces if piece.split == ("test" if held_out[1] else "validation")]
        assert written.endswith(b"".join(last))
    else:
        assert read == written
        homes = [{piece.split for piece in pieces if index in piece.data} for index in range(len(lengths))]
        assert all(len(home) == 1 for home in homes)
        for split, share in zip(SPLITS[1:], held_out, strict=True):
            assert share / 2 <= spool.sizes[split] / len(written) <= share * 2


# --- broken files ---------------------------------------------------------------------------------------------------


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


def test_ten_hours_of_silence_take_little_memory(tmp_path: Path) -> None:
    """At the lowest rate, to be quick: what is held is a block, whatever the rate."""
    path = tmp_path / "night.wav"
    samples = 10 * 3600 * 1000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 1000, 0, "NONE", ""))
        file.writeframes(bytes(2))
    with path.open("r+b") as raw:  # a hole, so that nothing is written
        raw.seek(4)
        raw.write(struct.pack("<I", 36 + 2 * samples))
        raw.seek(40)
        raw.write(struct.pack("<I", 2 * samples))
        raw.truncate(44 + 2 * samples)
    chosen = DataSettings(cache_dir=str(tmp_path / "cache"), sample_rate=1000)
    tracemalloc.start()
    store = prepare(path, "audio", chosen, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(len(store.split(split)) for split in SPLITS) == samples - 2 * 1000
    assert (np.asarray(store.split("test")) == mulaw.SILENCE).all()
    assert peak < 80e6


# --- prompts and samples --------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path, settings: DataSettings) -> Any:
    return prepare(save(tmp_path / "any.wav", speech(1)), "audio", settings, progress=False).load_tokenizer()


def test_tokenizer_is_decimal_numbers(tokenizer: Any) -> None:
    assert len(tokenizer) == 256
    assert tokenizer("0 128 255")["input_ids"] == [0, 128, 255]
    assert tokenizer.decode([0, 128, 255]) == "0 128 255"
    assert tokenizer.all_special_tokens == []
    assert tokenizer.init_kwargs["sample_rate"] == RATE


def test_prompts(tmp_path: Path, tokenizer: Any) -> None:
    levels = pcm(speech(3))
    path = save(tmp_path / "voice@home.wav", levels)
    codes = oracle(levels / 32768).tolist()
    assert AUDIO.encode_prompt(str(path), tokenizer) == codes[:RATE]
    assert AUDIO.encode_prompt(f"{path}@0.25", tokenizer) == codes[:4000]
    assert AUDIO.encode_prompt(f"{path}@9", tokenizer) == codes
    assert AUDIO.encode_prompt("", tokenizer) == [mulaw.SILENCE]
    other = save(tmp_path / "cd.flac", speech(3, 44_100), 44_100, "FLAC")
    assert len(AUDIO.encode_prompt(str(other), tokenizer)) == RATE


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("nowhere.wav", "there is no file nowhere.wav"), ("any.wav@soon", '"soon" is no number of seconds'),
        ("any.wav@-1", '"-1" is no number'), ("any.wav@inf", '"inf" is no number'), ("text.txt", "cannot be read"),
        ("header.wav", "without samples"), (".", r"there is no file \."),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be(
    prompt: str, message: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "header.wav").write_bytes(encoded(np.zeros(0)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        AUDIO.encode_prompt(prompt, tokenizer)


@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.lists(st.integers(-3, 260), max_size=50))
def test_any_tokens_are_a_sound(tokens: list[int], tmp_path: Path, tokenizer: Any) -> None:
    sample = AUDIO.write_sample(tokens, tokenizer, tmp_path / "sample.1")
    assert sample.path.name == "sample.1.wav"
    codes = [token for token in tokens if 0 <= token < 256]
    with wave.open(str(sample.path)) as file:
        assert (file.getnframes(), file.getnchannels(), file.getsampwidth()) == (len(codes), 1, 2)
    if codes:
        assert AUDIO.encode_prompt(f"{sample.path}@1", tokenizer) == codes


def test_tokens_that_are_no_samples_are_counted(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    AUDIO.write_sample([1, 256, 2, -1], tokenizer, tmp_path / "sample")
    assert "left out 2 of 4 tokens" in caplog.text


@pytest.mark.parametrize("length", [0, 1, 700, 50_000])
def test_picture_of_any_length(length: int, tmp_path: Path, tokenizer: Any) -> None:
    sample = AUDIO.write_sample(list(range(256)) * (length // 256) + [200] * (length % 256), tokenizer, tmp_path / "x")
    assert picture(sample.path).startswith(b"\x89PNG")


def test_picture_shows_time_and_frequency(tmp_path: Path) -> None:
    """A tone in the second half: the brightest row of the spectrum is its frequency, the left half is dark."""
    times = np.arange(2 * RATE) / RATE
    levels = audio._decibels(np.where(times < 1, 0, 0.5 * np.sin(2 * np.pi * 2000 * times)))
    assert levels.shape[0] == 257
    late = levels[:, -levels.shape[1] // 4]
    assert late.argmax() * RATE / 512 == pytest.approx(2000, abs=20)
    assert levels[:, : levels.shape[1] // 3].max() < -70


def test_missing_libraries(tmp_path: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "any.wav", speech(1))
    for missing in ("soundfile", "soxr"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            spec = importlib.util.spec_from_file_location("another_audio", audio.__file__)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, "another_audio", module)
            spec.loader.exec_module(module)  # imports all the same
            with pytest.raises(UserError, match=r"pip install 'waveletgpt\[audio\]'"):
                prepare(path, "audio", settings, progress=False)


# --- the whole way --------------------------------------------------------------------------------------------------


def test_from_a_folder_to_a_sound(tmp_path: Path, settings: DataSettings) -> None:
    """Train on recordings, continue a WAV, and get a WAV of prompt and continuation."""
    for index in range(12):
        save(tmp_path / "in" / f"{index}.flac", speech(0.5, seed=index), form="FLAC")
    store = prepare(tmp_path / "in", "audio", settings, progress=False)
    recipe = tiny_recipe(modality="audio", max_steps=3, eval_every=3, save_every=3)
    run = train(recipe, store, tmp_path / "run", data=str(tmp_path / "in"), show_progress=False)
    assert evaluate_run(run.path, device="cpu")["bits_per_byte"] is None
    prompt = f"{tmp_path / 'in' / '0.flac'}@0.01"
    (written,) = generate_from_run(run.path, prompt, tokens=20, device="cpu", out=tmp_path / "out")
    with wave.open(written) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, 180)
