"""The kernels of backend "triton"; triton.py launches them.

In all of them x is (B, T, C), with any strides of B and T and neighbouring channels side by side; y is dense and holds
the tokens from `past` on. `reverse` runs time backwards. Sums are in float32. A program works on a block of CB
neighbouring channels, whose windows may differ.

With WITHIN, token t reads no further back than `limits[b, t]` tokens, to the start of its document; in reverse, no
further ahead, to its end. Tokens of other documents may be loaded, but do not enter a sum.
"""

import triton
import triton.language as tl

# Triton's interpreter, for tests on a CPU, has no products of bfloat16 matrices.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load(x, step, t, c, tokens, channels, reverse: tl.constexpr):
    """x at tokens `t` and channels `c`, broadcast together; 0 outside the sequence."""
    at = tokens - 1 - t if reverse else t
    return tl.load(x + at * step + c, mask=(t >= 0) & (t < tokens) & (c < channels), other=0.0)


@triton.jit
def _place(y, t, c, past, tokens, channels, reverse: tl.constexpr):
    return y + (tokens - 1 - t if reverse else t - past) * channels + c


@triton.jit
def _limit(limits, t, tokens, reverse: tl.constexpr):
    """How many tokens before each of `t` are of its document; 0 outside the sequence."""
    at = tokens - 1 - t if reverse else t
    found = tl.load(limits + at, mask=(t >= 0) & (t < tokens), other=0)
    return tl.minimum(tl.maximum(found, 0), tokens)


