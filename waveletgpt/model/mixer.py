"""`Mixer`, the base of all filters over time, and of those with windows and with weights. The filters are in mixing.py.

Shapes: B batch, T tokens, E channels at the site (those of one head, where a site has heads), H heads, C mixed channels
(the first of each head), S inputs that came before, w window, n channels that share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import nn

from .configuration import SITES, WaveletGPTConfig, window_schedule
from .state import State

try:
    from waveletgpt.ops import ahead, wavelet_mix
except ImportError:
    # A checkpoint brings the operator's definition and nothing else.
    from .reference import ahead, wavelet_mix  # type: ignore[import-not-found, no-redef]

# Settings that every filter reads: where it is put. `mix_fraction`, and what a filter alone has, it names itself.
PLACE = frozenset({"mix_placement", "mix_layers"})


class Mixer(nn.Module):
    """Base of all filters: splits the channels, recalls the inputs before, calls `mix` on the C mixed ones.

    Where a site has heads, the first channels of each head are mixed, and channels with one window are neighbours:
    channel c H + h is channel c of head h. With `causal=False` the result is the mean of two causal ones, forwards
    and backwards in time.
    """

    reads: ClassVar[frozenset[str]] = PLACE | {"mix_fraction", "mix_residual"}
    """Names of the settings that have an effect; others are refused where they are given."""
    residual: ClassVar[bool] = False
    """Whether the result is added to its channels instead of replacing them, unless `mix_residual` says so."""
    averages: ClassVar[bool] = False
    """Whether `mix_edge` applies: the result is a mean (or starts as one) over a finite window."""

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
        self.name = f"{config.mixing}@{site}"
        """What its state is called in a cache."""
        self.heads, width = config.site_shape(site)
        self.salt = SITES.index(site)  # otherwise two sites would start from the same random taps
        share = self.share(config, width)
        self.n_mixed = share * self.heads
        self.parts = [self.n_mixed, (width - share) * self.heads]
        self.windows = tuple(w for w in self.schedule(config, share) for _ in range(self.heads))
        self.past = max(self.windows, default=2) - 1
        """S, how many inputs it looks back."""
        self.causal, self.context = config.causal, config.n_positions
        self.edge = config.mix_edge if self.averages else "zero"
        self.adds = self.residual if config.mix_residual is None else config.mix_residual

    def mix(self, x: torch.Tensor, before: torch.Tensor | None, reach: torch.Tensor | None) -> torch.Tensor:
        """Filter x (B, T, C) causally along T.

        Args:
            before: (B, at most S, C) what `remember` gave for the tokens before; None at the start.
            reach: (B or 1, T) how many tokens before each one it may look at; None: all. Most filters hand it on to
                the operator; `delayed` does it by hand.
        """
        raise NotImplementedError

    def remember(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(B, T, C) what is kept of inputs x of `mix` and its results y, for the tokens that follow."""
        return x

    def flops(self) -> int:
        """Operations for one token of a training step, forward and backward."""
        return 0

    def state_bytes(self, itemsize: int) -> int:
        """What it remembers at the full context, of hidden states that have `itemsize` bytes a value."""
        return min(self.past, self.context) * (self.n_mixed + (self.edge == "partial")) * itemsize

    def reset_parameters(self, init: Any = nn.init) -> None:
        """Set own parameters, not those of modules inside, to their starting values through the functions of `init`."""

    def forward(
        self, hidden: torch.Tensor, reach: torch.Tensor | None = None, state: State | None = None
    ) -> torch.Tensor:
        """Mix what is at the site.

        Args:
            hidden: (B, T, E), or (B, T, H, E) where the site has heads.
            reach: (B or 1, T) how many tokens before each one are of its document, -1 for padding (see
                `waveletgpt.ops.reach_of`); None: all.
            state: of the tokens before; these are appended to it. None: no tokens before. A mixer that is not causal
                has no state.

        Returns:
            As `hidden`, whose channels that are not mixed are left alone.
        """
        if hidden.ndim == 4:
            B, T, H, E = hidden.shape
            mixed = Mixer.forward(self, hidden.transpose(2, 3).reshape(B, T, E * H), reach, state)
            # Fused attention wants the channels of a head side by side; with others it takes a slow way, unasked.
            return mixed.view(B, T, E, H).transpose(2, 3).contiguous()
        # Split, not slices: its gradient is one concatenation instead of two zero-filled sums.
        x, rest = hidden.split_with_sizes(self.parts, dim=-1)
        before, within = (None, reach) if state is None else state.recall(x, reach)
        y = self.mix(x, before, within)
        if state is not None:
            state.append(self.remember(x, y), reach)
        if not self.causal:
            turned = None if reach is None else ahead(reach).flip(1)
            y = (y + self.mix(x.flip(1), None, turned).flip(1)) / 2
        if self.adds and not self.folded:
            y = x + y
        return torch.cat([y, rest], dim=-1) if self.parts[1] else y

    @property
    def folded(self) -> bool:
        """Whether what `mix` returns has its input added to it already."""
        return False

    def extra_repr(self) -> str:
        windows = f", windows={min(self.windows)}...{max(self.windows)}" if self.windows else ""
        return f"n_mixed={self.n_mixed}{windows}, edge={self.edge!r}" + (", residual" if self.adds else "")


def delayed(
    x: torch.Tensor, tokens: int, before: torch.Tensor | None = None, reach: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, T, C) the value of x, after `before` (B, any, C), so many tokens ago; 0 where `reach` or the start forbid."""
    T = x.shape[1]
    whole = x if before is None else torch.cat([before, x], dim=1)
    first = whole.shape[1] - T - tokens
    y = whole[:, first : first + T] if first >= 0 else nn.functional.pad(whole, (0, 0, -first, 0))[:, :T]
    # `where`, not a product: a NaN of another document stays there.
    return y if reach is None else torch.where((reach >= tokens).unsqueeze(2), y, 0)


class Windowed(Mixer):
    """A filter of the last w inputs of each channel."""

    reads = Mixer.reads | {"min_window", "max_window", "mix_allocation"}

    @classmethod
    def schedule(cls, config: WaveletGPTConfig, n: int) -> list[int]:
        return window_schedule(n, config.min_window, config.max_window, config.mix_allocation)

    def __init__(self, config: WaveletGPTConfig, site: str = "block"):
        super().__init__(config, site)
        # Windows ascend, so that channels with the same one are neighbours.
        self.groups = tuple((window, len(list(members))) for window, members in groupby(self.windows))


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

    def mix(self, x: torch.Tensor, before: torch.Tensor | None, reach: torch.Tensor | None) -> torch.Tensor:
        return wavelet_mix(x, self.windows, self.weights(), edge=self.edge, state=before, reach=reach)

    def flops(self) -> int:
        # Multiply-adds forward, for the gradient of the input, and for that of the taps if they are learned.
        return sum(2 * w for w in self.windows) * (3 if any(True for _ in self.parameters()) else 2)


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
            start_taps(kernel, self.start, init, self.salt)


def start_taps(kernel: torch.Tensor, start: str, init: Any, salt: int, skipped: int = 0) -> None:
    """Fill taps (..., w) through the functions of `init`, which leave alone what was loaded.

    `kernel` lacks as many of the newest taps as are `skipped`.
    """
    if kernel.device.type == "meta":
        return
    taps = starting_taps(start, kernel.numel() // kernel.shape[-1], kernel.shape[-1] + skipped, salt)
    value = taps[:, skipped:].reshape(kernel.shape)
    if init is nn.init:
        with torch.no_grad():
            kernel.copy_(value)
    else:
        init.copy_(kernel, value)
