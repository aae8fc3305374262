"""Windows of a token store, for training and evaluation. A window is `context` inputs and as many targets."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset


class RandomWindows(Dataset):
    """`length` windows at random places. Item i depends only on (seed, i).

    So every arm of a comparison sees the same batches, and a resumed run continues by skipping indices. `record` is the
    number of tokens of a record, such as an image: windows that hold a whole record begin with one. For `end` see
    `window`.
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
    """Windows of several sources, each with its share. Item i depends only on (seed, i).

    Each source has an interval of [0, 1] as long as its share. Item i is item i of the source whose interval holds
    point i of a scrambled van der Corput sequence (H. Faure, 1992): write i in base 67, replace each digit by a
    permutation that depends on the seed, and mirror the digits at the point. Any 67 consecutive points fall into 67
    equal parts of [0, 1]. As 67 is a prime, the same holds if a process gets every n-th item, unless n is a multiple of
    67.
    """

    def __init__(self, parts: Sequence[RandomWindows], weights: Sequence[float], seed: int):
        self.parts = list(parts)
        self.bounds = list(itertools.accumulate(weights))[:-1]
        random = np.random.Generator(np.random.Philox(key=seed))
        # Six digits give 67^6 = 9e10 different points; later items repeat them.
        self.digits = [random.permutation(_BASE).tolist() for _ in range(6)]

    def __len__(self) -> int:
        return len(self.parts[0])

    def source(self, index: int) -> int:
        """The index in `parts` of the source of item `index`."""
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
    """`length` windows spread evenly over `tokens`, without overlap; None: as many as fit."""

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
    """At most `length` windows; each source has its share, rounded to whole windows."""
    if len(sources) == 1:
        return FixedWindows(sources[0], context, length, record, end)
    there = [len(FixedWindows(tokens, context, None, record)) for tokens in sources]
    # Fewer windows if a source has too few for its share.
    total = max(1, min(length, *(int(most / weight) for most, weight in zip(there, weights, strict=True))))
    counts = [int(weight * total) for weight in weights]
    by_rest = sorted(range(len(counts)), key=lambda i: counts[i] - weights[i] * total)
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    shares = zip(sources, counts, there, strict=True)
    return ConcatDataset([FixedWindows(t, context, min(n, most), record, end) for t, n, most in shares if n])


def window(tokens: np.ndarray, start: int, context: int, end: int | None = None) -> dict[str, torch.Tensor]:
    """Inputs (T,) from `start` on, and the target of each input: the token after it.

    With `end`, the token between documents, there are also position_ids (T,), which restart at 0 at each `end`: a
    document begins with this token, as in generation. Models do not look back beyond a position of 0.
    """
    piece = torch.from_numpy(tokens[start : start + context + 1].astype(np.int64))
    row = {"input_ids": piece[:-1], "shift_labels": piece[1:]}
    if end is not None:
        t = torch.arange(len(piece) - 1)
        row["position_ids"] = t - torch.where(piece[:-1] == end, t, 0).cummax(0).values
    return row


def _step(context: int, record: int | None) -> int:
    return record if record and context + 1 >= record else 1
