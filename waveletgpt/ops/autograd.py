"""What all fast backends share: state and edges, gradients, and operators that `torch.compile` leaves whole.

A backend is a module of four functions (see `Kernels`). Each is reached through an operator of torch
(`torch.ops.waveletgpt.*`) that takes the backend's name, so that a compiler calls it as it is and autocast, CUDA
graphs and checkpointing treat it as any other.

Shapes: B batch, T tokens, C mixed coordinates, S tokens of state, n coordinates that share the window w.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from waveletgpt.ops import reference
from waveletgpt.ops.reference import check_ema, check_mix, group_kernels, group_windows

Windows = tuple[int, ...]
Groups = dict[int, list[int]]  # window: its coordinates


class Kernels(Protocol):
    """What a backend computes. `reverse` runs time backwards; the first `past` tokens are read and get no result.

    `taps` holds the kernels of all coordinates one after the other, in the order of `group_windows` (windows
    ascending, each with its coordinates ascending), in the type that sums are in.
    """

    def unavailable(self, device: str | None = None) -> str | None:
        """Why it cannot be used here (for tensors on `device`); None if it can."""

    def mean(self, x: Tensor, windows: Windows, reverse: bool, past: int) -> Tensor:
        """(B, T, C) to (B, T - past, C): the mean over each coordinate's window, zeros before the first token."""

    def filter(self, x: Tensor, windows: Windows, taps: Tensor, past: int) -> Tensor:
        """(B, T, C) to (B, T - past, C): the sum of taps[j] x[t - j] over j."""

    def filter_backward(self, grad: Tensor, x: Tensor, windows: Windows, taps: Tensor) -> tuple[Tensor, Tensor]:
        """Of `filter` with past=0, the gradients of x (in its type) and of taps."""

    def decayed_sum(self, u: Tensor, a: Tensor, reverse: bool) -> Tensor:
        """y_t = u_t + a y_{t-1}; u (B, T, C) and a (C,) are of the type that sums are in."""


KERNELS: dict[str, Kernels] = {}


def wavelet_mix(
    x: Tensor,
    windows: Sequence[int],
    kernels: Iterable[Tensor] | None,
    edge: str,
    state: Tensor | None,
    backend: str,
    reach: Tensor | None = None,
) -> Tensor:
    """`reference.wavelet_mix` by the kernels of one of `KERNELS`; with `reach`, all by the same plain torch."""
    check_mix(x, edge, state, reach)
    windows, groups = _grouped(windows, x.shape[2], kernels is None)
    signal, past = x, 0
    if state is not None:
        unseen = max(0, state.shape[1] - max(groups) + 1)
        signal = torch.cat((state[:, unseen:], x), dim=1)
        past = signal.shape[1] - x.shape[1]
    if edge == "partial":
        signal = signal.to(torch.promote_types(x.dtype, torch.float32))
    taps = None
    if kernels is not None:
        taps = torch.cat([kernel.reshape(-1) for kernel in group_kernels(kernels, groups, x.device)])
        taps = taps.to(torch.promote_types(signal.dtype, torch.float32))
    if reach is not None:
        y = _within(signal, windows, taps, _reach_with_past(reach, past))[:, past:]
    elif taps is None:
        y = _mean(signal, windows, False, past, backend)
    else:
        y = _Filter.apply(signal, windows, taps, past, backend)
    if edge == "partial":
        seen = x.shape[1] if state is None else x.shape[1] + state.shape[1]
        count = torch.arange(seen - x.shape[1] + 1, seen + 1, device=x.device, dtype=y.dtype)
        if reach is not None:
            count = torch.minimum(count, reach.clamp(min=0) + 1)
        count = count.unsqueeze(-1)
        width = torch.tensor(windows, device=x.device, dtype=y.dtype)
        y = y * (width / torch.minimum(width, count))
    return y.to(x.dtype)


