"""Mu-law codes are those of an independent oracle, and their error is half a step."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.data.modalities.sounds import oracle
from waveletgpt.data.modalities import mulaw


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
