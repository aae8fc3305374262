"""The fast path, in plain torch: tuned for CPU caches, and correct on any device.

Each computation is an operator of its own (`torch.ops.waveletgpt.*`), so that `torch.compile` calls it as it is
instead of unrolling its loops.

Shapes: B batch, T tokens, C mixed coordinates, n coordinates that share the window w.
"""

import operator
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from waveletgpt.ops.reference import check_ema, check_mix, group_kernels, group_windows

Windows = tuple[int, ...]
Groups = dict[int, list[int]]  # window: its coordinates
Span = tuple[int, int, int]  # window, its first coordinate, the one after its last

# Elements worked on at a time on a CPU (1 MB of float32): more leaves the cache, less is call overhead.
BLOCK = 1 << 18
# The longest kernels, in taps, for which other ways beat an FFT, measured on one core: torch's convolution where it is
# a fast one, shifted multiply-adds where it is not.
CONVOLUTION_TAPS, SHIFT_TAPS = 16, 4


def wavelet_mix(
    x: Tensor,
    windows: Sequence[int],
    kernels: Iterable[Tensor] | None = None,
    *,
    edge: str = "zero",
    state: Tensor | None = None,
) -> Tensor:
    """See `reference.wavelet_mix`; it differs by rounding, and for inputs that are not finite or huge.

    Mean: an infinite input gives NaN, not infinity, while it is in the window. Kernels of more than 16 taps (more than
    4 in float64, without oneDNN and on other devices than a CPU) go through an FFT: the rounding of a huge input
    reaches tokens before it, and, except on a CPU, a NaN all tokens of its coordinate and sequence.
    """
    check_mix(x, edge, state)
    windows, groups = _grouped(windows, x.shape[2], kernels is None)
    signal = x
    if state is not None:
        unseen = max(0, state.shape[1] - max(groups) + 1)
        signal = torch.cat((state[:, unseen:], x), dim=1)
    if edge == "partial":
        signal = signal.to(torch.promote_types(x.dtype, torch.float32))
    grouped = None if kernels is None else group_kernels(kernels, groups)
    tokens = x.shape[1]
    if tokens == 1 < signal.shape[1]:
        y = _newest(signal, groups, grouped)
    elif grouped is None:
        y = _mean(signal, windows, False)[:, -tokens:]
    else:
        y = _Filter.apply(signal, windows, *grouped)[:, -tokens:]
    if edge == "partial":
        seen = tokens if state is None else tokens + state.shape[1]
        count = torch.arange(seen - tokens + 1, seen + 1, device=x.device, dtype=y.dtype).unsqueeze(1)
        width = torch.tensor(windows, device=x.device, dtype=y.dtype)
        y = y * (width / torch.minimum(width, count))
    return y.to(x.dtype)


def ema_mix(x: Tensor, decay: Tensor, *, state: Tensor | None = None) -> Tensor:
    """See `reference.ema_mix`."""
    check_ema(x, decay, state)
    a = decay.to(torch.promote_types(x.dtype, torch.float32))
    u = (1 - a) * x
    if state is None:
        y = _DecayedSum.apply(u, a, False)
    else:
        y = _DecayedSum.apply(torch.cat((state.to(u.dtype).unsqueeze(1), u), dim=1), a, False)[:, 1:]
    return y.to(x.dtype)


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


def _newest(signal: Tensor, groups: Groups, kernels: list[Tensor] | None) -> Tensor:
    """The result at the last token only, for decoding: one weighted sum for each window."""
    wide = torch.promote_types(signal.dtype, torch.float32)
    parts, order = [], []
    for i, (window, members) in enumerate(groups.items()):
        consecutive = members[-1] - members[0] + 1 == len(members)
        columns = slice(members[0], members[-1] + 1) if consecutive else members  # a slice needs no copy
        past = signal[:, -window:, columns]
        if kernels is None:
            parts.append(past.sum(1, keepdim=True, dtype=wide) / window)
        else:
            taps = kernels[i][:, : past.shape[1]].to(wide).flip(1).t()
            parts.append((past * taps).sum(1, keepdim=True))
        order += members
    y = torch.cat(parts, dim=2)
    places = sorted(range(len(order)), key=order.__getitem__)
    return y if places == order else y[..., places]


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


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class _Sorted:
    """Coordinates in ascending order of their windows: `groups` holds (window, first, end), all of them slices."""

    def __init__(self, windows: Windows) -> None:
        order = sorted(range(len(windows)), key=windows.__getitem__)
        self.windows = tuple(windows[c] for c in order)
        self.order = None if self.windows == windows else order
        starts = [c for c, w in enumerate(self.windows) if c == 0 or w != self.windows[c - 1]]
        ends = [*starts[1:], len(windows)]
        self.groups: list[Span] = [(self.windows[start], start, end) for start, end in zip(starts, ends, strict=True)]

    def sort(self, x: Tensor) -> Tensor:
        return x if self.order is None else x[..., self.order]

    def restore(self, y: Tensor) -> Tensor:
        if self.order is None:
            return y
        restored = _contiguous(y)
        restored[..., self.order] = y
        return restored


