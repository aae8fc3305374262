"""Sounds for the tests of audio, in files of any format, and codes by an independent oracle."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import soundfile

from waveletgpt.data import SPLITS, DataSettings, TokenStore
from waveletgpt.data.modalities import mulaw
from waveletgpt.data.modalities.audio import recording

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
