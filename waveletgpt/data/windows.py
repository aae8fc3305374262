"""Windows of a token store: what training and evaluation read. A window is `context` inputs and as many targets."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset


class RandomWindows(Dataset):
    """`length` windows at random places; item i depends on (seed, i) alone.

    So every arm of a comparison sees the same batches, and a resumed run goes on by skipping indices. With `record`
    (tokens of an image, say) windows that hold a whole record start where one starts. With `end`, see `window`.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        context: int,
        length: int,
        seed: int,
        record: int | None = None,
        end: int | None = None,
    ):
        self.tokens, self.context, self.length, self.seed, self.end = tokens, context, length, seed, end
        self.step = _step(context, record)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # A counter-based generator: no state to save, no order to keep.
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, index]))
        places = (len(self.tokens) - self.context - 1) // self.step + 1
        return window(self.tokens, int(random.integers(places)) * self.step, self.context, self.end)


class MixedWindows(Dataset):
    """Windows of several sources, each source its share; item i depends on (seed, i) alone.

    Item i is item i of the source in whose interval of [0, 1] the i-th point of a scrambled van der Corput sequence
    falls: the digits of i in base 67, each replaced by a permutation that the seed decides, behind the point instead of
    before it (H. Faure, 1992). Any 67 items in a row fall into 67 equal parts of [0, 1]. As 67 is a prime, so do the
    items that one of several processes gets, every n-th, unless n is a multiple of 67.
    """

    def __init__(self, parts: Sequence[RandomWindows], weights: Sequence[float], seed: int):
        self.parts = list(parts)
        self.bounds = list(itertools.accumulate(weights))[:-1]
        random = np.random.Generator(np.random.Philox(key=seed))
        # Six digits tell 67^6 = 9e10 items apart; what comes later repeats them.
        self.digits = [random.permutation(_BASE).tolist() for _ in range(6)]

    def __len__(self) -> int:
        return len(self.parts[0])

    def source(self, index: int) -> int:
        """The place in `parts` of the source that item `index` is from."""
        point, scale = 0.0, 1.0
        for digits in self.digits:
            index, digit = divmod(index, _BASE)
            scale /= _BASE
            point += digits[digit] * scale
        return bisect.bisect_right(self.bounds, point)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.parts[self.source(index)][index]


_BASE = 67


class FixedWindows(Dataset):
    """`length` windows spread evenly over `tokens`, without overlap; None for as many as there are."""

    def __init__(
        self, tokens: np.ndarray, context: int, length: int | None, record: int | None = None, end: int | None = None
    ):
        step = _step(context, record)
        stride = -(-context // step) * step
        whole = max(1, (len(tokens) - context - 1) // stride + 1)
        length = whole if length is None else min(length, whole)
        self.tokens, self.context, self.end = tokens, context, end
        self.starts = [i * whole // length * stride for i in range(length)]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return window(self.tokens, self.starts[index], self.context, self.end)


def fixed_mixture(
    sources: Sequence[np.ndarray],
    weights: Sequence[float],
    context: int,
    length: int,
    record: int | None = None,
    end: int | None = None,
) -> Dataset:
    """`length` windows at most, each source its share of them as nearly as whole windows go."""
    if len(sources) == 1:
        return FixedWindows(sources[0], context, length, record, end)
    there = [len(FixedWindows(tokens, context, None, record)) for tokens in sources]
    # Fewer where a source has too few for its share.
    total = max(1, min(length, *(int(most / weight) for most, weight in zip(there, weights, strict=True))))
    counts = [int(weight * total) for weight in weights]
    by_rest = sorted(range(len(counts)), key=lambda i: counts[i] - weights[i] * total)
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    shares = zip(sources, counts, there, strict=True)
    return ConcatDataset([FixedWindows(t, context, min(n, most), record, end) for t, n, most in shares if n])


def window(tokens: np.ndarray, start: int, context: int, end: int | None = None) -> dict[str, torch.Tensor]:
    """Inputs (T,) from `start` on, and the target of each: the token after it.

    With `end`, the token between documents, also position_ids (T,), which start again at each `end`: a document begins
    with it, as in generation. Models keep what lies before a position of 0 apart.
    """
    piece = torch.from_numpy(tokens[start : start + context + 1].astype(np.int64))
    row = {"input_ids": piece[:-1], "shift_labels": piece[1:]}
    if end is not None:
        t = torch.arange(len(piece) - 1)
        row["position_ids"] = t - torch.where(piece[:-1] == end, t, 0).cummax(0).values
    return row


def _step(context: int, record: int | None) -> int:
    return record if record and context + 1 >= record else 1
