"""Mu-law: a sample of sound as one of 256 levels, which are dense near silence, where most samples are.

The continuous companding of ITU-T G.711 with mu = 255, as in WaveNet (https://arxiv.org/abs/1609.03499, 2.2) and
SaShiMi: f(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu), then 256 even steps from f = -1 (code 0) to f = 1 (code 255).
"""

from __future__ import annotations

import numpy as np

MU = 255
CODES = 256
SILENCE = 128
"""The code of 0."""


def encode(samples: np.ndarray) -> np.ndarray:
    """Codes 0 .. 255, uint8, of samples in [-1, 1]; others are clipped. Any shape."""
    samples = np.clip(samples.astype(np.float64), -1, 1)
    companded = np.copysign(np.log1p(MU * np.abs(samples)) / np.log1p(MU), samples)
    return np.floor((companded + 1) / 2 * MU + 0.5).astype(np.uint8)


def decode(codes: np.ndarray) -> np.ndarray:
    """The middle of each code's level, float32 in [-1, 1]; `encode` gives the code back. Any shape."""
    companded = codes / MU * 2.0 - 1
    return np.copysign(np.expm1(np.abs(companded) * np.log1p(MU)) / MU, companded).astype(np.float32)