@triton.jit
def _dot(a, b, sums):
    """sums + a b. For float32, three products of TF32 numbers, which keep 22 bits of each factor."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    return tl.dot(a, b, sums, input_precision="tf32x3")


@triton.jit
def short_mean(
    x,
    y,
    blocks,
    windows,
    row,
    step,
    tokens,
    channels,
    past,
    limits,
    limits_row,
    reverse: tl.constexpr,
    WITHIN: tl.constexpr,
    LEVELS: tl.constexpr,
    TT: tl.constexpr,
    CB: tl.constexpr,
):
    """Means over windows of at most 2^LEVELS tokens: x is read once for each token of the window, shifted. All reads
    but the first come from cache."""
    c = (tl.load(blocks + tl.program_id(0)) * CB + tl.arange(0, CB))[None, :]
    t = (past + tl.program_id(1) * TT + tl.arange(0, TT))[:, None]
    x += tl.program_id(2).to(tl.int64) * row
    y += tl.program_id(2).to(tl.int64) * (tokens - past) * channels
    w = tl.load(windows + c, mask=c < channels, other=1)
    if WITHIN:
        limit = _limit(limits + tl.program_id(2).to(tl.int64) * limits_row, t, tokens, reverse)
    sums = _load(x, step, t, c, tokens, channels, reverse).to(tl.float32)
    result = sums
    for level in tl.static_range(LEVELS):
        for j in tl.static_range(1 << level, 2 << level):
            value = _load(x, step, t - j, c, tokens, channels, reverse).to(tl.float32)
            sums += tl.where(j <= limit, value, 0.0) if WITHIN else value
        result = tl.where(w == 2 << level, sums, result)
    result *= 1.0 / w.to(tl.float32)
    tl.store(_place(y, t, c, past, tokens, channels, reverse), result, mask=(t < tokens) & (c < channels))


@triton.jit
def _add_where(inside, tile, sums):
    """sums + inside tile, where `inside` holds zeros and ones. A float32 tile is split into three bfloat16 parts, which
    loses nothing."""
    if tile.dtype == tl.float32:
        high = tile.to(tl.bfloat16)
        rest = tile - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return _dot(inside, high, _dot(inside, middle, _dot(inside, low, sums)))
    else:
        return _dot(inside, tile, sums)


@triton.jit
def long_mean(
    x,
    y,
    items,
    windows,
    batch,
    row,
    step,
    tokens,
    channels,
    past,
    limits,
    limits_row,
    reverse: tl.constexpr,
    WITHIN: tl.constexpr,
    masked: tl.constexpr,
    TWO: tl.constexpr,
    L: tl.constexpr,
    CB: tl.constexpr,
    RING: tl.constexpr,
):
    """Means over windows of one or two lengths, powers of two. Tile i holds the L tokens from past + i L on.

    A window of w >= L tokens that ends in tile i consists of the end of tile i - w / L, the whole tiles between, and
    the start of tile i. A shorter window consists of parts of tiles i - 1 and i. Sums over parts of tiles are products
    of a matrix of zeros and ones with a tile. Nothing is subtracted from a sum, so rounding errors do not add up. The
    ring holds the sums of the last RING tiles; of a tile in which a document begins, the sum of its last document, as
    later tiles see no other. An item is (block, first tile, last tile + 1, shorter window, longer window). `TWO`: these
    two differ; `masked`: the block has other windows too.
    """
    item = items + 5 * (tl.program_id(0) // batch)
    b = (tl.program_id(0) % batch).to(tl.int64)
    c = (tl.load(item) * CB + tl.arange(0, CB))[None, :]
    first = tl.load(item + 1)
    end = tl.load(item + 2)
    low = tl.load(item + 3)
    high = tl.load(item + 4)
    x += b * row
    y += b * (tokens - past) * channels
    limits += b * limits_row
    w = tl.load(windows + c, mask=c < channels, other=1)
    r = tl.arange(0, L)
    t = past + first * L + r[:, None]
    apart = r[:, None] - r[None, :]  # tokens from column to row
    number = tl.float16 if x.dtype.element_ty == tl.float16 else tl.bfloat16
    low_back = tl.maximum(low // L, 1) * L
    high_back = tl.maximum(high // L, 1) * L
    low_newest = tl.where((apart >= 0) & (apart < low), 1.0, 0.0).to(number)
    low_oldest = tl.where(apart + low_back < low, 1.0, 0.0).to(number)
    if TWO:
        high_newest = tl.where((apart >= 0) & (apart < high), 1.0, 0.0).to(number)
        high_oldest = tl.where(apart + high_back < high, 1.0, 0.0).to(number)
    slots = tl.arange(0, RING)[:, None]
    ring = tl.zeros((RING, CB), tl.float32)
    if high > L:
        for i in range(tl.maximum(first - high // L + 1, -((past + L - 1) // L)), first):
            before = _load(x, step, past + i * L + r[:, None], c, tokens, channels, reverse).to(tl.float32)
            if WITHIN:
                last = _limit(limits, past + i * L + L - 1, tokens, reverse)
                before = tl.where(L - 1 - r[:, None] <= last, before, 0.0)
            ring = tl.where(slots == (i & (RING - 1)), tl.sum(before, axis=0)[None, :], ring)
    for i in range(first, end):
        now = _load(x, step, t, c, tokens, channels, reverse)
        then = _load(x, step, t - low_back, c, tokens, channels, reverse)
        newest, oldest = low_newest, low_oldest
        if WITHIN:
            limit = _limit(limits, t, tokens, reverse)
            newest = tl.where(apart <= limit, newest, 0.0).to(number)
            oldest = tl.where(apart + low_back <= limit, oldest, 0.0).to(number)
        sums = _add_where(oldest, then, _add_where(newest, now, tl.zeros(now.shape, tl.float32)))
        if TWO:
            far = _load(x, step, t - high_back, c, tokens, channels, reverse)
            newest, oldest = high_newest, high_oldest
            if WITHIN:
                newest = tl.where(apart <= limit, newest, 0.0).to(number)
                oldest = tl.where(apart + high_back <= limit, oldest, 0.0).to(number)
            others = _add_where(oldest, far, _add_where(newest, now, tl.zeros(now.shape, tl.float32)))
            sums = tl.where(w == low, sums, others)
        # Zero times NaN or infinity is NaN, also outside the window: then add up the window's tokens one by one.
        if tl.sum(tl.sum(sums * 0.0, axis=1), axis=0) == 0:
            if high > L:
                age = ((i - 1 - slots) & (RING - 1)) + 1
                if WITHIN:
                    # Rows in the document of the first one reach back as far as it does, the others not at all.
                    tiles = (tl.sum(tl.where(r == 0, tl.sum(limit, axis=1), 0), axis=0) + L - 1) // L
                    whole = tl.sum(tl.where((age < w // L) & (age <= tiles), ring, 0.0), axis=0)[None, :]
                    sums += tl.where(limit > r[:, None], whole, 0.0)
                else:
                    sums += tl.sum(tl.where(age < w // L, ring, 0.0), axis=0)[None, :]
        else:
            sums = tl.zeros(now.shape, tl.float32)
            for j in range(tl.minimum(high, past + (i + 1) * L)):
                value = _load(x, step, t - j, c, tokens, channels, reverse).to(tl.float32)
                inside = (j < w) & (j <= limit) if WITHIN else j < w
                sums += tl.where(inside, value, 0.0)
        sums *= 1.0 / w.to(tl.float32)
        mask = (t < tokens) & (c < channels)
        if masked:
            mask = mask & ((w == low) | (w == high))
        tl.store(_place(y, t, c, past, tokens, channels, reverse), sums, mask=mask)
        if high > L:
            whole = now.to(tl.float32)
            if WITHIN:
                last = _limit(limits, past + i * L + L - 1, tokens, reverse)
                whole = tl.where(L - 1 - r[:, None] <= last, whole, 0.0)
            ring = tl.where(slots == (i & (RING - 1)), tl.sum(whole, axis=0)[None, :], ring)
        t += L


@triton.jit
def filter(
    x,
    y,
    windows,
    offsets,
    taps,
    row,
    step,
    tokens,
    channels,
    past,
    reverse: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CB: tl.constexpr,
):
    """Learned kernels, by a matrix product for each channel: y[t + m N + n] = sum over q of
    x[t + m N - q] taps[q + n], with q = j - n for tap j."""
    c = (tl.program_id(0) * CB + tl.arange(0, CB))[:, None, None]
    start = past + tl.program_id(1) * (M * N)
    x += tl.program_id(2).to(tl.int64) * row
    y += tl.program_id(2).to(tl.int64) * (tokens - past) * channels
    w = tl.load(windows + c, mask=c < channels, other=0)
    offset = tl.load(offsets + c, mask=c < channels, other=0)
    m = tl.arange(0, M)[None, :, None] * N
    n = tl.arange(0, N)[None, None, :]
    sums = tl.zeros((CB, M, N), tl.float32)
    longest = tl.max(tl.max(tl.max(w, axis=0), axis=0), axis=0)
    for first in range(-N, tl.minimum(longest, start + M * N), K):
        t = start + m - (first + tl.arange(0, K))[None, None, :]
        signal = _load(x, step, t, c, tokens, channels, reverse)
        j = (first + tl.arange(0, K))[None, :, None] + n
        kernel = tl.load(taps + offset + j, mask=(j >= 0) & (j < w), other=0.0)
        high = kernel.to(signal.dtype)
        sums = _dot(signal, high, sums)
        if signal.dtype != tl.float32:  # the rest of the tap: two numbers of this dtype hold at least 16 bits
            sums = _dot(signal, (kernel - high.to(tl.float32)).to(signal.dtype), sums)
    t = start + m + n
    tl.store(_place(y, t, c, past, tokens, channels, reverse), sums, mask=(t < tokens) & (c < channels))


@triton.jit
def correlate(
    grad,
    x,
    partial,
    windows,
    offsets,
    grad_row,
    grad_step,
    row,
    step,
    batch,
    tokens,
    channels,
    taps,
    splits,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CB: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Gradients of a block of M N taps, by a matrix product for each channel. For tap j = m N + n the gradient is the
    sum over t of grad[t + m N] x[t - n]. Each program takes every `splits`-th segment."""
    c = (tl.program_id(0) * CB + tl.arange(0, CB))[:, None, None]
    split = tl.program_id(1)
    lag = tl.program_id(2) * (M * N)
    w = tl.load(windows + c, mask=c < channels, other=0)
    offset = tl.load(offsets + c, mask=c < channels, other=0)
    m = tl.arange(0, M)[None, :, None] * N
    n = tl.arange(0, N)[None, None, :]
    k = tl.arange(0, K)
    sums = tl.zeros((CB, M, N), tl.float32)
    if lag < tl.max(tl.max(tl.max(w, axis=0), axis=0), axis=0):
        segments = tl.cdiv(tokens, SEGMENT)
        for i in range(split, batch * segments, splits):
            b = (i // segments).to(tl.int64)
            begin = i % segments * SEGMENT
            for t in range(begin, tl.minimum(begin + SEGMENT, tokens - lag), K):
                ahead = t + lag + m + k[None, None, :]
                late = _load(grad + b * grad_row, grad_step, ahead, c, tokens, channels, False)
                early = _load(x + b * row, step, t + k[None, :, None] - n, c, tokens, channels, False)
                sums = _dot(late, early, sums)
    j = lag + m + n
    tl.store(partial + split * taps + offset + j, sums, mask=j < w)


@triton.jit
def filter_within(
    x,
    y,
    windows,
    offsets,
    taps,
    row,
    step,
    tokens,
    channels,
    past,
    limits,
    limits_row,
    reverse: tl.constexpr,
    TT: tl.constexpr,
    CB: tl.constexpr,
):
    """`filter` within documents, tap by tap: no matrix product leaves out what lies before a document's start."""
    c = (tl.program_id(0) * CB + tl.arange(0, CB))[None, :]
    t = (past + tl.program_id(1) * TT + tl.arange(0, TT))[:, None]
    x += tl.program_id(2).to(tl.int64) * row
    y += tl.program_id(2).to(tl.int64) * (tokens - past) * channels
    limit = _limit(limits + tl.program_id(2).to(tl.int64) * limits_row, t, tokens, reverse)
    w = tl.load(windows + c, mask=c < channels, other=0)
    offset = tl.load(offsets + c, mask=c < channels, other=0)
    sums = tl.zeros((TT, CB), tl.float32)
    for j in range(tl.max(tl.max(w, axis=1), axis=0)):
        tap = tl.load(taps + offset + j, mask=j < w, other=0.0)
        value = _load(x, step, t - j, c, tokens, channels, reverse).to(tl.float32)
        sums += tl.where(j <= limit, value * tap, 0.0)
    tl.store(_place(y, t, c, past, tokens, channels, reverse), sums, mask=(t < tokens) & (c < channels))


@triton.jit
def correlate_within(
    grad,
    x,
    partial,
    windows,
    offsets,
    grad_row,
    grad_step,
    row,
    step,
    batch,
    tokens,
    channels,
    taps,
    splits,
    limits,
    limits_row,
    TT: tl.constexpr,
    CB: tl.constexpr,
):
    """`correlate` within documents: a program has one tap of CB channels and every `splits`-th part of TT tokens."""
    c = (tl.program_id(0) * CB + tl.arange(0, CB))[None, :]
    split = tl.program_id(1)
    j = tl.program_id(2)
    w = tl.load(windows + c, mask=c < channels, other=0)
    offset = tl.load(offsets + c, mask=c < channels, other=0)
    sums = tl.zeros((1, CB), tl.float32)
    if j < tl.max(tl.max(w, axis=1), axis=0):
        parts = tl.cdiv(tokens, TT)
        for i in range(split, batch * parts, splits):
            b = (i // parts).to(tl.int64)
            t = (i % parts * TT + tl.arange(0, TT))[:, None]
            late = _load(grad + b * grad_row, grad_step, t, c, tokens, channels, False).to(tl.float32)
            early = _load(x + b * row, step, t - j, c, tokens, channels, False).to(tl.float32)
            limit = _limit(limits + b * limits_row, t, tokens, False)
            sums += tl.sum(tl.where(j <= limit, late * early, 0.0), axis=0)[None, :]
    tl.store(partial + split * taps + offset + j, sums, mask=j < w)
