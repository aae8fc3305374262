"""The filters over time, and the module that has those of one block at their sites.

A new filter is one class here and one line in `MIXERS`. All that the rest of the package asks about a filter is on its
class: the settings it reads, its windows, its FLOPs, what it remembers for decoding. See docs/extend.md.

Shapes: B batch, T tokens, H heads, C mixed channels, w window, n channels that share one.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
import torch
from torch import nn

from .configuration import SITES, WaveletGPTConfig, window_schedule
from .mixer import PLACE, Kernels, Mixer, WeightedSum, Windowed, delayed, start_taps, starting_taps
from .wavelets import wavelet_taps

try:
    from waveletgpt.ops import ema_mix, reach_with_past, wavelet_mix
except ImportError:
    # A checkpoint brings the operator's definition and nothing else.
    from .reference import ema_mix, reach_with_past, wavelet_mix  # type: ignore[import-not-found, no-redef]

# All sites but the embedding, which is not of a block.
BLOCK_SITES = tuple(site for site in SITES if site != "embedding")


class FixedMean(Windowed):
    """Causal means over the last w values, w powers of two: the paper's (Haar approximations; no parameters).

    Source: arXiv 2409.12924, Section 3.
    """

    reads = Windowed.reads | {"mix_edge"}
    averages = True

    def mix(self, x: torch.Tensor, before: torch.Tensor | None, reach: torch.Tensor | None) -> torch.Tensor:
        return wavelet_mix(x, self.windows, edge=self.edge, state=before, reach=reach)

    def flops(self) -> int:
        # The dyadic recurrence: log2(w) additions and one scaling; the gradient is the same filter.
        return sum((w.bit_length() - 1) + 1 for w in self.windows) * 2


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
            result: list[torch.Tensor] = kernels
            return result
        return [h.repeat(n // self.heads, 1) for h, (_, n) in zip(kernels, self.groups, strict=True)]


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

    It remembers its last result, not its inputs.
    """

    def mix(self, x: torch.Tensor, before: torch.Tensor | None, reach: torch.Tensor | None) -> torch.Tensor:
        return ema_mix(x, self.decay(x.device), state=None if before is None else before[:, -1], reach=reach)

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

    It has all channels of its site, and `mix_kernel_size` taps. With `mix_unit_sum` the newest is 1 minus the others,
    and `kernel` holds those alone: so token shift, m x_t + (1 - m) x_{t-1}, has one number a channel (RWKV, arXiv
    2305.13048).
    """

    reads = PLACE | {"mix_residual", "mix_kernel_size", "mix_sharing", "mix_start", "mix_unit_sum"}
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
        self.unit_sum = config.mix_unit_sum
        self.kernel = nn.Parameter(torch.empty(rows, config.mix_kernel_size - self.unit_sum))
        self.reset_parameters()

    def reset_parameters(self, init: Any = nn.init) -> None:
        start_taps(self.kernel, self.start, init, self.salt, skipped=int(self.unit_sum))

    def taps(self) -> list[torch.Tensor]:
        kernel: torch.Tensor = self.kernel
        if self.unit_sum:
            kernel = torch.cat([1 - kernel.sum(1, keepdim=True), kernel], dim=1)
        return [kernel if len(kernel) == self.n_mixed else kernel.repeat(self.n_mixed // len(kernel), 1)]


class TokenShift(Mixer):
    """The previous token's value in place of the channel's own (token shift, RWKV, arXiv 2305.13048)."""

    def mix(self, x: torch.Tensor, before: torch.Tensor | None, reach: torch.Tensor | None) -> torch.Tensor:
        return delayed(x, 1, before, reach)


class Smear(Mixer):
    """x_t + c s(w x_t) x_{t-1}: a learned gate lets the token before in, the same for all channels.

    Source: the smear gate of modded-nanogpt. s is the logistic function, w reads the token's first 12 channels, c
    and w start at 0.
    """

    reads = Mixer.reads - {"mix_residual"}

    def __init__(self, config: WaveletGPTConfig, site: str = "block"):
        super().__init__(config, site)
        self.adds = False  # `reach` is applied here, not by the operator
        self.gate = nn.Parameter(torch.zeros(min(12, self.n_mixed)))
        self.scale = nn.Parameter(torch.zeros(1))

    def mix(self, x: torch.Tensor, before: torch.Tensor | None, reach: torch.Tensor | None) -> torch.Tensor:
        gate = torch.sigmoid(x[..., : len(self.gate)] @ self.gate.to(x.dtype))
        return x + (self.scale * gate)[..., None].to(x.dtype) * delayed(x, 1, before, reach)

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
        start_taps(self.bias, self.start, init, self.salt)

    def mix(self, x: torch.Tensor, before: torch.Tensor | None, reach: torch.Tensor | None) -> torch.Tensor:
        taps = nn.functional.linear(x, self.weight).unflatten(-1, (self.sets, self.kernel_size)) + self.bias
        y = x.unflatten(-1, (-1, self.sets)) * taps[:, :, None, :, 0]
        for j in range(1, self.kernel_size):
            y = y + delayed(x, j, before, reach).unflatten(-1, (-1, self.sets)) * taps[:, :, None, :, j]
        result: torch.Tensor = y.flatten(-2).to(x.dtype)
        return result

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
        window_schedule(n, config.min_window, config.max_window)  # raises for windows that are not possible
        return [max(config.max_window, (config.mix_row or 0) + 1)] * n

    def __init__(self, config: WaveletGPTConfig, site: str = "block"):
        super().__init__(config, site)
        self.adds = False  # `reach` is applied here, not by the operator
        self.levels = [w for w in (1 << k for k in range(1, config.max_window.bit_length())) if w >= config.min_window]
        self.longest, self.row_length = config.max_window, config.mix_row
        self.approximation = nn.Parameter(torch.zeros(len(self.levels), self.n_mixed))
        self.detail = nn.Parameter(torch.zeros(len(self.levels), self.n_mixed))
        if self.row_length:
            self.row = nn.Parameter(torch.zeros(self.n_mixed))

    def reset_parameters(self, init: Any = nn.init) -> None:
        for parameter in self.parameters():
            init.zeros_(parameter)

    def mix(self, x: torch.Tensor, before: torch.Tensor | None, reach: torch.Tensor | None) -> torch.Tensor:
        T = x.shape[1]
        mean = x if before is None else torch.cat([before, x], dim=1)
        within = None if reach is None else reach_with_past(reach, mean.shape[1] - T)
        y, window, level = x, 1, 0
        while window < self.longest:
            finer, window = mean, 2 * window
            mean = (finer + delayed(finer, window // 2, reach=within)) / 2
            if window in self.levels:
                coarse, fine = mean[:, -T:], finer[:, -T:]
                y = y + self.approximation[level] * coarse + self.detail[level] * (fine - coarse)
                level += 1
        if self.row_length:
            y = y + self.row * delayed(x, self.row_length, before, reach)
        return y.to(x.dtype)

    def flops(self) -> int:
        return (6 * len(self.levels) + (2 if self.row_length else 0)) * self.n_mixed * 3


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
    """The mixers at those of `sites` where the configuration asks for one, in the order of `sites`."""

    def __init__(self, config: WaveletGPTConfig, sites: tuple[str, ...]):
        kind = MIXERS.get(config.mixing)
        self.sites = tuple(site for site in sites if site in config.sites) if kind is not None else ()
        super().__init__(kind(config, site) for site in self.sites if kind is not None)

    def at(self, site: str, hidden: torch.Tensor, reach: torch.Tensor | None = None, cache: Any = None) -> torch.Tensor:
        """`hidden`, (B, T, E) or (B, T, H, E), filtered by the mixer at `site`; unchanged where there is none.

        `cache` is the block's layer of it, which has the states (see decoding.py).
        """
        if site not in self.sites:
            return hidden
        mixer: Any = self._modules[str(self.sites.index(site))]  # faster than self[...]
        state = None
        if cache is not None and mixer.past:
            state = cache.state(mixer.name, mixer.past, mixer.edge == "partial")
        result: torch.Tensor = mixer(hidden, reach, state)
        return result


__all__ = ["BLOCK_SITES", "MIXERS", "Mixer", "Mixers", "starting_taps"]
