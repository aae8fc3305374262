"""Windows of a token store: what training and evaluation read. A window is `context` inputs and as many targets."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset


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
