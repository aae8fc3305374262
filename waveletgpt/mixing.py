"""Mixers: modules that replace some coordinates of the hidden states by a causal filter of themselves over time.

A new mixer is one class here and one line in `MIXERS`; nothing else in the package knows their names.

Shapes: B batch, T tokens, E embedding, C mixed coordinates (the first C of E), S remembered positions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from .configuration import WaveletGPTConfig
from .ops import ema_mix, wavelet_mix


class Mixer(nn.Module):
    """Base of all mixers: zeroes padding, splits the coordinates, carries the state, calls `mix` on the C mixed ones.

    One path serves training, prefill and decoding: what came before is put in front of what comes in.
    """

    averages: ClassVar[bool] = False
    """Whether `mix_edge` applies: the result is a mean (or starts as one) over a finite window."""

    def __init__(self, config: WaveletGPTConfig):
        super().__init__()
        self.n_mixed = config.n_mixed
        self.windows = tuple(config.mix_windows())
        self.edge = config.mix_edge if self.averages else "zero"
        self.state_size = max(1, max(self.windows, default=1) - 1)

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        """Filter x (B, T, C) causally along T; `state` (B, S, C) is what `remember` gave for the tokens before."""
        raise NotImplementedError

    def remember(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What later tokens need of these: the inputs `x` of a finite window, by default."""
        return x

    def reset_parameters(self, init: Any = nn.init) -> None:
        """Set own parameters, not those of modules inside, to their starting values through the functions of `init`."""

    def forward(
        self,
        hidden: torch.Tensor,
        seen: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        cache: Any = None,
        state_idx: int = 0,
    ) -> torch.Tensor:
        """Mix hidden states.

        Args:
            hidden: (B, T, E).
            seen: (B or 1, T) number of real tokens up to and including each; needed by `mix_edge="partial"`.
            padding_mask: (B, T), 0 where a token is padding: its row is zeroed, or it would leak into real ones.
            cache: this layer's cache of transformers, or None.
            state_idx: which of the layer's states is this mixer's.

        Returns:
            (B, T, E); the coordinates from C on are those of `hidden`.
        """
        if padding_mask is not None:
            hidden = hidden * padding_mask[..., None].to(hidden.dtype)
        # Split, not slices: its gradient is one concatenation instead of two zero-filled sums.
        x, rest = hidden.split([self.n_mixed, hidden.shape[-1] - self.n_mixed], dim=-1)
        state = None
        if cache is not None and cache.has_previous_state[state_idx]:
            state = cache.conv_states[state_idx].transpose(1, 2)
        y = self.mix(x, state)
        if cache is not None:
            memory = self.remember(x, y).transpose(1, 2)
            cache.update_conv_state(memory, state_idx=state_idx, conv_kernel_size=self.state_size)
        if self.edge == "partial" and seen is not None:
            # The operator's own edge="partial" counts rows; with padding only positions tell how many are real.
            window = torch.tensor(self.windows, device=y.device)
            y = (y * (window / seen[..., None].clamp(min=1).minimum(window))).to(y.dtype)
        return torch.cat([y, rest], dim=-1) if rest.shape[-1] else y

    def extra_repr(self) -> str:
        windows = f", windows={min(self.windows)}...{max(self.windows)}" if self.windows else ""
        return f"n_mixed={self.n_mixed}{windows}, edge={self.edge!r}"


class FixedMean(Mixer):
    """Causal Haar approximation coefficients: the mean of the last w values (arXiv 2409.12924, Section 3)."""

    averages = True

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        return wavelet_mix(x, self.windows, state=state)


class Kernels(nn.ParameterList):
    """Weights of means over windows, the last dimension of each tensor."""

    def reset_parameters(self, init: Any = nn.init) -> None:
        for kernel in self:
            init.constant_(kernel, 1.0 / kernel.shape[-1])


class LearnableMean(Mixer):
    """The same windows with trained weights, starting from the mean: the paper's "(L)".

    `kernels` holds one tensor per distinct window w, ascending: (n, w) for the n coordinates that have it, or (w,)
    with `mix_sharing="level"`. Tap j weighs the value j tokens ago.
    """

    averages = True

    def __init__(self, config: WaveletGPTConfig):
        super().__init__(config)
        shared = config.mix_sharing == "level"
        self.kernels = Kernels(
            torch.full((w,) if shared else (self.windows.count(w), w), 1.0 / w) for w in sorted(set(self.windows))
        )

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        return wavelet_mix(x, self.windows, list(self.kernels), state=state)


class ExponentialMean(Mixer):
    """y_t = a y_{t-1} + (1 - a) x_t, with a spread linearly over the mixed coordinates in (0, 1): the paper's ablation.

    It remembers its last output, not its inputs.
    """

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        return ema_mix(x, self.decay(x.device), state=None if state is None else state[:, -1])

    def decay(self, device: torch.device | None = None) -> torch.Tensor:
        """(C,) decay a of every mixed coordinate, fastest first."""
        return torch.arange(1, self.n_mixed + 1, device=device, dtype=torch.float32) / (self.n_mixed + 1)

    def remember(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y


class ShortConvolution(Mixer):
    """Peer: x plus a depthwise causal convolution of 4 learned taps, zero at first (Canon layers, arXiv 2512.17351)."""

    def __init__(self, config: WaveletGPTConfig):
        super().__init__(config)
        self.kernel = nn.Parameter(torch.zeros(self.n_mixed, self.windows[0]))

    def reset_parameters(self, init: Any = nn.init) -> None:
        init.zeros_(self.kernel)

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        return x + wavelet_mix(x, self.windows, [self.kernel], state=state)


class TokenShift(Mixer):
    """Peer: the previous token's value (token shift, RWKV, arXiv 2305.13048)."""

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        before = torch.zeros_like(x[:, :1]) if state is None else state[:, -1:]
        return torch.cat([before, x[:, :-1]], dim=1)


MIXERS: dict[str, type[Mixer]] = {
    "fixed": FixedMean,
    "learnable": LearnableMean,
    "ema": ExponentialMean,
    "conv": ShortConvolution,
    "shift": TokenShift,
}


class Mixers(nn.ModuleList):
    """The mixers of one block, one per place: after the block, or before attention and before the feed-forward.

    Empty where the block does not mix.
    """

    places: ClassVar = {"block": ("output",), "input": ("attention", "feed_forward")}

    def __init__(self, config: WaveletGPTConfig, layer: int):
        self.slots = self.places[config.mix_placement] if config.mixes(layer) else ()
        super().__init__(MIXERS[config.mixing](config) for _ in self.slots)

    def at(self, place: str, hidden: torch.Tensor, **context: Any) -> torch.Tensor:
        """Mix `hidden` (B, T, E) if this block mixes at `place`, else hand it on."""
        if place not in self.slots:
            return hidden
        idx = self.slots.index(place)
        return self[idx](hidden, state_idx=idx, **context)
