"""Backend "torch", in plain torch: tuned for CPU caches, and correct on any device.

It differs from the reference by rounding, and for inputs that are huge or not finite:

- Mean: an infinite input gives NaN, not infinity, while it is in the window.
- Kernels of more than 16 taps (more than 4 in float64, without oneDNN, or on other devices than a CPU) go through an
  FFT. There the rounding error of a huge input reaches tokens before it. Except on a CPU, a NaN reaches all tokens of
  its channel and sequence.

Shapes: B batch, T tokens, C mixed channels, n channels that share the window w.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from waveletgpt.ops.autograd import Sorted, Windows, empty_result, sorted_windows
from waveletgpt.ops.reference import ahead

Span = tuple[int, int, int]  # window, its first channel, its last channel + 1

# Elements worked on at a time on a CPU (1 MB of float32): more would leave the cache, fewer would cost calls.
BLOCK = 1 << 18
# The longest kernels, in taps, that are faster without an FFT, measured on one core: by torch's convolution where that
# is fast, else by shifted multiply-adds.
CONVOLUTION_TAPS, SHIFT_TAPS = 16, 4


def unavailable(device: str | None = None) -> str | None:
    """Why this backend cannot be used here (for tensors on `device`); None if it can."""
    return None


def mean(x: Tensor, windows: Windows, reverse: bool, past: int, reach: Tensor | None = None) -> Tensor:
    layout = sorted_windows(windows)
    x = layout.sort(x)
    if reach is not None:
        return layout.restore(_mean_within(x, layout, reverse, reach)[:, past:]).contiguous()
    if 0 < past == x.shape[1] - 1 and not reverse:
        return layout.restore(_newest(x, layout, None))
    batch, tokens, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    on_cpu = x.device.type == "cpu"
    columns = _even_parts(channels, max(64, BLOCK // tokens)) if on_cpu else channels
    rows = _even_parts(batch, max(1, BLOCK // (tokens * columns))) if on_cpu else batch
    # Keep scratch buffers only if they are small, and only on a CPU, where operations run one after the other.
    cascade = _cascade if on_cpu and rows * columns * tokens <= 2 * BLOCK else _cascade.__wrapped__
    y = empty_result(x)
    for c in range(0, channels, columns):
        kind = (wide, x.device, threading.get_ident(), tokens, layout.windows[c : c + columns], reverse)
        run = cascade(*kind, rows)
        for b in range(0, batch, rows):
            part = x[b : b + rows, :, c : c + columns]
            if len(part) < rows:
                run = cascade(*kind, len(part))
            run(part, y[b : b + rows, :, c : c + columns])
    return layout.restore(y[:, past:]).contiguous()


def _mean_within(x: Tensor, layout: Sorted, reverse: bool, reach: Tensor) -> Tensor:
    """The cascade of `_Cascade` with a mask for step k: reach(t) >= 2^(k-1)."""
    reach = ahead(reach) if reverse else reach
    like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    s = x * like.new_tensor([1 / window for window in layout.windows])
    shift = 1
    for window, start, _ in layout.groups:
        while shift < min(window, x.shape[1]):
            now, then = slice(shift, None), slice(None, -shift)
            if reverse:
                now, then = then, now
            inside = (reach[:, now] >= shift).unsqueeze(2)
            # `where` and not a product, so that a NaN stays in its document. It copies, so adding in place is safe.
            s[:, now, start:] += torch.where(inside, s[:, then, start:], 0)
            shift *= 2
    return s.to(x.dtype)


def _newest(signal: Tensor, layout: Sorted, taps: Tensor | None) -> Tensor:
    """The result of the last token only, for decoding: one weighted sum for each window."""
    wide = torch.promote_types(signal.dtype, torch.float32)
    parts, offset = [], 0
    for window, start, end in layout.groups:
        past = signal[:, -window:, start:end]
        if taps is None:
            parts.append(past.sum(1, keepdim=True, dtype=wide) / window)
        else:
            h = taps[offset : offset + (end - start) * window].view(end - start, window)[:, : past.shape[1]]
            parts.append((past * h.flip(1).t()).sum(1, keepdim=True))
            offset += (end - start) * window
    return torch.cat(parts, dim=2).to(signal.dtype)


def _even_parts(total: int, most: int) -> int:
    """Size of each part if `total` is cut into as few parts of at most `most` as possible, all about equal."""
    return -(-total // -(-total // most)) if total else 1


class _Cascade:
    """Means of one block by repeated doubling (a trous): s_0 = x / w, s_k(t) = s_{k-1}(t) + s_{k-1}(t - 2^(k-1)).

    Each step reads one scratch buffer, writes the other, and leaves out channels that are done. A channel's result is
    therefore in one buffer after an even number of steps and in the other after an odd number. Zeros before the
    tokens (after them, in reverse) stand for inputs outside the sequence. Buffers and their views are made once,
    because on a CPU page faults and slicing would cost more than the sums.
    """

    def __init__(self, like: Tensor, batch: int, tokens: int, groups: list[Span], reverse: bool) -> None:
        reach = 1 << (tokens - 1).bit_length()  # a longer window sees nothing more
        outside = min(groups[-1][0], reach) // 2
        first = 0 if reverse else outside
        channels = groups[-1][2]
        buffers = [like.new_zeros(batch, outside + tokens, channels) for _ in range(2)]
        self.even, self.odd = (buffer[:, first : first + tokens] for buffer in buffers)
        self.scale = like.new_tensor([1 / window for window, start, end in groups for _ in range(start, end)])
        self.is_odd = like.new_zeros(channels)
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
        # A channel's other buffer holds a part of the same sum. A NaN there is in the result anyway: `lerp` adds none.
        if out.dtype == self.even.dtype:
            torch.lerp(self.even, self.odd, self.is_odd, out=out)
        else:
            out.copy_(torch.lerp(self.even, self.odd, self.is_odd))


@lru_cache(maxsize=32)
def _cascade(
    dtype: torch.dtype, device: torch.device, thread: int, tokens: int, windows: Windows, reverse: bool, batch: int
) -> _Cascade:
    """The cascade for a block of this kind, cached. `thread` gives each thread its own scratch buffers."""
    with torch.inference_mode(False):  # else a later call outside inference mode could not write to it
        like = torch.empty(0, dtype=dtype, device=device)
        return _Cascade(like, batch, tokens, sorted_windows(windows).groups, reverse)


def filter(x: Tensor, windows: Windows, taps: Tensor, past: int, reach: Tensor | None = None) -> Tensor:
    layout = sorted_windows(windows)
    if reach is not None:
        apart = _Apart.of(x, windows, reach)
        if apart is not None:
            return apart.gather(filter(apart.insert_gaps(x), windows, taps, 0))[:, past:].contiguous()
        return layout.restore(_filter_within(_wide_signal(x, layout), layout, taps, reach)[:, past:]).to(x.dtype)
    if 0 < past == x.shape[1] - 1:
        return layout.restore(_newest(layout.sort(x), layout, taps))
    signal, taps = _wide_signal(x, layout), _square(taps, layout, x.shape[1])
    short, few = _short(signal, taps, layout.windows)
    y = torch.empty_like(signal)
    if short:
        y[..., :short] = _directly(signal[..., :short], taps[:short, :few], False)
    if short < len(windows):
        length = _fft_length(signal, taps)
        product = _spectrum(signal[..., short:], length) * torch.fft.rfft(taps[short:], length)
        y[..., short:] = torch.fft.irfft(product, length)[..., : x.shape[1]].transpose(1, 2)
    if x.device.type == "cpu" and not y.sum().isfinite():
        # 0 times NaN is NaN, so taps of 0 beyond a window spread it, and so does an FFT: filter each window alone.
        for window, start, end in layout.groups:
            y[..., start:end] = _directly(signal[..., start:end], taps[start:end, :window], False)
    return layout.restore(y[:, past:]).to(x.dtype).contiguous()


def filter_backward(
    grad: Tensor, x: Tensor, windows: Windows, taps: Tensor, reach: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of x: the same filter backwards in time. Of tap j: the sum of grad[t] x[t - j] over B and t."""
    layout = sorted_windows(windows)
    if reach is not None:
        apart = _Apart.of(x, windows, reach)
        if apart is not None:
            grad_x, grad_taps = filter_backward(apart.insert_gaps(grad), apart.insert_gaps(x), windows, taps)
            return apart.gather(grad_x), grad_taps
        grad_x, grad_taps = _filter_within_backward(
            layout.sort(grad).to(taps.dtype), _wide_signal(x, layout), layout, taps, reach
        )
        return layout.restore(grad_x).to(x.dtype), grad_taps
    signal, square = _wide_signal(x, layout), _square(taps, layout, x.shape[1])
    short, few = _short(signal, square, layout.windows)
    grad, tokens, count = layout.sort(grad).to(signal.dtype), x.shape[1], square.shape[1]
    grad_x, grad_taps = torch.empty_like(signal), torch.zeros_like(square)
    if short:
        grad_x[..., :short] = _directly(grad[..., :short], square[:short, :few], True)
        for j in range(few):
            first = bisect_right(layout.windows, j)  # channels before it have no tap j
            late, early = grad[:, j:, first:short], signal[:, : tokens - j, first:short]
            grad_taps[first:short, j] = (late * early).sum((0, 1))
    if short < len(windows):
        length = _fft_length(signal, square)
        late, early = (_spectrum(part[..., short:], length) for part in (grad, signal))
        product = late * torch.fft.rfft(square[short:], length).conj()
        grad_x[..., short:] = torch.fft.irfft(product, length)[..., :tokens].transpose(1, 2)
        grad_taps[short:] = torch.fft.irfft((late * early.conj()).sum(0), length)[:, :count]
    parts = [
        F.pad(grad_taps[start:end, :window], (0, max(0, window - count))).reshape(-1)
        for window, start, end in layout.groups
    ]
    return layout.restore(grad_x).to(x.dtype), torch.cat(parts).to(taps.dtype)


