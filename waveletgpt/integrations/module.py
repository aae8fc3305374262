"""`WaveletMixing`, the mixer as one module of torch, for any model and any training loop.

It needs torch alone. This file also travels in checkpoints of models that have mixing added.

Shapes: B batch, T tokens, E embedding, C mixed channels (the first C of E), n channels that share the window w.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from waveletgpt.model.state import State
    from waveletgpt.ops import wavelet_mix
except ImportError:
    # In a checkpoint the operator's definition and the state lie beside this file.
    from .reference import wavelet_mix  # type: ignore[import-not-found, no-redef]
    from .state import State  # type: ignore[import-not-found, no-redef]

KERNELS = (None, "learnable", "delta", "gate")
EDGES = ("zero", "partial")
STARTS = ("mean", "haar")


class WaveletMixing(nn.Module):
    """Replaces the first C channels of hidden states by causal averages of themselves over time.

    Args:
        n_embd: E.
        windows: powers of two, in tokens. They are spread evenly over the mixed channels, shortest first.
        kernels: what a channel becomes. None: the mean over its window, no parameters. "learnable": a weighted sum
            that starts as `start` says. Two change nothing at first, for models that are already trained: "delta", a
            weighted sum that starts as the value itself; "gate", x + g (mean - x) with a trained g that starts at 0.
        mix_fraction: C / E.
        edge: "zero" counts values before a document's first token as 0. "partial" divides by the number of the
            document's tokens in the window, min(w, reach + 1), instead of w; not for "delta", which is not an average.
        start: what "learnable" starts as. "mean"; or "haar": the mean for half of the channels of each window, for the
            others the Haar detail, half the mean of the window's newer half minus half that of its older.

    Parameters are differences from the starting weights, in one vector. So optimizers with a special update for
    matrices treat them as usual, and weight decay pulls them to the start instead of to 0.

    Raises:
        ValueError: windows, fraction, edge or start are not possible.
    """

    window: Tensor

    def __init__(
        self,
        n_embd: int,
        windows: Sequence[int] = (2, 4),
        kernels: str | None = None,
        mix_fraction: float = 0.5,
        edge: str = "zero",
        start: str = "mean",
    ):
        super().__init__()
        scales = sorted({int(w) for w in windows})
        if not scales or any(w < 1 or w & (w - 1) for w in scales):
            raise ValueError(f"windows={list(windows)}: give powers of two, such as [2, 4, 8]")
        if kernels not in KERNELS:
            raise ValueError(f"kernels={kernels!r} is unknown; use one of {KERNELS}")
        if edge not in EDGES:
            raise ValueError(f"edge={edge!r} is unknown; use one of {EDGES}")
        if edge == "partial" and kernels == "delta":
            raise ValueError('edge="partial" is for averages, and kernels="delta" is none: use edge="zero"')
        if start not in STARTS:
            raise ValueError(f"start={start!r} is unknown; use one of {STARTS}")
        if start != "mean" and kernels != "learnable":
            raise ValueError(f'start={start!r} is for kernels="learnable", not {kernels!r}')
        if start == "haar" and edge == "partial":
            raise ValueError('edge="partial" is for averages, and start="haar" has details too: use edge="zero"')
        if not 0 < mix_fraction <= 1:
            raise ValueError(f"mix_fraction={mix_fraction} must be more than 0 and at most 1")
        self.n_mixed = round(mix_fraction * n_embd)
        if self.n_mixed < len(scales):
            what = f"{len(scales)} windows for {self.n_mixed} mixed channels"
            raise ValueError(f"{what} (mix_fraction={mix_fraction} of n_embd={n_embd}): give fewer, or a wider model")
        self.n_embd, self.kernels, self.edge, self.start = n_embd, kernels, edge, start
        self.windows = tuple(scales[j * len(scales) // self.n_mixed] for j in range(self.n_mixed))
        self.groups = tuple((window, len(list(members))) for window, members in groupby(self.windows))
        self.past = scales[-1] - 1
        """S: how many inputs before the current one the filter uses."""
        if kernels in ("learnable", "delta"):
            self.deviation = nn.Parameter(torch.zeros(sum(self.windows)))
        elif kernels == "gate":
            self.gate = nn.Parameter(torch.zeros(self.n_mixed))
        # Means have no parameters, so a checkpoint would not show that the model mixes. With this buffer a program that
        # does not know mixing reports an unexpected weight.
        self.register_buffer("window", torch.tensor(scales, dtype=torch.int32))

    def reset_parameters(self, init: Any = nn.init) -> None:
        """Set parameters and buffer to their starting values through the functions of `init`."""
        for parameter in self.parameters():
            init.zeros_(parameter)
        if self.window.device.type != "meta":
            scales = torch.tensor([window for window, _ in self.groups], dtype=torch.int32)
            with torch.no_grad():
                self.window.copy_(scales)

    def taps(self) -> list[Tensor] | None:
        """(n, w) for each distinct window, ascending; tap j is the weight of the value j tokens ago. None: means."""
        if self.kernels not in ("learnable", "delta"):
            return None
        taps = []
        parts = self.deviation.split([window * n for window, n in self.groups])
        for part, (window, n) in zip(parts, self.groups, strict=True):
            part = part.view(n, window)
            if self.kernels == "delta":
                start = F.pad(part.new_ones(1), (0, window - 1))
            else:
                start = part.new_full((n, window), 1 / window)
                if self.start == "haar" and window > 1:
                    start[(n + 1) // 2 :, window // 2 :] *= -1
            taps.append(part + start)
        return taps

    def state(self, recording: bool = False) -> State:
        """An empty state for decoding or for chunks: `forward` reads earlier inputs from it and appends x.

        With `recording` it keeps all inputs, so that `State.crop` can remove tokens.
        """
        return State(self.past, self.edge == "partial", recording)

    def forward(self, x: Tensor, state: State | Tensor | None = None, reach: Tensor | None = None) -> Tensor:
        """Mix hidden states.

        Args:
            x: (B, T, E).
            state: the state after the tokens before, to which x is appended; or their hidden states (B, any, E). None
                at the start.
            reach: (B or 1, T): how many tokens before each token belong to its document; see
                `waveletgpt.ops.reach_of`.

        Returns:
            (B, T, E); the channels from C on are those of `x`.
        """
        if x.dim() != 3 or x.shape[2] != self.n_embd:
            raise ValueError(f"x has shape {tuple(x.shape)}: give (batch, tokens, {self.n_embd})")
        if isinstance(state, Tensor):
            earlier, state = state, self.state()
            if earlier.dim() != 3 or earlier.shape[::2] != x.shape[::2]:
                raise ValueError(f"state has shape {tuple(earlier.shape)}: give ({len(x)}, any, {self.n_embd}), as x")
            state.append(earlier[..., : self.n_mixed])
        mixed, rest = x.split([self.n_mixed, self.n_embd - self.n_mixed], dim=2)
        before, within = (None, reach) if state is None else state.recall(mixed, reach)
        y = wavelet_mix(mixed, self.windows, self.taps(), edge=self.edge, state=before, reach=within)
        if state is not None and self.past:
            state.append(mixed, reach)
        if self.kernels == "gate":
            y = mixed + self.gate.to(x.dtype) * (y - mixed)
        return torch.cat([y, rest], dim=2)

    def flops(self) -> int:
        """Floating-point operations per token of a training step, forward and backward."""
        if self.kernels in ("learnable", "delta"):
            # Multiply-adds forward, for the gradient of the input, and for that of the taps.
            return 3 * sum(2 * window for window in self.windows)
        # log2(w) additions and one scaling; the gradient is the same filter. A gate adds 9 in all.
        return sum(2 * window.bit_length() + 9 * (self.kernels == "gate") for window in self.windows)

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of state that decoding keeps for each sequence, at `itemsize` bytes per value."""
        return self.past * (self.n_mixed + (self.edge == "partial")) * itemsize

    def extra_repr(self) -> str:
        windows = [window for window, _ in self.groups]
        shape = f"n_embd={self.n_embd}, n_mixed={self.n_mixed}, windows={windows}"
        return f"{shape}, kernels={self.kernels!r}, edge={self.edge!r}, start={self.start!r}"
