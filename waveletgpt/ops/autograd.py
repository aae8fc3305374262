"""What all fast backends share: state and edges, gradients, and operators that `torch.compile` leaves whole.

A backend is a module with the functions of `Kernels`. torch operators (`torch.ops.waveletgpt.*`) call them by the
backend's name. So `torch.compile` does not look inside, and autocast, CUDA graphs and checkpointing work as with any
operator.

Shapes: B batch, T tokens, C mixed channels, S tokens of state, n channels that share the window w.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from waveletgpt.ops.reference import ahead, check_ema, check_mix, group_kernels, group_windows, reach_with_past

Windows = tuple[int, ...]
Groups = dict[int, list[int]]  # window: its channels


class Kernels(Protocol):
    """What a backend computes. `reverse` runs time backwards; the first `past` tokens are read and get no result.

    `reach` (B or 1, T) is as in `reference.wavelet_mix`, for all tokens that are read. With `reverse`, too, it counts
    tokens before each token (see `ahead`). None: one document.

    `taps` holds the kernels of all channels one after the other, in the order of `group_windows` (by window, then by
    channel), in the dtype of the sums.
    """

    def unavailable(self, device: str | None = None) -> str | None:
        """Why this backend cannot be used here (for tensors on `device`); None if it can."""

    def mean(self, x: Tensor, windows: Windows, reverse: bool, past: int, reach: Tensor | None) -> Tensor:
        """(B, T, C) to (B, T - past, C): the mean over each channel's window, zeros before the first token."""

    def filter(self, x: Tensor, windows: Windows, taps: Tensor, past: int, reach: Tensor | None) -> Tensor:
        """(B, T, C) to (B, T - past, C): the sum of taps[j] x[t - j] over j."""

    def filter_backward(
        self, grad: Tensor, x: Tensor, windows: Windows, taps: Tensor, reach: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradients of `filter` with past=0, for x (in its dtype) and for taps."""

    def decayed_sum(self, u: Tensor, a: Tensor, reverse: bool, keep: Tensor | None) -> Tensor:
        """y_t = u_t + a y_{t-1}; u (B, T, C) and a (C,) have the dtype of the sums.

        The last term counts where `keep` (B or 1, T), in the order of the tokens, is true; None: everywhere.
        """


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
    """`reference.wavelet_mix`, computed by the backend of `KERNELS` with this name."""
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
    limits = None if reach is None else reach_with_past(reach, past)
    if taps is None:
        y = _mean(signal, windows, False, past, backend, limits)
    else:
        y = _Filter.apply(signal, windows, taps, past, backend, limits)
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
    """`reference.ema_mix`, computed by the backend of `KERNELS` with this name."""
    check_ema(x, decay, state, reach)
    a = decay.to(torch.promote_types(x.dtype, torch.float32))
    if state is not None and x.shape[1] == 1 and reach is None:  # decoding, where each call costs time
        return torch.lerp(x.to(a.dtype), state.to(a.dtype).unsqueeze(1), a).to(x.dtype)
    u = (1 - a) * x
    keep = None if reach is None else reach >= 1
    if state is None:
        y = _DecayedSum.apply(u, a, False, backend, keep)
    else:
        keep = keep if keep is None else F.pad(keep, (1, 0))
        y = _DecayedSum.apply(torch.cat((state.to(u.dtype).unsqueeze(1), u), dim=1), a, False, backend, keep)[:, 1:]
    result: Tensor = y.to(x.dtype)
    return result


def _grouped(windows: Sequence[int], channels: int, dyadic: bool) -> tuple[Windows, Groups]:
    """`group_windows`, cached: for 64 channels it takes longer than mixing one token."""
    try:
        windows = tuple(map(operator.index, windows))
    except TypeError:
        windows = tuple(windows)
        return windows, group_windows(windows, channels, dyadic=dyadic)  # raises, naming the bad window
    if torch.compiler.is_compiling():
        return windows, group_windows(windows, channels, dyadic=dyadic)
    return windows, _remembered_groups(windows, channels, dyadic)


@lru_cache(maxsize=256)
def _remembered_groups(windows: Windows, channels: int, dyadic: bool) -> Groups:
    return group_windows(windows, channels, dyadic=dyadic)


def _opaque(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the operator `torch.ops.waveletgpt.<schema>`; `fake` gives the shapes of its results."""

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"waveletgpt::{name}", fake, lib=_LIBRARY)
        result: Callable[..., Any] = getattr(torch.ops.waveletgpt, name).default
        return result

    return define


_LIBRARY = torch.library.Library("waveletgpt", "DEF")


def empty_result(x: Tensor, past: int = 0) -> Tensor:
    """An empty, dense tensor for the results of x from token `past` on."""
    return torch.empty((x.shape[0], x.shape[1] - past, *x.shape[2:]), dtype=x.dtype, device=x.device)


def _mean(x: Tensor, windows: Windows, reverse: bool, past: int, backend: str, reach: Tensor | None) -> Tensor:
    apply: Callable[..., Tensor] = _Mean.apply if torch.is_grad_enabled() and x.requires_grad else _mean_op
    return apply(x, windows, reverse, past, backend, reach)


