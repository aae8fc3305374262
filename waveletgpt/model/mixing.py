"""Mixers: modules that replace some coordinates of the hidden states by a filter of themselves over time.

A new mixer is one class here and one line in `MIXERS`, and its name in `MIXINGS` of configuration.py; see
docs/extend.md.

Shapes: B batch, T tokens, E embedding, C mixed coordinates (the first C of E), S inputs that came before, R values that
decoding remembers.
"""

from __future__ import annotations

from itertools import groupby
from math import comb
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from .configuration import WaveletGPTConfig
from .decoding import Clock, Layout, check_state

try:
    from waveletgpt.ops import cpp, ema_mix, wavelet_mix
except ImportError:
    # A checkpoint brings the operator's definition and nothing else.
    from .reference import ema_mix, wavelet_mix  # type: ignore[import-not-found, no-redef]

    cpp = None  # type: ignore[assignment]


class Mixer(nn.Module):
    """Base of all mixers: zeroes padding, splits the coordinates, carries the state, calls `mix` on the C mixed ones.

    With `causal=False` the result is the mean of two causal ones, forwards and backwards in time.
    """

    averages: ClassVar[bool] = False
    """Whether `mix_edge` applies: the result is a mean (or starts as one) over a finite window."""
    n_states: ClassVar[int] = 1
    """States in the layer's cache; `WaveletGPTConfig.number_of_conv_states` is the total."""

    def __init__(self, config: WaveletGPTConfig):
        super().__init__()
        self.n_mixed = config.n_mixed
        self.parts = [config.n_mixed, config.n_embd - config.n_mixed]
        self.windows = tuple(config.mix_windows())
        self.causal = config.causal
        self.edge = config.mix_edge if self.averages else "zero"

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        """Filter x (B, T, C) causally along T; `state` (B, S, C) is what `remember` gave for the tokens before."""
        raise NotImplementedError

    def remember(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What later tokens need to know of these; of all that, only the last token's is kept."""
        return x

    def state_bytes(self, itemsize: int) -> int:
        """What the states take for a sequence whose hidden states have `itemsize` bytes a value."""
        return self.n_mixed * itemsize

    def reset_parameters(self, init: Any = nn.init) -> None:
        """Set own parameters, not those of modules inside, to their starting values through the functions of `init`."""

    def forward(
        self,
        hidden: torch.Tensor,
        seen: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        cache: Any = None,
        state_idx: int = 0,
        clock: Clock | None = None,
    ) -> torch.Tensor:
        """Mix hidden states.

        Args:
            hidden: (B, T, E).
            seen: (B or 1, T) number of real tokens up to and including each; needed by `mix_edge="partial"`.
            padding_mask: (B, T), 0 where a token is padding: its row is zeroed, or it would leak into real ones.
            cache: this layer's cache of transformers, or None; a mixer that is not causal can use none.
            state_idx: the first of the layer's states that are this mixer's.
            clock: where decoding stands; mixers with windows need it if there is a cache.

        Returns:
            (B, T, E); the coordinates from C on are those of `hidden`.
        """
        if cache is not None and hidden.shape[1] == 1 and padding_mask is None:
            mixed = self.one_token(hidden, cache, state_idx, clock)
            if mixed is not None:
                return mixed
        if padding_mask is not None:
            hidden = hidden * padding_mask[..., None].to(hidden.dtype)
        # Split, not slices: its gradient is one concatenation instead of two zero-filled sums.
        x, rest = hidden.split_with_sizes(self.parts, dim=-1)
        y = self.mix(x, None) if cache is None else self.go_on(x, cache, state_idx, clock)
        if self.edge == "partial":
            y = self._scale(y, seen, clock)
        if not self.causal:
            # Real tokens from each one to the last.
            ahead = None if seen is None else (seen.amax(1, keepdim=True) + 1 - seen).flip(1)
            y = (y + self._scale(self.mix(x.flip(1), None), ahead).flip(1)) / 2
        return torch.cat([y, rest], dim=-1) if self.parts[1] else y

    def one_token(self, hidden: torch.Tensor, cache: Any, state_idx: int, clock: Clock | None) -> torch.Tensor | None:
        """`forward` of one more token, hidden (B, 1, E), by a shorter way; None where there is none."""
        return None

    def go_on(self, x: torch.Tensor, cache: Any, state_idx: int, clock: Clock | None) -> torch.Tensor:
        """`mix`, after the tokens in the cache, which takes these in too."""
        state = None
        if cache.has_previous_state[state_idx]:
            check_state(cache.conv_states[state_idx], x.shape[0], self.n_mixed)
            state = cache.conv_states[state_idx].transpose(1, 2)
        elif (old := cache.conv_states[state_idx]) is not None and old.shape[0] != x.shape[0]:
            cache.is_conv_states_initialized[state_idx] = False  # left over from a batch of another size
        y = self.mix(x, state)
        cache.update_conv_state(self.remember(x, y).transpose(1, 2), state_idx=state_idx, conv_kernel_size=1)
        return y

    def _scale(self, y: torch.Tensor, seen: torch.Tensor | None, clock: Clock | None = None) -> torch.Tensor:
        """Means over what there is, if the edge asks for it."""
        if self.edge == "zero" or seen is None:
            return y
        # The operator's own edge="partial" counts rows; with padding only positions tell how many are real.
        window = torch.tensor(self.windows, device=y.device) if clock is None else clock.layout.window
        return (y * (window / seen[..., None].clamp(min=1).minimum(window))).to(y.dtype)

    def extra_repr(self) -> str:
        windows = f", windows={min(self.windows)}...{max(self.windows)}" if self.windows else ""
        return f"n_mixed={self.n_mixed}{windows}, edge={self.edge!r}"


class Windowed(Mixer):
    """A weighted sum of the last w inputs. Decoding remembers those and no others (see `Layout`)."""

    def __init__(self, config: WaveletGPTConfig):
        super().__init__(config)
        # Windows ascend, so that coordinates with the same one are neighbours.
        self.groups = tuple((window, len(list(members))) for window, members in groupby(self.windows))

    def weights(self) -> list[torch.Tensor] | None:
        """(n, w) or (w,) for each distinct window w, ascending; tap j weighs the value j tokens ago. None: means."""
        raise NotImplementedError

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        return wavelet_mix(x, self.windows, self.weights(), state=state)

    def step(self, x: torch.Tensor, states: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        """`mix` one token x (B, C), the `states` taking it in; with little to call, or it would be felt."""
        raise NotImplementedError

    def compiled_step(self, hidden: torch.Tensor, states: list[torch.Tensor], now: int) -> torch.Tensor | None:
        """`forward` of token number `now`, hidden (B, 1, E), in one call; None where there is none."""
        return None

    def one_token(self, hidden: torch.Tensor, cache: Any, state_idx: int, clock: Clock | None) -> torch.Tensor | None:
        now = clock.last if clock is not None else None
        if cpp is None or self.edge != "zero" or type(now) is not int:
            return None
        if cache.record_past or not cache.has_previous_state[state_idx]:
            return None
        states = [cache.conv_states[state_idx + i] for i in range(self.n_states)]
        # (B, C, S) where the cache recorded the past.
        if states[0].ndim != 2:
            return None
        if states[0].shape != (hidden.shape[0], clock.layout.size):  # type: ignore[union-attr]
            check_state(states[0], hidden.shape[0], clock.layout.size)  # type: ignore[union-attr]
        return self.compiled_step(hidden, states, now)

    def pack(self, inputs: torch.Tensor, clock: Clock) -> list[torch.Tensor]:
        """The states, `n_states` of them, that inputs (B, any, C) up to the last one leave behind."""
        return [clock.pack(inputs)]

    def state_bytes(self, itemsize: int) -> int:
        return sum(self.windows) * itemsize

    def go_on(self, x: torch.Tensor, cache: Any, state_idx: int, clock: Clock | None) -> torch.Tensor:
        assert clock is not None
        indices = range(state_idx, state_idx + self.n_states)
        state, inputs = None, x
        if cache.has_previous_state[state_idx]:
            states = [cache.conv_states[i] for i in indices]
            # (B, C, S) where the cache recorded the past.
            packed = states[0].ndim == 2
            check_state(states[0], x.shape[0], *((clock.layout.size,) if packed else (self.n_mixed, None)))
            if packed:
                for extra in states[1:]:
                    check_state(extra, x.shape[0], self.n_mixed)
            if packed and x.shape[1] == 1 and not cache.record_past and not torch.is_grad_enabled():
                return self.step(x.squeeze(1), states, clock).unsqueeze(1)
            state = clock.unpack(states[0]) if packed else states[0].transpose(1, 2)
            inputs = torch.cat([state, x], dim=1)
        if cache.record_past:
            # To take tokens back, as speculative decoding does, it wants all inputs in order; nothing else then counts.
            whole = inputs.transpose(1, 2)
            new = [(whole, clock.layout.longest)] + [(whole[..., :0], 0)] * (self.n_states - 1)
        else:
            new = [(value, value.shape[-1]) for value in self.pack(inputs, clock)]
        for i, (value, size) in zip(indices, new, strict=True):
            old = cache.conv_states[i]
            if old is not None and old.shape != value.shape:
                cache.is_conv_states_initialized[i] = False
            # In place of what is there, not after it.
            cache.has_previous_state[i] = False
            cache.update_conv_state(value, state_idx=i, conv_kernel_size=size)
        return self.mix(x, state)

    def sums(self, row: torch.Tensor, layout: Layout) -> torch.Tensor:
        """(B, R) -> (B, C) the sum over each coordinate's slots, in float32 or wider."""
        small = row.device.type == "cpu" and row.dtype == torch.float32 and row.numel() < 1 << 15
        if small and not torch.compiler.is_compiling():
            # One call instead of one for each window, which a compiler would make one; on larger ones it is slow.
            lengths = layout.window.expand(row.shape[0], -1)
            return torch.segment_reduce(row, "sum", lengths=lengths, axis=1, unsafe=True)
        parts = row.split_with_sizes([window * n for window, n in self.groups], dim=1)
        wide = torch.promote_types(row.dtype, torch.float32)
        pairs = zip(parts, self.groups, strict=True)
        return torch.cat([part.unflatten(1, (n, window)).sum(-1, dtype=wide) for part, (window, n) in pairs], dim=1)


class FixedMean(Windowed):
    """Causal Haar approximation coefficients: the mean of the last w values (arXiv 2409.12924, Section 3).

    Decoding also remembers the sum over each window, so that a token costs the same however long it is. In float64 what
    rounding leaves behind, adding and taking away, stays out of sight.
    """

    averages = True
    n_states = 2

    def weights(self) -> None:
        return None

    def pack(self, inputs: torch.Tensor, clock: Clock) -> list[torch.Tensor]:
        row = clock.pack(inputs)
        # MPS has no float64.
        return [row, self.sums(row.float() if row.device.type == "mps" else row.double(), clock.layout)]

    def state_bytes(self, itemsize: int) -> int:
        return super().state_bytes(itemsize) + self.n_mixed * torch.float64.itemsize

    def compiled_step(self, hidden: torch.Tensor, states: list[torch.Tensor], now: int) -> torch.Tensor | None:
        row, sums = states
        return cpp.step_mean(hidden, self.windows, row, sums, now) if cpp.can_step(hidden, row) else None

    def step(self, x: torch.Tensor, states: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        row, sums = states
        sums.sub_(row.gather(1, clock.slots())).add_(x)
        row.scatter_(1, clock.slots(), x)
        return sums.to(x.dtype) * clock.layout.rate.to(x.dtype)


class WeightedSum(Windowed):
    """Windows with weights of their own."""

    def weights(self) -> list[torch.Tensor]:
        raise NotImplementedError

    def step(self, x: torch.Tensor, states: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        [row] = states
        row.scatter_(1, clock.slots(), x)
        # All weights in a row, w for each coordinate, turned to where the inputs are.
        pairs = zip(self.weights(), self.groups, strict=True)
        weights = torch.cat([weight.expand(n, window).flatten() for weight, (window, n) in pairs])
        turned = weights.index_select(0, clock.layout.base + clock.ages())
        return self.sums(row * turned, clock.layout).to(x.dtype)

    def compiled_step(self, hidden: torch.Tensor, states: list[torch.Tensor], now: int) -> torch.Tensor | None:
        [row], taps = states, self.weights()
        return cpp.step_filter(hidden, self.groups, taps, row, now) if cpp.can_step(hidden, row, *taps) else None


class Kernels(nn.ParameterList):
    """Weights of means over windows, the last dimension of each tensor."""

    def reset_parameters(self, init: Any = nn.init) -> None:
        for kernel in self:
            init.constant_(kernel, 1.0 / kernel.shape[-1])


class LearnableMean(WeightedSum):
    """The same windows with trained weights, starting from the mean: the paper's "(L)".

    `kernels` holds one tensor per distinct window w, ascending: (n, w) for the n coordinates that have it, or (w,)
    with `mix_sharing="level"`.
    """

    averages = True

    def __init__(self, config: WaveletGPTConfig):
        super().__init__(config)
        shared = config.mix_sharing == "level"
        self.kernels = Kernels(
            torch.full((w,) if shared else (self.windows.count(w), w), 1.0 / w) for w in sorted(set(self.windows))
        )

    def weights(self) -> list[torch.Tensor]:
        return list(self.kernels.parameters())  # faster than list(self.kernels)


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
    return taps / taps.sum()


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


class FixedWavelet(WeightedSum):
    """Approximation or detail coefficients of an undecimated wavelet transform; nothing is learned."""

    def __init__(self, config: WaveletGPTConfig):
        super().__init__(config)
        moments = config.vanishing_moments
        for window, n in self.groups:
            both = wavelet_taps(moments, (window - 1) // (2 * moments - 1) + 1)
            averaged = {"approximation": n, "detail": 0, "both": (n + 1) // 2}[config.mix_band]
            rows = [both[0]] * averaged + [both[1]] * (n - averaged)
            # Saved with the model: it would not be filled in where a checkpoint is loaded without its values.
            self.register_buffer(f"taps{window}", torch.tensor(np.array(rows), dtype=torch.get_default_dtype()))

    def weights(self) -> list[torch.Tensor]:
        return [self.get_buffer(f"taps{window}") for window, _ in self.groups]


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


class ShortConvolution(WeightedSum):
    """Peer: x plus a depthwise causal convolution of 4 learned taps, zero at first (Canon layers, arXiv 2512.17351)."""

    def __init__(self, config: WaveletGPTConfig):
        super().__init__(config)
        self.kernel = nn.Parameter(torch.zeros(self.n_mixed, self.windows[0]))

    def reset_parameters(self, init: Any = nn.init) -> None:
        init.zeros_(self.kernel)

    def weights(self) -> list[torch.Tensor]:
        return [self.kernel]

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        return x + super().mix(x, state)

    def step(self, x: torch.Tensor, states: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        return x + super().step(x, states, clock)

    compiled_step = Windowed.compiled_step


class TokenShift(Mixer):
    """Peer: the previous token's value (token shift, RWKV, arXiv 2305.13048)."""

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        before = torch.zeros_like(x[:, :1]) if state is None else state[:, -1:]
        return torch.cat([before, x[:, :-1]], dim=1)


MIXERS: dict[str, type[Mixer]] = {
    "fixed": FixedMean,
    "learnable": LearnableMean,
    "wavelet": FixedWavelet,
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
        self.n_states = MIXERS[config.mixing].n_states if self.slots else 0
        super().__init__(MIXERS[config.mixing](config) for _ in self.slots)

    def at(self, place: str, hidden: torch.Tensor, **context: Any) -> torch.Tensor:
        """Mix `hidden` (B, T, E) if this block mixes at `place`, else hand it on."""
        if place not in self.slots:
            return hidden
        idx = self.slots.index(place)
        mixer: Any = self._modules[str(idx)]  # faster than self[idx]
        return mixer(hidden, state_idx=idx * self.n_states, **context)