_sorted = lru_cache(maxsize=256)(_Sorted)


def _mean(x: Tensor, windows: Windows, reverse: bool) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Mean.apply(x, windows, reverse)
    return _mean_op(x, windows, reverse)


class _Mean(torch.autograd.Function):
    """The gradient is the same filter run backwards in time; nothing is saved for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Windows, reverse: bool) -> Tensor:
        ctx.windows, ctx.reverse = windows, reverse
        return _mean_op(x, windows, reverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _mean(grad, ctx.windows, not ctx.reverse), None, None


@_opaque("mean(Tensor x, int[] windows, bool reverse) -> Tensor", lambda x, windows, reverse: _contiguous(x))
def _mean_op(x: Tensor, windows: Sequence[int], reverse: bool) -> Tensor:
    layout = _sorted(tuple(windows))
    x = layout.sort(x)
    batch, tokens, coordinates = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    on_cpu = x.device.type == "cpu"
    columns = _even_parts(coordinates, max(64, BLOCK // tokens)) if on_cpu else coordinates
    rows = _even_parts(batch, max(1, BLOCK // (tokens * columns))) if on_cpu else batch
    # Only small scratch is kept, and only on a CPU, where one operation follows the other.
    cascade = _cascade if on_cpu and rows * columns * tokens <= 2 * BLOCK else _cascade.__wrapped__
    y = _contiguous(x)
    for c in range(0, coordinates, columns):
        kind = (wide, x.device, threading.get_ident(), tokens, layout.windows[c : c + columns], reverse)
        run = cascade(*kind, rows)
        for b in range(0, batch, rows):
            part = x[b : b + rows, :, c : c + columns]
            if len(part) < rows:
                run = cascade(*kind, len(part))
            run(part, y[b : b + rows, :, c : c + columns])
    return layout.restore(y)


def _even_parts(total: int, most: int) -> int:
    """The size of the parts when `total` is cut in as few parts as it takes, of at most `most`, about equal."""
    return -(-total // -(-total // most)) if total else 1


class _Cascade:
    """Means of one block by repeated doubling (a trous): s_0 = x / w, s_k(t) = s_{k-1}(t) + s_{k-1}(t - 2^(k-1)).

    The steps go from one scratch buffer to the other and leave out the coordinates that are done, so that results with
    an odd number of steps end up in one buffer and the others in the other. Zeros before (after, in reverse) the
    tokens stand for what is outside the sequence. Buffers and their views are made once, because on a CPU page faults
    and slicing would cost more than the sums.
    """

    def __init__(self, like: Tensor, batch: int, tokens: int, groups: list[Span], reverse: bool) -> None:
        reach = 1 << (tokens - 1).bit_length()  # a longer window sees nothing more
        outside = min(groups[-1][0], reach) // 2
        first = 0 if reverse else outside
        coordinates = groups[-1][2]
        buffers = [like.new_zeros(batch, outside + tokens, coordinates) for _ in range(2)]
        self.even, self.odd = (buffer[:, first : first + tokens] for buffer in buffers)
        self.scale = like.new_tensor([1 / window for window, start, end in groups for _ in range(start, end)])
        self.is_odd = like.new_zeros(coordinates)
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        shift = 1
        for window, start, end in groups:
            while shift < min(window, reach):
                source, target = buffers[len(self.steps) % 2], buffers[(len(self.steps) + 1) % 2]
                other = first + (shift if reverse else -shift)
                now, then = source[:, first : first + tokens, start:], source[:, other : other + tokens, start:]
                self.steps.append((now, then, target[:, first : first + tokens, start:]))
                shift *= 2
            self.is_odd[start:end] = len(self.steps) % 2

    def __call__(self, x: Tensor, out: Tensor) -> None:
        torch.mul(x, self.scale, out=self.even)
        for now, then, target in self.steps:
            torch.add(now, then, out=target)
        # The buffer that a coordinate did not end in holds a part of the same sum, so a NaN there is in the result too.
        if out.dtype == self.even.dtype:
            torch.lerp(self.even, self.odd, self.is_odd, out=out)
        else:
            out.copy_(torch.lerp(self.even, self.odd, self.is_odd))


@lru_cache(maxsize=32)
def _cascade(
    dtype: torch.dtype, device: torch.device, thread: int, tokens: int, windows: Windows, reverse: bool, batch: int
) -> _Cascade:
    """The cascade for a block of this kind, remembered; `thread` keeps the scratch of one thread from another."""
    with torch.inference_mode(False):  # else a later call outside inference mode could not write to it
        like = torch.empty(0, dtype=dtype, device=device)
        return _Cascade(like, batch, tokens, _sorted(windows).groups, reverse)


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Windows, *kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, *kernels)
        ctx.windows = windows
        return _filter_op(x, windows, kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *kernels = ctx.saved_tensors
        grad_x, *grad_kernels = _filter_backward_op(grad, x, ctx.windows, kernels)
        return grad_x, None, *grad_kernels


def _fake_backward(grad: Tensor, x: Tensor, windows: Sequence[int], kernels: Sequence[Tensor]) -> list[Tensor]:
    return [_contiguous(x), *map(_contiguous, kernels)]


@_opaque("filter(Tensor x, int[] windows, Tensor[] kernels) -> Tensor", lambda x, windows, kernels: _contiguous(x))
def _filter_op(x: Tensor, windows: Sequence[int], kernels: Sequence[Tensor]) -> Tensor:
    layout, signal, taps = _sorted_and_wide(x, windows, kernels)
    short, few = _short(signal, taps, layout.windows)
    y = torch.empty_like(signal)
    if short:
        y[..., :short] = _directly(signal[..., :short], taps[:short, :few], False)
    if short < len(windows):
        length = _fft_length(signal, taps)
        product = _spectrum(signal[..., short:], length) * torch.fft.rfft(taps[short:], length)
        y[..., short:] = torch.fft.irfft(product, length)[..., : x.shape[1]].transpose(1, 2)
    if x.device.type == "cpu" and not y.sum().isfinite():
        # A tap of 0 beyond a window times NaN is NaN, and an FFT spreads it: do each window by itself.
        for window, start, end in layout.groups:
            y[..., start:end] = _directly(signal[..., start:end], taps[start:end, :window], False)
    return layout.restore(y).to(x.dtype)


@_opaque("filter_backward(Tensor grad, Tensor x, int[] windows, Tensor[] kernels) -> Tensor[]", _fake_backward)
def _filter_backward_op(grad: Tensor, x: Tensor, windows: Sequence[int], kernels: Sequence[Tensor]) -> list[Tensor]:
    """By x: the same filter backwards in time. By tap j: the sum of grad[t] x[t - j] over B and t."""
    layout, signal, taps = _sorted_and_wide(x, windows, kernels)
    short, few = _short(signal, taps, layout.windows)
    grad, tokens, count = layout.sort(grad).to(signal.dtype), x.shape[1], taps.shape[1]
    grad_x, grad_taps = torch.empty_like(signal), torch.zeros_like(taps)
    if short:
        grad_x[..., :short] = _directly(grad[..., :short], taps[:short, :few], True)
        for j in range(few):
            first = bisect_right(layout.windows, j)  # the others have no tap j
            late, early = grad[:, j:, first:short], signal[:, : tokens - j, first:short]
            grad_taps[first:short, j] = (late * early).sum((0, 1))
    if short < len(windows):
        length = _fft_length(signal, taps)
        late, early = (_spectrum(part[..., short:], length) for part in (grad, signal))
        product = late * torch.fft.rfft(taps[short:], length).conj()
        grad_x[..., short:] = torch.fft.irfft(product, length)[..., :tokens].transpose(1, 2)
        grad_taps[short:] = torch.fft.irfft((late * early.conj()).sum(0), length)[:, :count]
    grad_kernels = [
        F.pad(grad_taps[start:end, :window], (0, max(0, window - count))).to(kernel.dtype).contiguous()
        for (window, start, end), kernel in zip(layout.groups, kernels, strict=True)
    ]
    return [layout.restore(grad_x).to(x.dtype), *grad_kernels]


def _sorted_and_wide(x: Tensor, windows: Sequence[int], kernels: Sequence[Tensor]) -> tuple[_Sorted, Tensor, Tensor]:
    """Coordinates by ascending window, their signals (B, T, C), and their taps (C, at most T), filled up with 0."""
    layout = _sorted(tuple(windows))
    signal = layout.sort(x).to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    taps = signal.new_zeros(x.shape[2], min(layout.windows[-1], x.shape[1]))
    for (window, start, end), kernel in zip(layout.groups, kernels, strict=True):
        taps[start:end, :window] = kernel[:, : taps.shape[1]]
    return layout, signal, taps


def _short(signal: Tensor, taps: Tensor, windows: Windows) -> tuple[int, int]:
    """How many coordinates, the first ones, to filter directly and not by FFT, and how many taps they have."""
    limit = CONVOLUTION_TAPS if _convolves(signal) else SHIFT_TAPS
    short = len(windows) if taps.shape[1] <= limit else bisect_right(windows, limit)
    return short, min(windows[short - 1], taps.shape[1]) if short else 0


def _directly(signal: Tensor, taps: Tensor, reverse: bool) -> Tensor:
    """Sum of taps[j] signal[t - j] over j; of taps[j] signal[t + j] in reverse."""
    tokens, (coordinates, count) = signal.shape[1], taps.shape
    if _convolves(signal):
        # (B, T, n) is an image of height 1 with its channels last: oneDNN takes it as it is.
        image, weight = signal.transpose(1, 2).unsqueeze(2), (taps if reverse else taps.flip(1))[:, None, None]
        with torch.autocast(signal.device.type, enabled=False):
            y = F.conv2d(image, weight, padding=(0, count - 1), groups=coordinates)
        return y[:, :, 0, count - 1 :].transpose(1, 2) if reverse else y[:, :, 0, :tokens].transpose(1, 2)
    y = signal * taps[:, 0]
    for j in range(1, count):
        now, then = slice(j, tokens), slice(0, tokens - j)
        if reverse:
            now, then = then, now
        y[:, now].addcmul_(signal[:, then], taps[:, j])
    return y


def _convolves(signal: Tensor) -> bool:
    """Whether torch's convolution is fast and exact here: oneDNN's is; on GPUs it may round to TF32."""
    return signal.device.type == "cpu" and signal.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _spectrum(signal: Tensor, length: int) -> Tensor:
    return torch.fft.rfft(signal.transpose(1, 2), length)


def _fft_length(signal: Tensor, taps: Tensor) -> int:
    """Room for the whole result, at the next of 5, 6, 7 or 8 times a power of two: small factors make it fast."""
    needed = signal.shape[1] + taps.shape[1] - 1
    step = 1 << max(1, (needed - 1).bit_length() - 3)
    return -(-needed // step) * step


class _DecayedSum(torch.autograd.Function):
    """y_t = u_t + a y_{t-1}; in reverse, y_t = u_t + a y_{t+1}."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, a: Tensor, reverse: bool) -> Tensor:
        y = _decayed_sum_op(u, a, reverse)
        ctx.save_for_backward(a, y if ctx.needs_input_grad[1] else None)
        ctx.reverse = reverse
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        a, y = ctx.saved_tensors
        grad_u = _DecayedSum.apply(grad, a, not ctx.reverse)
        if y is None:
            return grad_u, None, None
        early, late = (y, grad_u) if not ctx.reverse else (grad_u, y)
        return grad_u, (early[:, :-1] * late[:, 1:]).sum((0, 1)), None


