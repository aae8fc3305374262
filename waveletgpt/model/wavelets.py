"""Wavelets as filters: the taps that give approximation and detail coefficients, in NumPy and float64."""

from __future__ import annotations

from math import comb

import numpy as np


def daubechies(moments: int) -> np.ndarray:
    """Scaling filter of the orthogonal wavelet with so many vanishing moments (1: Haar), in float64; its sum is 1.

    Of the filters with its frequency response it is the one that delays least: most weight lies on recent tokens.
    Source: Daubechies, Ten Lectures on Wavelets (1992), Section 6.1.
    """
    # |H|^2 = cos(v)^2N P(sin(v)^2), with v half the frequency and P of degree N - 1. Of each pair of roots, where
    # sin(v)^2 = (2 - z - 1/z) / 4, the one inside the unit circle belongs to the filter.
    middle = 1 - 2 * np.roots([comb(moments - 1 + k, k) for k in reversed(range(moments))]).astype(complex)
    away = np.sqrt(middle**2 - 1)
    inside = np.where(abs(middle + away) < 1, middle + away, middle - away)
    taps = np.poly([*[-1] * moments, *inside]).real
    result: np.ndarray = taps / taps.sum()
    return result


def wavelet_taps(moments: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Filters that give the approximation and the detail coefficients of a scale 2^k from the signal, k >= 0.

    Those of the undecimated transform, scaled so that an approximation is an average: the sum of its taps is 1 (MODWT,
    Percival and Walden 2000, Chapter 5). With Haar, approximation plus detail is the approximation of the next finer
    scale. Tap j weighs the value j tokens ago; both have (scale - 1) (2 moments - 1) + 1. The signal is its own
    approximation at scale 1, and no detail.
    """
    low = daubechies(moments)
    high = low[::-1] * (-1) ** np.arange(len(low))
    approximation, detail, stretch = np.ones(1), np.zeros(1), 1
    while stretch < scale:
        spread = np.zeros((2, (len(low) - 1) * stretch + 1))
        spread[:, ::stretch] = low, high
        approximation, detail = (np.convolve(approximation, taps) for taps in spread)
        stretch *= 2
    return approximation, detail