def ema_mix(x: Tensor, decay: Tensor, state: Tensor | None, backend: str, reach: Tensor | None = None) -> Tensor:
    """`reference.ema_mix` by the kernels of one of `KERNELS`; with `reach` it is the reference."""
    if reach is not None:
        return reference.ema_mix(x, decay, state=state, reach=reach)
    check_ema(x, decay, state)
    a = decay.to(torch.promote_types(x.dtype, torch.float32))
    if state is not None and x.shape[1] == 1:  # decoding, where every call is felt
        return torch.lerp(x.to(a.dtype), state.to(a.dtype).unsqueeze(1), a).to(x.dtype)
    u = (1 - a) * x
    if state is None:
        y = _DecayedSum.apply(u, a, False, backend)
    else:
        y = _DecayedSum.apply(torch.cat((state.to(u.dtype).unsqueeze(1), u), dim=1), a, False, backend)[:, 1:]
    return y.to(x.dtype)


def _reach_with_past(reach: Tensor, past: int) -> Tensor:
    """The reach of the `past` tokens before, too: they belong to the first one's document as far as it reaches."""
    if not past:
        return reach
    ago = torch.arange(past, 0, -1, device=reach.device, dtype=reach.dtype)
    return torch.cat([reach[:, :1] - ago, reach], dim=1)


def _within(x: Tensor, windows: Windows, taps: Tensor | None, reach: Tensor) -> Tensor:
    """`Kernels.mean` or `.filter` of documents that lie one after the other, each by itself."""
    layout = Sorted(windows)
    signal = layout.sort(x).to(torch.promote_types(x.dtype, torch.float32))
    spans = tuple(value for group in layout.groups for value in group)
    if taps is None:
        y = _MeanWithin.apply(signal, reach, spans, False)
    else:
        y = _FilterWithin.apply(signal, reach, spans, taps)
    return layout.restore(y).to(x.dtype)


def _levels(spans: Windows, tokens: int) -> Iterator[tuple[int, int]]:
    """The steps of the cascade, (how far back, the first of the sorted coordinates that take part)."""
    shift = 1
    for window, start in zip(spans[::3], spans[1::3], strict=True):
        while shift < min(window, tokens):
            yield shift, start
            shift *= 2


class _MeanWithin(torch.autograd.Function):
    """A trous with one mask a level: s_k(t) = s_{k-1}(t) + [reach(t) >= 2^(k-1)] s_{k-1}(t - 2^(k-1)).

    The gradient is its transpose. Only `reach` is saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, reach: Tensor, spans: Windows, transposed: bool) -> Tensor:
        ctx.save_for_backward(reach)
        ctx.spans, ctx.transposed = spans, transposed
        scales = [1 / w for w, i, j in zip(spans[::3], spans[1::3], spans[2::3], strict=True) for _ in range(i, j)]
        s = x * torch.tensor(scales, dtype=x.dtype, device=x.device)
        levels = list(_levels(spans, x.shape[1]))
        for shift, first in reversed(levels) if transposed else levels:
            inside = (reach[:, shift:] >= shift).unsqueeze(2)
            late, early = s[:, shift:, first:], s[:, :-shift, first:]
            # `where`, not a product: a NaN of another document stays there. It is a copy, so in place is safe.
            if transposed:
                early += torch.where(inside, late, 0)
            else:
                late += torch.where(inside, early, 0)
        return s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (reach,) = ctx.saved_tensors
        return _MeanWithin.apply(grad, reach, ctx.spans, not ctx.transposed), None, None, None


class _FilterWithin(torch.autograd.Function):
    """Tap j counts where reach >= j. One pass over the tokens a tap: meant for kernels of tens of taps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reach: Tensor, spans: Windows, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, reach, taps)
        ctx.spans = spans
        y = torch.zeros_like(x)
        for j, start, end, of in _taps_within(spans, x.shape[1]):
            inside = (reach[:, j:] >= j).unsqueeze(2)
            y[:, j:, start:end] += torch.where(inside, x[:, : x.shape[1] - j, start:end], 0) * taps[of]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, reach, taps = ctx.saved_tensors
        grad_x, grad_taps = torch.zeros_like(x), torch.zeros_like(taps)
        for j, start, end, of in _taps_within(ctx.spans, x.shape[1]):
            inside = (reach[:, j:] >= j).unsqueeze(2)
            late = torch.where(inside, grad[:, j:, start:end], 0)
            early = torch.where(inside, x[:, : x.shape[1] - j, start:end], 0)
            grad_x[:, : x.shape[1] - j, start:end] += late * taps[of]
            grad_taps[of] = (late * early).sum((0, 1))
        return grad_x, None, None, grad_taps