@_opaque("decayed_sum(Tensor u, Tensor a, bool reverse) -> Tensor", lambda u, a, reverse: _contiguous(u))
def _decayed_sum_op(u: Tensor, a: Tensor, reverse: bool) -> Tensor:
    """Step through all blocks of about sqrt(T) tokens at once, then from block to block, then pass on what came in."""
    batch, tokens, coordinates = u.shape
    size = 1 << (tokens.bit_length() // 2)
    extra = -tokens % size
    y = F.pad(u.contiguous(), (0, 0, extra, 0) if reverse else (0, 0, 0, extra))  # a copy even if extra is 0
    inside = y.view(batch, -1, size, coordinates)
    steps = inside.unbind(2)[:: -1 if reverse else 1]
    for before, now in pairwise(steps):
        now.addcmul_(before, a)
    across = a**size
    for before, now in pairwise(steps[-1].unbind(1)[:: -1 if reverse else 1]):
        now.addcmul_(before, across)
    powers = a ** torch.arange(1, size, device=a.device).unsqueeze(1)
    if reverse:
        inside[:, :-1, 1:].addcmul_(inside[:, 1:, :1], powers.flip(0))
    else:
        inside[:, 1:, :-1].addcmul_(inside[:, :-1, -1:], powers)
    return (y[:, extra:] if reverse else y[:, :tokens]).contiguous()
