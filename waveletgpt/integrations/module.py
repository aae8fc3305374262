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
    # A checkpoint brings this, and of the operator the definition.
    from .reference import wavelet_mix  # type: ignore[import-not-found, no-redef]
    from .state import State  # type: ignore[import-not-found, no-redef]

KERNELS = (None, "learnable", "delta", "gate")
EDGES = ("zero", "partial")


class WaveletMixing(nn.Module):
    """Replaces the first C channels of hidden states by causal averages of themselves over time.

    Args:
        n_embd: E.
        windows: powers of two, in tokens. They are spread evenly over the mixed channels, shortest first.
        kernels: what a channel becomes. None: the mean over its window, no parameters. "learnable": a weighted sum
            that starts at the mean. For models that are trained already (at first these change nothing):
            "delta": a weighted sum that starts at the value itself; "gate": x + g (mean - x) with a trained g, at
            first 0.
        mix_fraction: C / E.
        edge: "zero" takes what came before a document's first token as 0; "partial" divides by the number of tokens in
            the window that the document has, min(w, reach + 1), instead of w. Not for "delta", which is not an average.

    Trained weights are kept as what they differ from their start, in one vector: optimizers that treat matrices in a
    way of their own leave it alone, and weight decay pulls to the start instead of to 0.

    Raises:
        ValueError: windows, fraction or edge that cannot be.
    """

    window: Tensor

    def __init__(
        self,
        n_embd: int,
        windows: Sequence[int] = (2, 4),
        kernels: str | None = None,
        mix_fraction: float = 0.5,
        edge: str = "zero",
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
            raise ValueError('edge="partial" is for averages, which kernels="delta" does not start as: use edge="zero"')
        if not 0 < mix_fraction <= 1:
            raise ValueError(f"mix_fraction={mix_fraction} must be more than 0 and at most 1")
        self.n_mixed = round(mix_fraction * n_embd)
        if self.n_mixed < len(scales):
            what = f"{len(scales)} windows for {self.n_mixed} mixed coordinates"
            raise ValueError(f"{what} (mix_fraction={mix_fraction} of n_embd={n_embd}): give fewer, or a wider model")
        self.n_embd, self.kernels, self.edge = n_embd, kernels, edge
        self.windows = tuple(scales[j * len(scales) // self.n_mixed] for j in range(self.n_mixed))
        self.groups = tuple((window, len(list(members))) for window, members in groupby(self.windows))
        self.past = scales[-1] - 1
        """S, how many inputs back it looks."""
        if kernels in ("learnable", "delta"):
            self.deviation = nn.Parameter(torch.zeros(sum(self.windows)))
        elif kernels == "gate":
            self.gate = nn.Parameter(torch.zeros(self.n_mixed))
        # Means have no parameters, so that a checkpoint would show nothing of them: this makes a program that doesn't
        # know mixing say so.
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
        """(n, w) for each distinct window, ascending; tap j weighs the value j tokens ago. None: means."""
        if self.kernels not in ("learnable", "delta"):
            return None
        taps = []
        parts = self.deviation.split([window * n for window, n in self.groups])
        for part, (window, n) in zip(parts, self.groups, strict=True):
            part = part.view(n, window)
            if self.kernels == "learnable":
                taps.append(part + 1 / window)
            else:
                taps.append(part + F.pad(part.new_ones(1), (0, window - 1)))
        return taps

    def state(self, recording: bool = False) -> State:
        """An empty memory of the inputs before, for decoding and for chunks; `forward` reads it and takes x in.

        With `recording` it keeps all inputs, so that `State.crop` can take tokens back.
        """
        return State(self.past, self.edge == "partial", recording)

    def forward(self, x: Tensor, state: State | Tensor | None = None, reach: Tensor | None = None) -> Tensor:
        """Mix hidden states.

        Args:
            x: (B, T, E).
            state: of the tokens before; these are appended to it. Or their hidden states (B, any, E); None at first.
            reach: (B or 1, T) how many tokens before each one belong to its document, of `waveletgpt.ops.reach_of`.

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
        """Operations for one token of a training step, forward and backward."""
        if self.kernels in ("learnable", "delta"):
            # Multiply-adds forward, for the gradient of the input, and for that of the taps.
            return 3 * sum(2 * window for window in self.windows)
        # log2(w) additions and one scaling; the gradient is the same filter. A gate has three more each.
        return sum(2 * window.bit_length() + 9 * (self.kernels == "gate") for window in self.windows)

    def state_bytes(self, itemsize: int) -> int:
        """Bytes that decoding remembers for a sequence, at `itemsize` bytes a value."""
        return self.past * (self.n_mixed + (self.edge == "partial")) * itemsize

    def extra_repr(self) -> str:
        windows = [window for window, _ in self.groups]
        shape = f"n_embd={self.n_embd}, n_mixed={self.n_mixed}, windows={windows}"
        return f"{shape}, kernels={self.kernels!r}, edge={self.edge!r}"
