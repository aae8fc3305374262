"""Backend "triton", for GPUs: the kernels of triton_kernels.py, in float16, bfloat16 and float32.

Backend "torch" does its work for float64, EMA, windows of more than 16,384 tokens, kernels of more than 64 taps within
documents (`reach`), and GPUs older than Ampere. Results differ from the reference by rounding. With kernels, an input
that is not finite also makes up to 48 tokens before it and after its window NaN. Repeating a call gives the same bits.

Set TRITON_INTERPRET=1 in the environment before Triton is imported to run it on a CPU, slowly, for tests.

Shapes: B batch, T tokens, C mixed channels.
"""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from waveletgpt.ops import fast
from waveletgpt.ops.autograd import Windows, empty_result, tap_offsets
from waveletgpt.ops.reference import UNLIMITED, ahead

try:
    import triton

    from waveletgpt.ops import triton_kernels as kernels

    _MISSING = None
    _INTERPRETED = kernels.INTERPRETED.value
except ImportError as error:
    _MISSING, _INTERPRETED = f"Triton is not installed here ({error})", False

# Means over at most 2^LEVELS tokens read their tokens one by one.
SHORT_MEAN = {"LEVELS": 3, "TT": 64, "CB": 64}
LONG_MEAN = {"L": 64, "CB": 32, "num_stages": 3}
# The fewest tiles that a program for long means gets, and the sizes of its ring, in tiles.
TILES, RINGS = 8, (1, 64, 256)
FILTER = {"M": 32, "N": 16, "K": 32, "num_stages": 2}
CORRELATE = {"M": 16, "N": 16, "K": 32, "SEGMENT": 1024, "num_stages": 2}
FILTER_WITHIN = {"TT": 64, "CB": 64}
# The longest kernels, in taps, that filter documents here.
WITHIN_TAPS = 64
# Enough programs to keep a large GPU busy: the sums for the gradients of taps are split among about so many.
BUSY = 1024


def unavailable(device: str | None = None) -> str | None:
    """Why this backend cannot be used here (for tensors on `device`); None if it can."""
    if _MISSING or _INTERPRETED:
        return _MISSING
    if device is None:
        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    return None if device == "cuda" else f"x is on {device}, this backend is for CUDA devices"


def mean(x: Tensor, windows: Windows, reverse: bool, past: int, reach: Tensor | None = None) -> Tensor:
    batch, tokens, channels = x.shape
    ring = _ring(max(windows), tokens, past)
    if _left_to_torch(x) or ring is None or max(windows) >= 1 << 31:
        return fast.mean(x, windows, reverse, past, reach)
    x, y = _prepare(x), empty_result(x, past)
    widths, _ = _table(windows, x.device)
    short = _short_blocks(windows, x.device)
    limits, limits_row = _limits(x, reach, reverse)
    shape = (widths, x.stride(0), x.stride(1), tokens, channels, past, limits, limits_row)
    how: dict[str, Any] = {"reverse": reverse, "WITHIN": reach is not None}
    with _on(x.device):
        if len(short):
            grid = (len(short), triton.cdiv(tokens - past, SHORT_MEAN["TT"]), batch)
            kernels.short_mean[grid](x, y, short, *shape, **how, **SHORT_MEAN)
        for masked, two in ((False, False), (False, True), (True, True)):
            items = _items(windows, tokens - past, masked, two, x.device)
            if len(items):
                more = {**how, "masked": masked, "TWO": two, "RING": ring, **LONG_MEAN}
                kernels.long_mean[(len(items) * batch,)](x, y, items, widths, batch, *shape[1:], **more)
    return y


def filter(x: Tensor, windows: Windows, taps: Tensor, past: int, reach: Tensor | None = None) -> Tensor:
    if _left_to_torch(x, windows, reach):
        return fast.filter(x, windows, taps, past, reach)
    return _filter(x, windows, taps, False, past, reach)