def _taps_within(spans: Windows, tokens: int) -> Iterator[tuple[int, int, int, slice]]:
    """Each tap of each group, (j, first coordinate, the one after the last, where it lies in the tensor of all)."""
    offset = 0
    for window, start, end in zip(spans[::3], spans[1::3], spans[2::3], strict=True):
        for j in range(min(window, tokens)):
            yield j, start, end, slice(offset + j, offset + (end - start) * window, window)
        offset += (end - start) * window


def _grouped(windows: Sequence[int], coordinates: int, dyadic: bool) -> tuple[Windows, Groups]:
    """`group_windows`, remembered: for 64 coordinates it takes longer than mixing one token."""
    try:
        windows = tuple(map(operator.index, windows))
    except TypeError:
        windows = tuple(windows)
        return windows, group_windows(windows, coordinates, dyadic=dyadic)  # raises, naming the culprit
    if torch.compiler.is_compiling():
        return windows, group_windows(windows, coordinates, dyadic=dyadic)
    return windows, _remembered_groups(windows, coordinates, dyadic)


@lru_cache(maxsize=256)
def _remembered_groups(windows: Windows, coordinates: int, dyadic: bool) -> Groups:
    return group_windows(windows, coordinates, dyadic=dyadic)


def _opaque(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the operator `torch.ops.waveletgpt.<schema>`; `fake` gives the shapes of its results."""

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"waveletgpt::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.waveletgpt, name).default

    return define


_LIBRARY = torch.library.Library("waveletgpt", "DEF")


def empty_result(x: Tensor, past: int = 0) -> Tensor:
    """Dense, for the tokens of x from `past` on."""
    return torch.empty((x.shape[0], x.shape[1] - past, *x.shape[2:]), dtype=x.dtype, device=x.device)


def _mean(x: Tensor, windows: Windows, reverse: bool, past: int, backend: str) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Mean.apply(x, windows, reverse, past, backend)
    return _mean_op(x, windows, reverse, past, backend)


class _Mean(torch.autograd.Function):
    """The gradient is the same filter run backwards in time; nothing is saved for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Windows, reverse: bool, past: int, backend: str) -> Tensor:
        ctx.windows, ctx.reverse, ctx.past, ctx.backend = windows, reverse, past, backend
        return _mean_op(x, windows, reverse, past, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = F.pad(grad, (0, 0, ctx.past, 0)) if ctx.past else grad
        return _mean(grad, ctx.windows, not ctx.reverse, 0, ctx.backend), None, None, None, None


@_opaque(
    "mean(Tensor x, int[] windows, bool reverse, SymInt past, str backend) -> Tensor",
    lambda x, windows, reverse, past, backend: empty_result(x, past),
)
def _mean_op(x: Tensor, windows: Sequence[int], reverse: bool, past: int, backend: str) -> Tensor:
    return KERNELS[backend].mean(x, tuple(windows), reverse, past)


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Windows, taps: Tensor, past: int, backend: str) -> Tensor:
        learning = ctx.needs_input_grad[2]
        if learning:  # a view would keep all that it is a view of: the coordinates that are not mixed, too
            x = x.contiguous()
        ctx.save_for_backward(x if learning else None, taps)
        ctx.windows, ctx.past, ctx.backend = windows, past, backend
        return _filter_op(x, windows, taps, past, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = F.pad(grad, (0, 0, ctx.past, 0)) if ctx.past else grad
        x, taps = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:  # the same filter run backwards in time
            grad_x = _filter_op(grad.flip(1), ctx.windows, taps, 0, ctx.backend).flip(1)
            return grad_x, None, None, None, None
        grad_x, grad_taps = _filter_backward_op(grad, x, ctx.windows, taps, ctx.backend)
        return grad_x, None, grad_taps, None, None


@_opaque(
    "filter(Tensor x, int[] windows, Tensor taps, SymInt past, str backend) -> Tensor",
    lambda x, windows, taps, past, backend: empty_result(x, past),
)
def _filter_op(x: Tensor, windows: Sequence[int], taps: Tensor, past: int, backend: str) -> Tensor:
    return KERNELS[backend].filter(x, tuple(windows), taps, past)


@_opaque(
    "filter_backward(Tensor grad, Tensor x, int[] windows, Tensor taps, str backend) -> (Tensor, Tensor)",
    lambda grad, x, windows, taps, backend: (empty_result(x), torch.empty_like(taps)),
)
def _filter_backward_op(
    grad: Tensor, x: Tensor, windows: Sequence[int], taps: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return KERNELS[backend].filter_backward(grad, x, tuple(windows), taps)


class _DecayedSum(torch.autograd.Function):
    """y_t = u_t + a y_{t-1}; in reverse, y_t = u_t + a y_{t+1}."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, a: Tensor, reverse: bool, backend: str) -> Tensor:
        y = _decayed_sum_op(u, a, reverse, backend)
        ctx.save_for_backward(a, y if ctx.needs_input_grad[1] else None)
        ctx.reverse, ctx.backend = reverse, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, y = ctx.saved_tensors
        grad_u = _DecayedSum.apply(grad, a, not ctx.reverse, ctx.backend)
        if y is None:
            return grad_u, None, None, None
        early, late = (y, grad_u) if not ctx.reverse else (grad_u, y)
        return grad_u, (early[:, :-1] * late[:, 1:]).sum((0, 1)), None, None


@_opaque(
    "decayed_sum(Tensor u, Tensor a, bool reverse, str backend) -> Tensor",
    lambda u, a, reverse, backend: empty_result(u),
)
def _decayed_sum_op(u: Tensor, a: Tensor, reverse: bool, backend: str) -> Tensor:
    return KERNELS[backend].decayed_sum(u, a, reverse)


class Sorted:
    """Coordinates in ascending order of their windows: `groups` holds (window, first, end), all of them slices."""

    def __init__(self, windows: Windows) -> None:
        order = sorted(range(len(windows)), key=windows.__getitem__)
        self.windows = tuple(windows[c] for c in order)
        self.order = None if self.windows == windows else order
        starts = [c for c, w in enumerate(self.windows) if c == 0 or w != self.windows[c - 1]]
        ends = [*starts[1:], len(windows)]
        self.groups = [(self.windows[start], start, end) for start, end in zip(starts, ends, strict=True)]

    def sort(self, x: Tensor) -> Tensor:
        return x if self.order is None else x[..., self.order]

    def restore(self, y: Tensor) -> Tensor:
        if self.order is None:
            return y
        restored = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        restored[..., self.order] = y
        return restored


def tap_offsets(windows: Windows) -> list[int]:
    """Where the taps of each coordinate begin in the tensor of all."""
    offsets, offset = [0] * len(windows), 0
    for c in sorted(range(len(windows)), key=windows.__getitem__):
        offsets[c] = offset
        offset += windows[c]
    return offsets


sorted_windows = lru_cache(maxsize=256)(Sorted)
