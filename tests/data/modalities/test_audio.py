"""Recordings become the mu-law codes that an independent oracle gives, in splits of whole files, and sound again."""

from __future__ import annotations

import importlib.util
import sys
import tarfile
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

from tests.data.modalities.sounds import RATE, all_tokens, encoded, oracle, pcm, save, speech, whole
from waveletgpt.data import SPLITS, DataSettings, prepare
from waveletgpt.data.modalities import audio, mulaw
from waveletgpt.data.modalities.audio import AUDIO, picture, recording
from waveletgpt.errors import UserError


def snr(truth: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise, decibels."""
    return float(10 * np.log10((truth**2).sum() / ((truth - found) ** 2).sum()))


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
    with pytest.raises(UserError, match="sample_rate must be greater than or equal to 1000, got 0"):
        DataSettings(sample_rate=0)
    with pytest.raises(UserError, match="goes with `modality=bpe` or `modality=chars` only"):
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


def test_tokens_that_are_no_samples_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    sample = AUDIO.write_sample([1, 256, 2, -1], tokenizer, tmp_path / "sample")
    assert sample.repaired == "2 tokens that are no samples left out"
    assert not AUDIO.write_sample([1, 2], tokenizer, tmp_path / "sample").repaired


def test_what_suits_a_report(tmp_path: Path, tokenizer: Any) -> None:
    """Half a second of held-out sound, and half a second more, at even distances."""
    tokens = np.arange(100_000) % 251
    found = AUDIO.excerpts(tokens, 3, tokenizer)
    assert [len(prompt) for prompt in found] == [8000] * 3
    assert [prompt[0] for prompt in found] == [start % 251 for start in (0, 30_666, 61_333)]
    assert AUDIO.new_tokens(found[0], tokenizer) == 8000
    assert [len(prompt) for prompt in AUDIO.excerpts(tokens[:100], 2, tokenizer)] == [50, 50]


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
