"""The definition of the mixing operators, in plain torch.

Every other backend must agree with this file. It imports nothing but torch, because it also travels inside saved
checkpoints (as `ops.py`), where the package may not be installed.

Shapes: B batch, T tokens, C mixed channels, S tokens of state, n channels that share the window w.
"""

import operator
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EDGES = ("zero", "partial")


def wavelet_mix(
    x: Tensor,
    windows: Sequence[int],
    kernels: Iterable[Tensor] | None = None,
    *,
    edge: str = "zero",
    state: Tensor | None = None,
    reach: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Filter each channel along time with its own causal window: y[b,t,c] = sum_{j < w_c} h_c[j] x[b,t-j,c].

    Shapes: `x` (B, T, C), any floating dtype and T >= 1, to (B, T, C) of the same dtype; sums in float32 or wider.

    - `windows`: C integers >= 1, in tokens; they may exceed T.
    - `kernels`: None for the mean, h = 1/w (windows must be powers of two: the approximations of a causal undecimated
      Haar transform). Else one tensor (w,) per channel; or one tensor per distinct window, in ascending order, of
      shape (w,), shared by the n channels with this window, or (n, w), one row for each. h[j] multiplies x[t-j].
    - `edge`: "zero" counts inputs before the first one as 0. "partial" multiplies the result by w / min(w, seen),
      where `seen` is the number of inputs up to this one, with the state: a mean is then over existing inputs only.
    - `state` (B, S, C): the inputs before `x`, oldest first, any S >= 0. The result equals the last T tokens of one
      call with all inputs.
    - `reach` (B or 1, T), integers: how many tokens before each token belong to its document, so that the filter may
      use them (see `reach_of`); some may be in the state. Tap j counts where reach >= j, and `seen` is at most
      reach + 1. Within a document the reach must grow by 1 per token. It may exceed the number of tokens, which means
      all of them; a negative reach counts as 0.

    Raises ValueError for anything else. Source: Verma, "WaveletGPT", arXiv 2409.12924.
    """
    check_backend(backend, ("reference",))
    check_mix(x, edge, state, reach)
    groups = group_windows(windows, x.shape[2], dyadic=kernels is None)
    grouped = [None] * len(groups) if kernels is None else group_kernels(kernels, groups, x.device)
    signal = x.to(torch.promote_types(x.dtype, torch.float32))
    if state is not None:
        signal = torch.cat((state.to(signal.dtype), signal), dim=1)
    tokens, seen = x.shape[1], signal.shape[1]
    mixed, order = [], []
    for (window, channels), kernel in zip(groups.items(), grouped, strict=True):
        if kernel is None:
            kernel = signal.new_full((len(channels), window), 1 / window)
        taps = kernel.to(signal.dtype).flip(1).unsqueeze(1)
        needed = tokens + window - 1
        inputs = F.pad(signal, (0, 0, max(needed - seen, 0), 0))[:, -needed:, channels]
        if reach is None:
            with torch.autocast(x.device.type, enabled=False):
                y = F.conv1d(inputs.transpose(1, 2), taps, groups=len(channels)).transpose(1, 2)
        else:
            y = inputs[:, window - 1 :] * taps[:, 0, window - 1]
            for j in range(1, window):
                earlier = inputs[:, window - 1 - j : needed - j] * taps[:, 0, window - 1 - j]
                y = y + torch.where((reach >= j).unsqueeze(2), earlier, 0)
        if edge == "partial":
            count = torch.arange(seen - tokens + 1, seen + 1, device=x.device).clamp(max=window)
            if reach is not None:
                count = torch.minimum(count, reach.clamp(min=0) + 1)
            y = y * (window / count.to(y.dtype)).unsqueeze(-1)
        mixed.append(y)
        order += channels
    places = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(mixed, dim=2)[..., places].to(x.dtype)


def ema_mix(
    x: Tensor, decay: Tensor, *, state: Tensor | None = None, reach: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Average each channel along time with exponentially falling weights: y_t = a y_{t-1} + (1 - a) x_t.

    Shapes: `x` (B, T, C), any floating dtype and T >= 1, to (B, T, C) of the same dtype; sums in float32 or wider.

    - `decay` a (C,): 0 <= a < 1, per token.
    - `state` (B, C): y before the first token; None for 0.
    - `reach` (B or 1, T), as for `wavelet_mix`: where it is 0 (or less) a document begins, and y_{t-1} counts as 0.

    Raises ValueError for anything else. The values of `decay` are checked on a CPU only (elsewhere the check would wait
    for the device), and not while compiling. Source: the EMA ablation of Verma, "WaveletGPT", arXiv 2409.12924.
    """
    check_backend(backend, ("reference",))
    check_ema(x, decay, state, reach)
    signal = x.to(torch.promote_types(x.dtype, torch.float32))
    a = decay.to(signal.dtype)
    y = torch.zeros_like(signal[:, 0]) if state is None else state.to(signal.dtype)
    steps = []
    for t, value in enumerate(signal.unbind(1)):
        if reach is not None:
            y = torch.where((reach[:, t] >= 1).unsqueeze(1), y, 0)
        y = a * y + (1 - a) * value
        steps.append(y)
    return torch.stack(steps, dim=1).to(x.dtype)


UNLIMITED = 1 << 30  # longer than any sequence: the document began before the first token


def reach_of(
    tokens: int,
    positions: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor | None:
    """How many tokens before each token belong to the same document: (B or 1, T).

    The documents may be given in any of these forms; with several, a document begins where any of them says so.

    - `positions` (B, T): a document begins where they are 0 or do not grow by 1.
    - `seq_idx` (B, T): a document begins where the number changes.
    - `cu_seqlens` (documents + 1,): the first token of each document, then the total length; for a batch of one row.
    - `mask` (B, at least T; the last T columns count): 0 marks padding. A padding token uses no other token, and its
      reach is -1, so that a state made of padding is empty. Other values may number the documents; the column before
      the last T tells whether one begins with the first token.

    A document that began before the first token gets a reach of about `UNLIMITED`: it continues into the state, or
    takes all earlier tokens if there is no state. None if no form is given. Nothing is copied to the host.

    Raises:
        ValueError: a shape that doesn't fit `tokens`.
    """
    begins: list[Tensor] = []
    for name, ids in (("positions", positions), ("seq_idx", seq_idx)):
        if ids is not None and (ids.dim() != 2 or ids.shape[1] != tokens):
            raise ValueError(f"{name} has shape {tuple(ids.shape)}: give (batch, {tokens})")
    if mask is not None:
        if mask.dim() != 2 or mask.shape[1] < tokens:
            raise ValueError(f"mask has shape {tuple(mask.shape)}: give (batch, {tokens}), 0 for padding")
        earlier, mask = mask[:, : mask.shape[1] - tokens][:, -1:], mask[:, mask.shape[1] - tokens :]
        begins.append(_changes(mask) | (mask == 0))
        if earlier.shape[1]:  # a document may begin with the first of these tokens
            first = (mask[:, :1] != earlier) & (earlier != 0)
            begins.append(torch.cat([first, torch.zeros_like(mask[:, 1:], dtype=torch.bool)], 1))
    if seq_idx is not None:
        begins.append(_changes(seq_idx))
    if positions is not None:
        begins.append(torch.cat([positions[:, :1] == 0, positions[:, 1:] - positions[:, :-1] != 1], 1))
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1:
            raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: give (documents + 1,)")
        first = torch.zeros(1, tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
        begins.append(first.index_fill(1, cu_seqlens.long(), True)[:, :tokens])
    if not begins:
        return None
    start = begins[0]
    for other in begins[1:]:
        start = start | other
    t = torch.arange(tokens, device=start.device, dtype=torch.int32)  # int32, so that no filter has to convert it
    reach = t - torch.where(start, t, -UNLIMITED).cummax(1).values
    return reach if mask is None else torch.where(mask == 0, -1, reach)


def _changes(ids: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], 1)


def reach_with_past(reach: Tensor, past: int) -> Tensor:
    """Adds the reach of the `past` tokens before: they belong to the first token's document as far as it reaches."""
    if not past:
        return reach
    ago = torch.arange(past, 0, -1, device=reach.device, dtype=reach.dtype)
    return torch.cat([reach[:, :1] - ago, reach], dim=1)


def ahead(reach: Tensor) -> Tensor:
    """(B, T): how many tokens after each token belong to its document. This is the reach when time runs backwards."""
    tokens = reach.shape[1]
    t = torch.arange(tokens, device=reach.device)
    ends = torch.cat([reach[:, 1:] <= 0, torch.ones_like(reach[:, :1], dtype=torch.bool)], 1)
    return torch.where(ends, t, tokens).flip(1).cummin(1).values.flip(1) - t


def group_windows(windows: Sequence[int], channels: int, *, dyadic: bool) -> dict[int, list[int]]:
    """Each distinct window, ascending, with the channels that have it."""
    if len(windows) != channels:
        raise ValueError(f"windows has {len(windows)} entries: x has {channels} channels, give one for each")
    groups: dict[int, list[int]] = {}
    for channel, window in enumerate(windows):
        try:
            window = operator.index(window)
        except TypeError:
            raise ValueError(f"windows[{channel}] is {window!r}: give an integer >= 1") from None
        if window < 1:
            raise ValueError(f"windows[{channel}] is {window}: give an integer >= 1")
        if dyadic and window & (window - 1):
            raise ValueError(f"windows[{channel}] is {window}: the mean needs a power of two (others need kernels)")
        groups.setdefault(window, []).append(channel)
    return {window: groups[window] for window in sorted(groups)}


def group_kernels(kernels: Iterable[Tensor], groups: dict[int, list[int]], device: torch.device) -> list[Tensor]:
    """One tensor (n, w) for each group, from any form that `wavelet_mix` takes. `device` is that of x."""
    given = list(kernels)
    for i, kernel in enumerate(given):
        if not isinstance(kernel, Tensor) or not kernel.is_floating_point():
            raise ValueError(f"kernels[{i}] is {describe(kernel)}: give floating-point tensors")
        if kernel.device != device:
            # Offloading leaves parameters on `meta` if their module is never called; torch would give wrong numbers.
            raise ValueError(f"kernels[{i}] is on {kernel.device}: give it on {device}, as x")
    channels = sum(map(len, groups.values()))
    if len(given) == channels and all(kernel.dim() == 1 for kernel in given):
        for window, members in groups.items():
            for c in members:
                if given[c].shape[0] != window:
                    raise ValueError(f"kernels[{c}] has {given[c].shape[0]} taps: windows[{c}] needs {window}")
        return [torch.stack([given[c] for c in members]) for members in groups.values()]
    if len(given) != len(groups):
        each = f"for each of the {channels} channels, or one for each of the {len(groups)} distinct windows"
        raise ValueError(f"kernels has {len(given)} tensors: give one {each}")
    for i, (kernel, (window, members)) in enumerate(zip(given, groups.items(), strict=True)):
        fitting = ((window,), (len(members), window))
        if tuple(kernel.shape) not in fitting:
            raise ValueError(f"kernels[{i}] has shape {tuple(kernel.shape)}: window {window} needs one of {fitting}")
    pairs = zip(given, groups.values(), strict=True)
    return [kernel if kernel.dim() == 2 else kernel.expand(len(members), -1) for kernel, members in pairs]


def check_mix(x: Tensor, edge: str, state: Tensor | None, reach: Tensor | None = None) -> None:
    check_x(x)
    check_reach(x, reach)
    if edge not in EDGES:
        raise ValueError(f"edge is {edge!r}: use one of {EDGES}")
    if state is not None:
        check_floating("state", state)
        if state.dim() != 3 or state.shape[::2] != x.shape[::2]:
            raise ValueError(f"state has shape {tuple(state.shape)}: give ({x.shape[0]}, any, {x.shape[2]}), as x")


def check_reach(x: Tensor, reach: Tensor | None) -> None:
    if reach is None:
        return
    if not isinstance(reach, Tensor) or reach.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"reach is {describe(reach)}: give a tensor of int32 or int64")
    if reach.shape not in (x.shape[:2], (1, x.shape[1])):
        raise ValueError(f"reach has shape {tuple(reach.shape)}: give {tuple(x.shape[:2])}, a number for each token")


def check_ema(x: Tensor, decay: Tensor, state: Tensor | None, reach: Tensor | None = None) -> None:
    check_x(x)
    check_reach(x, reach)
    check_floating("decay", decay)
    if decay.shape != x.shape[2:]:
        raise ValueError(f"decay has shape {tuple(decay.shape)}: give ({x.shape[2]},), one for each channel of x")
    if decay.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = torch.aminmax(decay)
        if not (least >= 0 and most < 1):
            bad = decay[~((decay >= 0) & (decay < 1))]
            raise ValueError(f"decay has {bad[0].item()}: give values with 0 <= decay < 1")
    if state is not None:
        check_floating("state", state)
        if state.shape != x[:, 0].shape:
            raise ValueError(f"state has shape {tuple(state.shape)}: give {tuple(x[:, 0].shape)}, as x without time")


def check_x(x: Tensor) -> None:
    check_floating("x", x)
    if x.dim() != 3 or 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}: give (batch, tokens >= 1, channels >= 1)")


def check_floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        raise ValueError(f"{name} is {describe(value)}: give a tensor of one of {DTYPES}")


def describe(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_backend(backend: str, available: Sequence[str]) -> None:
    if backend != "auto" and backend not in available:
        raise ValueError(f"backend is {backend!r}: available here are {('auto', *available)}")