class _Apart:
    """Moves documents apart, with zeros between them, so that no window reaches from one to the next. One pass of the
    filter is then enough for all."""

    @staticmethod
    def of(x: Tensor, windows: Windows, reach: Tensor) -> "_Apart | None":
        """None if one pass over the tokens for each tap costs less: few taps, or many short documents."""
        gap = max(windows) - 1
        if min(gap, x.shape[1]) < CONVOLUTION_TAPS:
            return None
        before = (reach[:, 1:] <= 0).cumsum(1)
        length = x.shape[1] + gap * (int(before.max()) if before.numel() else 0)
        return _Apart(F.pad(before, (1, 0)), gap, length) if length <= 8 * x.shape[1] else None

    def __init__(self, before: Tensor, gap: int, length: int) -> None:
        """`before` (B or 1, T): the number of documents before that of each token."""
        self.places = (torch.arange(before.shape[1], device=before.device) + gap * before).unsqueeze(2)
        self.length = length

    def insert_gaps(self, x: Tensor) -> Tensor:
        wide = x.new_zeros(x.shape[0], self.length, x.shape[2])
        return wide.scatter_(1, self.places.expand(x.shape), x)

    def gather(self, y: Tensor) -> Tensor:
        return y.gather(1, self.places.expand(y.shape[0], -1, y.shape[2]))