class _Mean(torch.autograd.Function):
    """The gradient is the same filter run backwards in time; nothing but `reach` is saved for it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, windows: Windows, reverse: bool, past: int, backend: str, reach: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(reach)
        ctx.windows, ctx.reverse, ctx.past, ctx.backend = windows, reverse, past, backend
        return _mean(x, windows, reverse, past, backend, reach)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = F.pad(grad, (0, 0, ctx.past, 0)) if ctx.past else grad
        (reach,) = ctx.saved_tensors
        return _mean(grad, ctx.windows, not ctx.reverse, 0, ctx.backend, reach), None, None, None, None, None


@_opaque(
    "mean(Tensor x, int[] windows, bool reverse, SymInt past, str backend, Tensor? reach=None) -> Tensor",
    lambda x, windows, reverse, past, backend, reach=None: empty_result(x, past),
)
def _mean_op(
    x: Tensor, windows: Sequence[int], reverse: bool, past: int, backend: str, reach: Tensor | None = None
) -> Tensor:
    return KERNELS[backend].mean(x, tuple(windows), reverse, past, reach)


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, windows: Windows, taps: Tensor, past: int, backend: str, reach: Tensor | None
    ) -> Tensor:
        learning = ctx.needs_input_grad[2]
        if learning:  # a view would keep the whole tensor in memory, unmixed channels included
            x = x.contiguous()
        ctx.save_for_backward(x if learning else None, taps, reach)
        ctx.windows, ctx.past, ctx.backend = windows, past, backend
        result: Tensor = _filter_op(x, windows, taps, past, backend, reach)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = F.pad(grad, (0, 0, ctx.past, 0)) if ctx.past else grad
        x, taps, reach = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:  # the same filter run backwards in time
            turned = None if reach is None else ahead(reach).flip(1)
            grad_x = _filter_op(grad.flip(1), ctx.windows, taps, 0, ctx.backend, turned).flip(1)
            return grad_x, None, None, None, None, None
        grad_x, grad_taps = _filter_backward_op(grad, x, ctx.windows, taps, ctx.backend, reach)
        return grad_x, None, grad_taps, None, None, None


@_opaque(
    "filter(Tensor x, int[] windows, Tensor taps, SymInt past, str backend, Tensor? reach=None) -> Tensor",
    lambda x, windows, taps, past, backend, reach=None: empty_result(x, past),
)
def _filter_op(
    x: Tensor, windows: Sequence[int], taps: Tensor, past: int, backend: str, reach: Tensor | None = None
) -> Tensor:
    return KERNELS[backend].filter(x, tuple(windows), taps, past, reach)


@_opaque(
    "filter_backward(Tensor grad, Tensor x, int[] windows, Tensor taps, str backend, Tensor? reach=None)"
    " -> (Tensor, Tensor)",
    lambda grad, x, windows, taps, backend, reach=None: (empty_result(x), torch.empty_like(taps)),
)
def _filter_backward_op(
    grad: Tensor, x: Tensor, windows: Sequence[int], taps: Tensor, backend: str, reach: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return KERNELS[backend].filter_backward(grad, x, tuple(windows), taps, reach)


class _DecayedSum(torch.autograd.Function):
    """y_t = u_t + a y_{t-1}, the last term where `keep` (B or 1, T) says so; in reverse, y_t = u_t + a y_{t+1}."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, a: Tensor, reverse: bool, backend: str, keep: Tensor | None) -> Tensor:
        y = _decayed_sum_op(u, a, reverse, backend, keep)
        ctx.save_for_backward(a, y if ctx.needs_input_grad[1] else None, keep)
        ctx.reverse, ctx.backend = reverse, backend
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, y, keep = ctx.saved_tensors
        turned = None if keep is None else keep.roll(1 if ctx.reverse else -1, dims=1)
        grad_u = _DecayedSum.apply(grad, a, not ctx.reverse, ctx.backend, turned)
        if y is None:
            return grad_u, None, None, None, None
        early, late = (y, grad_u) if not ctx.reverse else (grad_u, y)
        product = early[:, :-1] * late[:, 1:]
        counted = turned if ctx.reverse else keep
        if counted is not None:
            product = torch.where(counted[:, 1:, None], product, 0)
        return grad_u, product.sum((0, 1)), None, None, None


@_opaque(
    "decayed_sum(Tensor u, Tensor a, bool reverse, str backend, Tensor? keep=None) -> Tensor",
    lambda u, a, reverse, backend, keep=None: empty_result(u),
)
def _decayed_sum_op(u: Tensor, a: Tensor, reverse: bool, backend: str, keep: Tensor | None = None) -> Tensor:
    return KERNELS[backend].decayed_sum(u, a, reverse, keep)


class Sorted:
    """Channels sorted by window. `groups` holds (window, first, end): channels first ... end - 1 have this window."""

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
    """Where the taps of each channel begin in the tensor of all taps."""
    offsets, offset = [0] * len(windows), 0
    for c in sorted(range(len(windows)), key=windows.__getitem__):
        offsets[c] = offset
        offset += windows[c]
    return offsets


sorted_windows = lru_cache(maxsize=256)(Sorted)
