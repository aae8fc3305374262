"""Filters over time, and the module that applies one at a site of the transformer.

A new filter is one class here and one line in `MIXERS`. All that the rest of the package asks about a filter is on its
class: the settings it reads, its windows, its FLOPs, what it remembers for decoding. See docs/extend.md.

Shapes: B batch, T tokens, E channels at the site (those of one head, where a site has heads), H heads, C mixed channels
(the first of each head), S inputs that came before, R values that decoding remembers, w window, n channels that share
one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from math import gcd
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from .configuration import SITES, WaveletGPTConfig, window_schedule
from .decoding import Clock, Layout, check_state
from .wavelets import wavelet_taps

try:
    from waveletgpt.ops import cpp, ema_mix, wavelet_mix
except ImportError:
    # A checkpoint brings the operator's definition and nothing else.
    from .reference import ema_mix, wavelet_mix  # type: ignore[import-not-found, no-redef]

    cpp = None  # type: ignore[assignment]

# Settings that every filter reads: where it is put. `mix_fraction`, and what a filter alone has, it names itself.
PLACE = frozenset({"mix_placement", "mix_layers"})
# All sites but the embedding, which is not of a block.
BLOCK_SITES = tuple(site for site in SITES if site != "embedding")


class Mixer(nn.Module):
    """Base of all filters: zeroes padding, splits the channels, carries the state, calls `mix` on the C mixed ones.

    Where a site has heads, the first channels of each head are mixed, and channels with one window are neighbours:
    coordinate c H + h is channel c of head h. With `causal=False` the result is the mean of two causal ones, forwards
    and backwards in time.
    """

    reads: ClassVar[frozenset[str]] = PLACE | {"mix_fraction", "mix_residual"}
    """Names of the settings that have an effect; others are refused where they are given."""
    residual: ClassVar[bool] = False
    """Whether the result is added to its channels instead of replacing them, unless `mix_residual` says so."""
    averages: ClassVar[bool] = False
    """Whether `mix_edge` applies: the result is a mean (or starts as one) over a finite window."""
    n_states: ClassVar[int] = 1
    """States in the layer's cache; `WaveletGPTConfig.number_of_conv_states` is the total."""

    @classmethod
    def share(cls, config: WaveletGPTConfig, width: int) -> int:
        """How many of `width` channels are mixed."""
        return round(config.mix_fraction * width)

    @classmethod
    def schedule(cls, config: WaveletGPTConfig, n: int) -> list[int]:
        """Window in tokens of each of `n` channels, ascending; empty for a filter without windows.

        Raises:
            ValueError: settings that make no windows.
        """
        return []

    def __init__(self, config: WaveletGPTConfig, site: str = "block"):
        super().__init__()
        self.heads, width = config.site_shape(site)
        self.salt = SITES.index(site)  # or what two sites draw would be the same
        share = self.share(config, width)
        self.n_mixed = share * self.heads
        self.parts = [self.n_mixed, (width - share) * self.heads]
        self.windows = tuple(w for w in self.schedule(config, share) for _ in range(self.heads))
        self.causal = config.causal
        self.edge = config.mix_edge if self.averages else "zero"
        self.adds = self.residual if config.mix_residual is None else config.mix_residual

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        """Filter x (B, T, C) causally along T; `state` (B, S, C) is what `remember` gave for the tokens before."""
        raise NotImplementedError

    def remember(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(B, T, C), of which the last token's are kept for those that follow; x are inputs of `mix`, y its results."""
        return x

    def flops(self) -> int:
        """Operations for one token of a training step, forward and backward."""
        return 0

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
        """Mix what is at the site.

        Args:
            hidden: (B, T, E), or (B, T, H, E) where the site has heads.
            seen: (B or 1, T) number of real tokens up to and including each; needed by `mix_edge="partial"`.
            padding_mask: (B, T), 0 where a token is padding: its row is zeroed, or it would leak into real ones.
            cache: this layer's cache of transformers, or None; a mixer that is not causal can use none.
            state_idx: the first of the layer's states that are this mixer's.
            clock: where decoding stands; mixers with windows need it if there is a cache.

        Returns:
            As `hidden`, whose channels that are not mixed are left alone.
        """
        if hidden.ndim == 4:
            B, T, H, E = hidden.shape
            flat = hidden.transpose(2, 3).reshape(B, T, E * H)
            mixed = Mixer.forward(self, flat, seen, padding_mask, cache, state_idx, clock)
            return mixed.view(B, T, E, H).transpose(2, 3)
        if cache is not None and hidden.shape[1] == 1 and padding_mask is None:
            one = self.one_token(hidden, cache, state_idx, clock)
            if one is not None:
                return one
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
        if self.adds and not self.folded:
            y = x + y
        return torch.cat([y, rest], dim=-1) if self.parts[1] else y

    @property
    def folded(self) -> bool:
        """Whether what `mix` returns has its input added to it already."""
        return False

    def one_token(self, hidden: torch.Tensor, cache: Any, state_idx: int, clock: Clock | None) -> torch.Tensor | None:
        """`forward` of one more token, hidden (B, 1, E), by a shorter way; None where there is none."""
        return None

    def go_on(self, x: torch.Tensor, cache: Any, state_idx: int, clock: Clock | None) -> torch.Tensor:
        """`mix`, after the tokens in the cache, which takes these in too."""
        state = None
        if cache.has_previous_state[state_idx]:
            check_state(cache.conv_states[state_idx], x, x.shape[0], self.n_mixed)
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
        return f"n_mixed={self.n_mixed}{windows}, edge={self.edge!r}" + (", residual" if self.adds else "")


class Windowed(Mixer):
    """A weighted sum of the last w inputs. Decoding remembers those and no others (see `Layout`)."""

    reads = Mixer.reads | {"min_window", "max_window", "mix_allocation"}

    @classmethod
    def schedule(cls, config: WaveletGPTConfig, n: int) -> list[int]:
        return window_schedule(n, config.min_window, config.max_window, config.mix_allocation)

    def __init__(self, config: WaveletGPTConfig, site: str = "block"):
        super().__init__(config, site)
        # Windows ascend, so that channels with the same one are neighbours.
        self.groups = tuple((window, len(list(members))) for window, members in groupby(self.windows))

    def step(self, x: torch.Tensor, states: list[torch.Tensor], clock: Clock) -> torch.Tensor | None:
        """`mix` one token x (B, C), the `states` taking it in, with little to call, or it would be felt.

        None where there is no such way: then all inputs are laid out and `mix` goes over them.
        """
        return None

    def compiled_step(self, hidden: torch.Tensor, states: list[torch.Tensor], now: int) -> torch.Tensor | None:
        """`forward` of token number `now`, hidden (B, 1, E), without adding, in one call; None where there is none."""
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
        if states[0].shape != (hidden.shape[0], clock.layout.size) or states[0].dtype != hidden.dtype:  # type: ignore[union-attr]
            check_state(states[0], hidden, hidden.shape[0], clock.layout.size)  # type: ignore[union-attr]
        out = self.compiled_step(hidden, states, now)
        if out is not None and self.adds:
            out[..., : self.n_mixed] += hidden[..., : self.n_mixed]
        return out

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
            check_state(states[0], x, x.shape[0], *((clock.layout.size,) if packed else (self.n_mixed, None)))
            if packed:
                for extra in states[1:]:
                    check_state(extra, None, x.shape[0], self.n_mixed)
            if packed and x.shape[1] == 1 and not cache.record_past and not torch.is_grad_enabled():
                one = self.step(x.squeeze(1), states, clock)
                if one is not None:
                    return one.unsqueeze(1)
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
        """(B, R) -> (B, C) the sum over each channel's slots, in float32 or wider."""
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
    """Causal means over the last w values, w powers of two: the paper's (Haar approximations; no parameters).

    Source: arXiv 2409.12924, Section 3. Decoding also remembers the sum over each window, so that a token costs the
    same however long it is. In float64 what rounding leaves behind, adding and taking away, stays out of sight.
    """

    reads = Windowed.reads | {"mix_edge"}
    averages = True
    n_states = 2

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        return wavelet_mix(x, self.windows, state=state)

    def flops(self) -> int:
        # The dyadic recurrence: log2(w) additions and one scaling; the gradient is the same filter.
        return sum((w.bit_length() - 1) + 1 for w in self.windows) * 2

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
    """Windows with weights of their own: `taps`."""

    def taps(self) -> list[torch.Tensor]:
        """(n, w) or (w,) for each distinct window w, ascending; tap j weighs the value j tokens ago."""
        raise NotImplementedError

    @property
    def folded(self) -> bool:
        # Adding the input is one more on the newest tap. Not where the sum is scaled afterwards.
        return self.adds and self.edge == "zero"

    def weights(self) -> list[torch.Tensor]:
        """The taps that are applied."""
        taps = self.taps()
        if not self.folded:
            return taps
        return [h + nn.functional.pad(h.new_ones(1), (0, h.shape[-1] - 1)) for h in taps]

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        return wavelet_mix(x, self.windows, self.weights(), state=state)

    def flops(self) -> int:
        # Multiply-adds forward, for the gradient of the input, and for that of the taps if they are learned.
        return sum(2 * w for w in self.windows) * (3 if any(True for _ in self.parameters()) else 2)

    def step(self, x: torch.Tensor, states: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        [row] = states
        row.scatter_(1, clock.slots(), x)
        # All weights in a row, w for each channel, turned to where the inputs are.
        pairs = zip(self.weights(), self.groups, strict=True)
        weights = torch.cat([weight.expand(n, window).flatten() for weight, (window, n) in pairs])
        turned = weights.index_select(0, clock.layout.base + clock.ages())
        return self.sums(row * turned, clock.layout).to(x.dtype)

    def compiled_step(self, hidden: torch.Tensor, states: list[torch.Tensor], now: int) -> torch.Tensor | None:
        [row], taps = states, self.taps()
        return cpp.step_filter(hidden, self.groups, taps, row, now) if cpp.can_step(hidden, row, *taps) else None


def starting_taps(start: str, n: int, w: int, salt: int = 0) -> torch.Tensor:
    """(n, w) taps that training starts from; tap j weighs the value j tokens ago.

    - "mean": 1/w.
    - "haar": 1/w for half of the channels; the others get the detail that the mean over w leaves out of that over w/2.
    - "zero".
    - "uniform": between -1/sqrt(w) and 1/sqrt(w), as torch's Conv1d starts.
    - "convex": drawn from all that are positive and sum to 1 (KV shifting, with two taps; arXiv 2411.19574).
    - "recent": 1/2 for the newest, 1/(2 w) for the others (Primer, arXiv 2109.08668).

    Those that are drawn follow the seed (and `salt`) and leave torch's generator where it was, so that models with
    other starts have the same weights elsewhere.
    """
    taps = torch.zeros(n, w)
    if start in ("mean", "haar"):
        taps += 1 / w
        if start == "haar":
            taps[(n + 1) // 2 :, (w + 1) // 2 :] *= -1
            if w == 1:
                taps[(n + 1) // 2 :] = 0
    elif start == "recent":
        taps += 1 / (2 * w)
        taps[:, 0] = 0.5
    elif start in ("uniform", "convex"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 62, ())) + salt)
            if start == "uniform":
                taps.uniform_(-(w**-0.5), w**-0.5)
            else:
                taps.exponential_()
                taps /= taps.sum(1, keepdim=True)
    return taps


class Kernels(nn.Module):
    """Taps for each distinct window; called to get them, so that tools which move parameters in and out notice."""

    def __init__(self, start: str, shapes: Iterable[tuple[int, ...]], salt: int = 0):
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(str(i), nn.Parameter(torch.empty(shape)))
        self.start, self.salt = start, salt
        self.reset_parameters()

    def __iter__(self) -> Iterator[nn.Parameter]:
        return self.parameters()

    def forward(self) -> list[torch.Tensor]:
        return list(self._parameters.values())  # type: ignore[arg-type]

    def reset_parameters(self, init: Any = nn.init) -> None:
        for kernel in self.parameters():
            _start(kernel, self.start, init, self.salt)


class LearnableMean(WeightedSum):
    """Weighted sums over the same windows, with weights that start at 1/w and are trained: the paper's "(L)".

    `kernels` holds one tensor per distinct window w, ascending: (n, w) for the n channels that have it, (w,) with
    `mix_sharing="level"`, (H, w) with "head".
    """

    reads = Windowed.reads | {"mix_edge", "mix_sharing", "mix_start"}
    averages = True

    def __init__(self, config: WaveletGPTConfig, site: str = "block"):
        super().__init__(config, site)
        self.sharing = config.mix_sharing
        shapes = {"coordinate": lambda n, w: (n, w), "level": lambda n, w: (w,), "head": lambda n, w: (self.heads, w)}
        self.kernels = Kernels(
            config.mix_start or "mean", (shapes[self.sharing](n, w) for w, n in self.groups), self.salt
        )

    def taps(self) -> list[torch.Tensor]:
        kernels = self.kernels()
        if self.sharing != "head":
            return kernels
        return [h.repeat(n // self.heads, 1) for h, (_, n) in zip(kernels, self.groups, strict=True)]


def _start(kernel: torch.Tensor, start: str, init: Any, salt: int) -> None:
    """Fill taps (..., w) through the functions of `init`, which leave alone what was loaded."""
    if kernel.device.type == "meta":
        return
    value = starting_taps(start, kernel.numel() // kernel.shape[-1], kernel.shape[-1], salt).view_as(kernel)
    if init is nn.init:
        with torch.no_grad():
            kernel.copy_(value)
    else:
        init.copy_(kernel, value)


class FixedWavelet(WeightedSum):
    """Approximation or detail coefficients of an undecimated wavelet transform; nothing is learned."""

    reads = Windowed.reads | {"mix_wavelet", "mix_band"}

    @classmethod
    def schedule(cls, config: WaveletGPTConfig, n: int) -> list[int]:
        scales = super().schedule(config, n)
        return [(scale - 1) * (2 * config.vanishing_moments - 1) + 1 for scale in scales]

    def __init__(self, config: WaveletGPTConfig, site: str = "block"):
        super().__init__(config, site)
        moments = config.vanishing_moments
        for window, n in self.groups:
            both = wavelet_taps(moments, (window - 1) // (2 * moments - 1) + 1)
            averaged = {"approximation": n, "detail": 0, "both": (n + 1) // 2}[config.mix_band]
            rows = [both[0]] * averaged + [both[1]] * (n - averaged)
            # Saved with the model: it would not be filled in where a checkpoint is loaded without its values.
            self.register_buffer(f"taps{window}", torch.tensor(np.array(rows), dtype=torch.get_default_dtype()))

    def taps(self) -> list[torch.Tensor]:
        return [self.get_buffer(f"taps{window}") for window, _ in self.groups]


class ExponentialMean(Mixer):
    """Exponential averages, the paper's ablation: y_t = a y_{t-1} + (1 - a) x_t, with a spread linearly over (0, 1).

    It remembers its last output, not its inputs.
    """

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        return ema_mix(x, self.decay(x.device), state=None if state is None else state[:, -1])

    def decay(self, device: torch.device | None = None) -> torch.Tensor:
        """(C,) decay a of every mixed channel, fastest first; of every head's, where there are heads."""
        share = self.n_mixed // self.heads
        decay = torch.arange(1, share + 1, device=device, dtype=torch.float32) / (share + 1)
        return decay.repeat_interleave(self.heads)

    def remember(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y

    def flops(self) -> int:
        return 3 * self.n_mixed * 2


class ShortConvolution(WeightedSum):
    """A depthwise causal convolution of a few learned taps, added to its channels, zero at first (arXiv 2512.17351).

    It has all channels of its site, and `mix_kernel_size` taps.
    """

    reads = PLACE | {"mix_residual", "mix_kernel_size", "mix_sharing", "mix_start"}
    residual = True

    @classmethod
    def share(cls, config: WaveletGPTConfig, width: int) -> int:
        return width

    @classmethod
    def schedule(cls, config: WaveletGPTConfig, n: int) -> list[int]:
        return [config.mix_kernel_size] * n

    def __init__(self, config: WaveletGPTConfig, site: str = "block"):
        super().__init__(config, site)
        self.start = config.mix_start or "zero"
        rows = {"coordinate": self.n_mixed, "level": 1, "head": self.heads}[config.mix_sharing]
        self.kernel = nn.Parameter(torch.empty(rows, config.mix_kernel_size))
        self.reset_parameters()

    def reset_parameters(self, init: Any = nn.init) -> None:
        _start(self.kernel, self.start, init, self.salt)

    def taps(self) -> list[torch.Tensor]:
        rows = len(self.kernel)
        return [self.kernel if rows == self.n_mixed else self.kernel.repeat(self.n_mixed // rows, 1)]


class TokenShift(Mixer):
    """The previous token's value in place of the channel's own (token shift, RWKV, arXiv 2305.13048)."""

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        return _shifted(x, state)


def _shifted(x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
    """(B, T, C) each token's predecessor, zero before the first."""
    before = torch.zeros_like(x[:, :1]) if state is None else state[:, -1:]
    return torch.cat([before, x[:, :-1]], dim=1)


class Smear(Mixer):
    """x_t + c s(w x_t) x_{t-1}: a learned gate lets the token before in, the same for all channels.

    Source: the smear gate of modded-nanogpt. s is the logistic function, w reads the token's first 12 channels, c
    and w start at 0.
    """

    reads = Mixer.reads - {"mix_residual"}

    def __init__(self, config: WaveletGPTConfig, site: str = "block"):
        super().__init__(config, site)
        self.adds = False  # it does by itself
        self.gate = nn.Parameter(torch.zeros(min(12, self.n_mixed)))
        self.scale = nn.Parameter(torch.zeros(1))

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        gate = torch.sigmoid(x[..., : len(self.gate)] @ self.gate.to(x.dtype))
        return x + (self.scale * gate)[..., None].to(x.dtype) * _shifted(x, state)

    def flops(self) -> int:
        return (2 * self.n_mixed + 2 * len(self.gate)) * 3

    def reset_parameters(self, init: Any = nn.init) -> None:
        init.zeros_(self.gate)
        init.zeros_(self.scale)


class DynamicConvolution(Windowed):
    """A short convolution whose taps depend on the token: h(t) = b + W x_t, one set of taps a head (arXiv 2606.03825).

    Added to its channels; W starts at 0, b at `mix_start` ("zero"). Where the site has no heads, every G-th channel
    has the same taps, with G as many as the model's heads if the channels divide by that.
    """

    reads = PLACE | {"mix_fraction", "mix_residual", "mix_kernel_size", "mix_start"}
    residual = True

    @classmethod
    def schedule(cls, config: WaveletGPTConfig, n: int) -> list[int]:
        return [config.mix_kernel_size] * n

    def __init__(self, config: WaveletGPTConfig, site: str = "block"):
        super().__init__(config, site)
        self.start, self.kernel_size = config.mix_start or "zero", config.mix_kernel_size
        self.sets = self.heads if self.heads > 1 else gcd(self.n_mixed, config.n_head)
        self.weight = nn.Parameter(torch.empty(self.sets * self.kernel_size, self.n_mixed))
        self.bias = nn.Parameter(torch.empty(self.sets, self.kernel_size))
        self.reset_parameters()

    def reset_parameters(self, init: Any = nn.init) -> None:
        init.zeros_(self.weight)
        _start(self.bias, self.start, init, self.salt)

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        T = x.shape[1]
        taps = nn.functional.linear(x, self.weight).unflatten(-1, (self.sets, self.kernel_size)) + self.bias
        inputs = x if state is None else torch.cat([state, x], dim=1)
        inputs = nn.functional.pad(inputs, (0, 0, max(0, T + self.kernel_size - 1 - inputs.shape[1]), 0))
        inputs = inputs[:, inputs.shape[1] - T - self.kernel_size + 1 :].unflatten(-1, (-1, self.sets))
        last = self.kernel_size - 1
        parts = (inputs[:, last - j : last - j + T] * taps[:, :, None, :, j] for j in range(self.kernel_size))
        return sum(parts, start=torch.zeros((), dtype=x.dtype, device=x.device)).flatten(-2).to(x.dtype)

    def flops(self) -> int:
        return (2 * self.weight.numel() + 2 * self.kernel_size * self.n_mixed) * 3


class Bands(Windowed):
    """x + sum over levels k of (a_k mean_k + d_k detail_k) (+ r times the value a row before, for pictures).

    mean_k is the mean over 2^k tokens, detail_k = mean_{k-1} - mean_k; 2^k runs from `min_window` to `max_window`. A
    learned number per level and channel, all 0 at first, instead of a weight per tap: long windows with few parameters.
    `mix_row` is the length of a row in tokens.
    """

    reads = PLACE | {"mix_fraction", "min_window", "max_window", "mix_row"}

    @classmethod
    def schedule(cls, config: WaveletGPTConfig, n: int) -> list[int]:
        window_schedule(n, config.min_window, config.max_window)  # tells of windows that do not go
        return [max(config.max_window, (config.mix_row or 0) + 1)] * n

    def __init__(self, config: WaveletGPTConfig, site: str = "block"):
        super().__init__(config, site)
        self.adds = False  # it does by itself
        self.levels = [w for w in (1 << k for k in range(1, config.max_window.bit_length())) if w >= config.min_window]
        self.longest, self.row_length = config.max_window, config.mix_row
        self.approximation = nn.Parameter(torch.zeros(len(self.levels), self.n_mixed))
        self.detail = nn.Parameter(torch.zeros(len(self.levels), self.n_mixed))
        if self.row_length:
            self.row = nn.Parameter(torch.zeros(self.n_mixed))

    def reset_parameters(self, init: Any = nn.init) -> None:
        for parameter in self.parameters():
            init.zeros_(parameter)

    def mix(self, x: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        T = x.shape[1]
        mean = inputs = x if state is None else torch.cat([state, x], dim=1)
        y, window, level = x, 1, 0
        while window < self.longest:
            finer, window = mean, 2 * window
            mean = (finer + _delayed(finer, window // 2)) / 2
            if window in self.levels:
                coarse, fine = mean[:, -T:], finer[:, -T:]
                y = y + self.approximation[level] * coarse + self.detail[level] * (fine - coarse)
                level += 1
        if self.row_length:
            y = y + self.row * _delayed(inputs, self.row_length)[:, -T:]
        return y.to(x.dtype)

    def flops(self) -> int:
        return (6 * len(self.levels) + (2 if self.row_length else 0)) * self.n_mixed * 3


def _delayed(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, T, C) the value so many tokens before, zero before the first."""
    return nn.functional.pad(x, (0, 0, tokens, 0))[:, : x.shape[1]]


MIXERS: dict[str, type[Mixer]] = {
    "fixed": FixedMean,
    "learnable": LearnableMean,
    "wavelet": FixedWavelet,
    "ema": ExponentialMean,
    "conv": ShortConvolution,
    "shift": TokenShift,
    "smear": Smear,
    "dynamic": DynamicConvolution,
    "bands": Bands,
}


class Mixers(nn.ModuleList):
    """The mixers at those of `sites` where the configuration asks for one, in the order of `sites`.

    Their states in the cache of a layer begin with number `first_state`.
    """

    def __init__(self, config: WaveletGPTConfig, sites: tuple[str, ...], first_state: int = 0):
        kind = MIXERS.get(config.mixing)
        self.sites = tuple(site for site in sites if site in config.sites) if kind is not None else ()
        self.first_state, self.n_states = first_state, kind.n_states if kind is not None else 0
        super().__init__(kind(config, site) for site in self.sites if kind is not None)

    def at(self, site: str, hidden: torch.Tensor, clocks: Any = None, **context: Any) -> torch.Tensor:
        """Filter `hidden`, (B, T, E) or (B, T, H, E), if there is a mixer at `site`, else hand it on."""
        if site not in self.sites:
            return hidden
        idx = self.sites.index(site)
        mixer: Any = self._modules[str(idx)]  # faster than self[idx]
        clock = clocks.get(mixer.windows) if clocks is not None and mixer.windows else None
        return mixer(hidden, state_idx=self.first_state + idx * self.n_states, clock=clock, **context)