def _filter_within(x: Tensor, layout: Sorted, taps: Tensor, reach: Tensor) -> Tensor:
    """Tap j counts where reach >= j: one pass over the tokens for each tap."""
    y = torch.zeros_like(x)
    for j, start, end, of in _taps_within(layout, x.shape[1]):
        inside = (reach[:, j:] >= j).unsqueeze(2) if j else torch.ones_like(reach[:, :1, None], dtype=torch.bool)
        y[:, j:, start:end] += torch.where(inside, x[:, : x.shape[1] - j, start:end], 0) * taps[of]
    return y


def _filter_within_backward(
    grad: Tensor, x: Tensor, layout: Sorted, taps: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x, grad_taps = torch.zeros_like(x), torch.zeros_like(taps)
    for j, start, end, of in _taps_within(layout, x.shape[1]):
        inside = (reach[:, j:] >= j).unsqueeze(2) if j else torch.ones_like(reach[:, :1, None], dtype=torch.bool)
        late = torch.where(inside, grad[:, j:, start:end], 0)
        early = torch.where(inside, x[:, : x.shape[1] - j, start:end], 0)
        grad_x[:, : x.shape[1] - j, start:end] += late * taps[of]
        grad_taps[of] = (late * early).sum((0, 1))
    return grad_x, grad_taps


def _taps_within(layout: Sorted, tokens: int) -> Iterator[tuple[int, int, int, slice]]:
    """Each tap of each group: (j, first channel, last channel + 1, its slice of the tensor of all taps)."""
    offset = 0
    for window, start, end in layout.groups:
        for j in range(min(window, tokens)):
            yield j, start, end, slice(offset + j, offset + (end - start) * window, window)
        offset += (end - start) * window


def _wide_signal(x: Tensor, layout: Sorted) -> Tensor:
    """x with its channels sorted by window, dense, in the dtype of the sums."""
    return layout.sort(x).to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _square(taps: Tensor, layout: Sorted, tokens: int) -> Tensor:
    """(C, at most T): the taps of each of the sorted channels, padded with 0."""
    square, offset = taps.new_zeros(len(layout.windows), min(layout.windows[-1], tokens)), 0
    for window, start, end in layout.groups:
        group = taps[offset : offset + (end - start) * window].view(end - start, window)
        square[start:end, :window] = group[:, : square.shape[1]]
        offset += group.numel()
    return square


def _short(signal: Tensor, taps: Tensor, windows: Windows) -> tuple[int, int]:
    """How many of the first channels to filter without an FFT, and the most taps that one of them has."""
    limit = CONVOLUTION_TAPS if _convolves(signal) else SHIFT_TAPS
    short = len(windows) if taps.shape[1] <= limit else bisect_right(windows, limit)
    return short, min(windows[short - 1], taps.shape[1]) if short else 0


def _directly(signal: Tensor, taps: Tensor, reverse: bool) -> Tensor:
    """Sum of taps[j] signal[t - j] over j; of taps[j] signal[t + j] in reverse."""
    tokens, (channels, count) = signal.shape[1], taps.shape
    if _convolves(signal):
        # (B, T, n) is an image of height 1 in channels-last layout, which oneDNN takes without a copy.
        image, weight = signal.transpose(1, 2).unsqueeze(2), (taps if reverse else taps.flip(1))[:, None, None]
        with torch.autocast(signal.device.type, enabled=False):
            y = F.conv2d(image, weight, padding=(0, count - 1), groups=channels)
        return y[:, :, 0, count - 1 :].transpose(1, 2) if reverse else y[:, :, 0, :tokens].transpose(1, 2)
    y = signal * taps[:, 0]
    for j in range(1, count):
        now, then = slice(j, tokens), slice(0, tokens - j)
        if reverse:
            now, then = then, now
        y[:, now].addcmul_(signal[:, then], taps[:, j])
    return y


def _convolves(signal: Tensor) -> bool:
    """Whether torch's convolution is fast and exact here. That of oneDNN is; on GPUs it may round to TF32."""
    return signal.device.type == "cpu" and signal.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _spectrum(signal: Tensor, length: int) -> Tensor:
    result: Tensor = torch.fft.rfft(signal.transpose(1, 2), length)
    return result


def _fft_length(signal: Tensor, taps: Tensor) -> int:
    """Length with room for the whole result: 5, 6, 7 or 8 times a power of two, as small factors make FFTs fast."""
    needed = signal.shape[1] + taps.shape[1] - 1
    step = 1 << max(1, (needed - 1).bit_length() - 3)
    return -(-needed // step) * step


def decayed_sum(u: Tensor, a: Tensor, reverse: bool, keep: Tensor | None = None) -> Tensor:
    """Cut time into blocks of about sqrt(T) tokens. Run the recurrence inside all blocks at once, then from block to
    block, then add the result of the block before, with its decay, to each block's tokens."""
    if keep is not None:
        return _kept_sum(u.flip(1), a, keep.flip(1)).flip(1) if reverse else _kept_sum(u, a, keep)
    batch, tokens, channels = u.shape
    size = 1 << (tokens.bit_length() // 2)
    extra = -tokens % size
    y = F.pad(u.contiguous(), (0, 0, extra, 0) if reverse else (0, 0, 0, extra))  # a copy even if extra is 0
    inside = y.view(batch, -1, size, channels)
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


def _kept_sum(u: Tensor, a: Tensor, keep: Tensor) -> Tensor:
    """The same, but y_{t-1} counts as 0 where `keep` is false. By `where`, which drops NaN too."""
    batch, tokens, channels = u.shape
    size = 1 << (tokens.bit_length() // 2)
    extra = -tokens % size
    inside = F.pad(u, (0, 0, 0, extra)).view(batch, -1, size, channels).clone()  # F.pad by 0 does not copy
    kept = F.pad(keep, (0, extra)).view(len(keep), -1, size, 1)
    for i in range(1, size):
        inside[:, :, i] += torch.where(kept[:, :, i], inside[:, :, i - 1] * a, 0)
    # True before the first token of the block whose `keep` is false.
    alive = kept.byte().cumprod(2).bool()
    across = a**size
    for k in range(1, inside.shape[1]):
        inside[:, k, -1] += torch.where(alive[:, k, -1], inside[:, k - 1, -1] * across, 0)
    powers = a ** torch.arange(1, size, device=a.device).unsqueeze(1)
    inside[:, 1:, :-1] += torch.where(alive[:, 1:, :-1], inside[:, :-1, -1:] * powers, 0)
    return inside.flatten(1, 2)[:, :tokens].contiguous()