def filter_backward(
    grad: Tensor, x: Tensor, windows: Windows, taps: Tensor, reach: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if _left_to_torch(x, windows, reach):
        return fast.filter_backward(grad, x, windows, taps, reach)
    grad, x = _prepare(grad), _prepare(x)
    if reach is not None:
        return _filter(grad, windows, taps, True, 0, reach), _correlate_within(grad, x, windows, taps, reach)
    batch, tokens, channels = x.shape
    width = _width(x)
    blocks = triton.cdiv(channels, width)
    parts = triton.cdiv(min(max(windows), tokens), CORRELATE["M"] * CORRELATE["N"])
    splits = triton.cdiv(min(BUSY, blocks * batch * triton.cdiv(tokens, CORRELATE["SEGMENT"])), blocks * parts)
    # Zeros: taps that reach back beyond the first token are not visited.
    partial = taps.new_zeros(splits, len(taps))
    strides = (grad.stride(0), grad.stride(1), x.stride(0), x.stride(1))
    shape = (*_table(windows, x.device), *strides, batch, tokens, channels, len(taps), splits)
    with _on(x.device):
        kernels.correlate[blocks, splits, parts](grad, x, partial, *shape, CB=width, **CORRELATE)
    return _filter(grad, windows, taps, True, 0, None), partial.sum(0)


def _correlate_within(grad: Tensor, x: Tensor, windows: Windows, taps: Tensor, reach: Tensor) -> Tensor:
    batch, tokens, channels = x.shape
    blocks, longest = triton.cdiv(channels, FILTER_WITHIN["CB"]), min(max(windows), tokens)
    splits = min(triton.cdiv(BUSY, blocks * longest), batch * triton.cdiv(tokens, FILTER_WITHIN["TT"]))
    # Zeros: taps that reach back beyond the first token are not visited.
    partial = taps.new_zeros(splits, len(taps))
    strides = (grad.stride(0), grad.stride(1), x.stride(0), x.stride(1))
    shape = (*_table(windows, x.device), *strides, batch, tokens, channels, len(taps), splits)
    with _on(x.device):
        limits = _limits(x, reach, False)
        kernels.correlate_within[blocks, splits, longest](grad, x, partial, *shape, *limits, **FILTER_WITHIN)
    return partial.sum(0)


def decayed_sum(u: Tensor, a: Tensor, reverse: bool, keep: Tensor | None = None) -> Tensor:
    return fast.decayed_sum(u, a, reverse, keep)


def _filter(x: Tensor, windows: Windows, taps: Tensor, reverse: bool, past: int, reach: Tensor | None) -> Tensor:
    x, y, taps = _prepare(x), empty_result(x, past), taps.contiguous()
    batch, tokens, channels = x.shape
    shape = (*_table(windows, x.device), taps, x.stride(0), x.stride(1), tokens, channels, past)
    with _on(x.device):
        if reach is not None:
            how = FILTER_WITHIN
            grid = (triton.cdiv(channels, how["CB"]), triton.cdiv(tokens - past, how["TT"]), batch)
            kernels.filter_within[grid](x, y, *shape, *_limits(x, reach, reverse), reverse=reverse, **how)
        else:
            width = _width(x)
            grid = (triton.cdiv(channels, width), triton.cdiv(tokens - past, FILTER["M"] * FILTER["N"]), batch)
            kernels.filter[grid](x, y, *shape, reverse=reverse, CB=width, **FILTER)
    return y


def _limits(x: Tensor, reach: Tensor | None, reverse: bool) -> tuple[Tensor, int]:
    """How far each token may look, back or (in reverse) ahead, as the kernels take it, and the step from row to row."""
    if reach is None:
        return x, 0  # not looked at
    limits = (ahead(reach) if reverse else reach).clamp(max=UNLIMITED).int().contiguous()
    return limits, limits.shape[1] if len(limits) > 1 else 0


def _width(x: Tensor) -> int:
    """Number of channels in 32 bytes, the smallest unit that memory moves."""
    return 32 // x.element_size()


def _left_to_torch(x: Tensor, windows: Windows = (), reach: Tensor | None = None) -> bool:
    # The kernels address a sequence with 32 bits, and a grid has at most 65,535 rows.
    huge = x.shape[0] > 65_535 or x.shape[1] * max(x.stride(1), x.shape[2]) >= 1 << 31
    # Documents are filtered tap by tap here; with many taps the FFT of "torch" is faster.
    many = reach is not None and max(windows, default=0) > WITHIN_TAPS
    return many or huge or x.dtype == torch.float64 or (x.is_cuda and _is_old(x.device))


@lru_cache
def _is_old(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) < (8, 0)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _prepare(x: Tensor) -> Tensor:
    """x with neighbouring channels side by side in memory."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


# Tables outlive the call that makes them, so they must not be in the memory of a CUDA graph. A graph takes the
# allocations of its own thread only; this thread makes the tables.
_MAKER = ThreadPoolExecutor(1)


def _resident(values: Sequence[Any], device: torch.device) -> Tensor:
    return _MAKER.submit(torch.tensor, values, dtype=torch.int32, device=device).result()


@lru_cache(maxsize=256)
def _table(windows: Windows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two (C,) tensors: the windows, and where the taps of each begin."""
    both = _resident([windows, tap_offsets(windows)], device)
    return both[0], both[1]


def _ring(window: int, tokens: int, past: int) -> int | None:
    """How many tiles' sums the ring holds: the tiles of the window or, if fewer, of the sequence; None if too many."""
    size = LONG_MEAN["L"]
    there_are = -(-past // size) + -(-(tokens - past) // size)
    return next((ring for ring in RINGS if ring >= min(window // size, there_are)), None)


def _is_short(windows: Windows, first: int) -> bool:
    return max(windows[first : first + SHORT_MEAN["CB"]]) <= 1 << SHORT_MEAN["LEVELS"]


@lru_cache(maxsize=256)
def _short_blocks(windows: Windows, device: torch.device) -> Tensor:
    size = SHORT_MEAN["CB"]
    blocks = [i for i in range(-(-len(windows) // size)) if _is_short(windows, i * size)]
    return _resident(blocks, device)


@lru_cache(maxsize=256)
def _items(windows: Windows, tokens: int, masked: bool, two: bool, device: torch.device) -> Tensor:
    """(n, 5): the work items for long means, largest first, of blocks with one window, two, or (`masked`) more."""
    items = []
    size, tiles = LONG_MEAN["CB"], -(-tokens // LONG_MEAN["L"])
    for first in range(0, len(windows), size):
        here = sorted(set(windows[first : first + size]))
        if _is_short(windows, first // SHORT_MEAN["CB"] * SHORT_MEAN["CB"]):
            continue
        if (len(here) > 2, len(here) > 1) != (masked, two):
            continue
        for low, high in zip(here[::2], [*here[1::2], here[-1]], strict=False):
            # A program first adds up the tiles that its longest window reaches back to: give it as many of its own.
            count = max(TILES, high // LONG_MEAN["L"])
            items += [(first // size, i, min(i + count, tiles), low, high) for i in range(0, tiles, count)]
    items.sort(key=lambda item: item[1] - item[2])
    return _resident(items, device).view(-1, 5)
