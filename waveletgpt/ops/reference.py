"""The definition of the mixing operators, in plain torch.

Every other backend must agree with this file. It imports nothing but torch, because it also travels inside saved
checkpoints (as `ops.py`), where the package may not be installed.

Shapes: B batch, T tokens, C mixed coordinates, S tokens of state.
"""

import operator
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EDGES = ("zero", "partial")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wavelet_mix(
    x: Tensor,
    windows: Sequence[int],
    kernels: Iterable[Tensor] | None = None,
    *,
    edge: str = "zero",
    state: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Filter each coordinate along time with its own causal window: y[b,t,c] = sum_{j < w_c} h_c[j] x[b,t-j,c].

    `x` (B, T, C) of any floating dtype, any T >= 1. Returns (B, T, C) in the same dtype; sums are in float32 or wider.

    `windows`: C integers >= 1, in tokens; they may exceed T.

    `kernels`: None for the mean h = 1/w (the approximation of a causal undecimated Haar transform; windows must then
    be powers of two). Else one tensor (w_c,) per coordinate, or one tensor per distinct window, ascending: (w,) shared
    by the n coordinates that have this window, or (n, w), in their order. h[j] multiplies x[t-j].

    `edge`: "zero" takes the inputs before the first as 0. "partial" multiplies the result by w / min(w, n), with n
    the inputs seen so far, this one and the state included: for the mean, the mean over what there is.

    `state` (B, S, C): the inputs that came before `x`, oldest first, any S >= 0. The result is that of the whole.

    Raises ValueError for anything else. Formula: Verma, "WaveletGPT", arXiv 2409.12924.
    """
    groups = check_wavelet_mix(x, windows, kernels, edge, state)
    check_backend(backend, ("reference",))
    signal = x.to(torch.promote_types(x.dtype, torch.float32))
    if state is not None:
        signal = torch.cat((state.to(signal.dtype), signal), dim=1)
    tokens, seen = x.shape[1], signal.shape[1]
    mixed, order = [], []
    for window, coordinates, kernel in groups:
        reach = tokens + window - 1
        past_and_x = F.pad(signal, (0, 0, max(reach - seen, 0), 0))[:, -reach:, coordinates]
        if kernel is None:
            kernel = signal.new_full((len(coordinates), window), 1 / window)
        taps = kernel.to(signal.dtype).flip(-1).unsqueeze(1)
        with torch.autocast(x.device.type, enabled=False):
            y = F.conv1d(past_and_x.transpose(1, 2), taps, groups=len(coordinates)).transpose(1, 2)
        if edge == "partial":
            inputs = torch.arange(seen - tokens + 1, seen + 1, device=x.device).clamp(max=window)
            y = y * (window / inputs.to(y.dtype)).unsqueeze(-1)
        mixed.append(y)
        order += coordinates
    places = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(mixed, dim=-1)[..., places].to(x.dtype)


def ema_mix(x: Tensor, decay: Tensor, *, state: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Exponential moving average of each coordinate along time: y_t = a y_{t-1} + (1 - a) x_t.

    `x` (B, T, C) of any floating dtype. `decay` (C,): 0 <= a < 1, without unit, per token. `state` (B, C): the y before
    the first token, None for 0. Returns (B, T, C) in the dtype of `x`; sums are in float32 or wider.

    Raises ValueError for anything else (values of `decay` are looked at on CPU only: elsewhere it would wait for the
    device). Source: the EMA ablation of Verma, "WaveletGPT", arXiv 2409.12924.
    """
    check_ema_mix(x, decay, state)
    check_backend(backend, ("reference",))
    signal = x.to(torch.promote_types(x.dtype, torch.float32))
    a = decay.to(signal.dtype)
    y = torch.zeros_like(signal[:, 0]) if state is None else state.to(signal.dtype)
    steps = []
    for value in signal.unbind(1):
        y = a * y + (1 - a) * value
        steps.append(y)
    return torch.stack(steps, dim=1).to(x.dtype)


def check_wavelet_mix(
    x: Tensor, windows: Sequence[int], kernels: Iterable[Tensor] | None, edge: str, state: Tensor | None
) -> list[tuple[int, list[int], Tensor | None]]:
    """Check the arguments of `wavelet_mix`; return (window, its coordinates, their kernels (n, w)), ascending."""
    check_x(x)
    check_state(x, state, (x.shape[0], "S", x.shape[2]))
    if edge not in EDGES:
        raise ValueError(f"edge={edge!r} is unknown: use one of {', '.join(map(repr, EDGES))}")
    groups = group_windows(windows, x.shape[2])
    if kernels is not None:
        return [(w, at, h) for (w, at), h in zip(groups.items(), group_kernels(kernels, groups), strict=True)]
    for window in groups:
        if window & (window - 1):
            raise ValueError(f"windows has {window}: the mean needs a power of two (or give kernels)")
    return [(w, at, None) for w, at in groups.items()]


def group_windows(windows: Sequence[int], coordinates: int) -> dict[int, list[int]]:
    """Each distinct window, ascending, with the coordinates that have it."""
    if len(windows) != coordinates:
        raise ValueError(f"windows has {len(windows)} entries but x has {coordinates} coordinates: give one for each")
    groups: dict[int, list[int]] = {}
    for coordinate, window in enumerate(windows):
        try:
            window = operator.index(window)
        except TypeError:
            raise ValueError(f"windows has {window!r}: give integers >= 1") from None
        if window < 1:
            raise ValueError(f"windows has {window}: give integers >= 1")
        groups.setdefault(window, []).append(coordinate)
    return {window: groups[window] for window in sorted(groups)}


def group_kernels(kernels: Iterable[Tensor], groups: dict[int, list[int]]) -> list[Tensor]:
    """One (n, w) tensor for each group, from any of the forms that `wavelet_mix` takes."""
    given = list(kernels)
    for kernel in given:
        if not isinstance(kernel, Tensor) or not kernel.is_floating_point():
            what = kernel.dtype if isinstance(kernel, Tensor) else type(kernel).__name__
            raise ValueError(f"kernels has a {what}: give floating-point tensors")
    coordinates = sum(len(at) for at in groups.values())
    if len(given) == coordinates and all(kernel.dim() == 1 for kernel in given):
        for window, at in groups.items():
            for c in at:
                if given[c].shape[0] != window:
                    raise ValueError(f"kernels[{c}] has {given[c].shape[0]} taps: windows[{c}] needs {window}")
        return [torch.stack([given[c] for c in at]) for at in groups.values()]
    if len(given) != len(groups):
        raise ValueError(
            f"kernels has {len(given)} tensors: give one (w,) for each of the {coordinates} coordinates, "
            f"or one for each of the {len(groups)} distinct windows"
        )
    for i, (kernel, (window, at)) in enumerate(zip(given, groups.items(), strict=True)):
        if tuple(kernel.shape) not in ((window,), (len(at), window)):
            raise ValueError(
                f"kernels[{i}] has shape {tuple(kernel.shape)}: window {window} needs ({window},) or {(len(at), window)}"
            )
    return [kernel.expand(len(at), -1) for kernel, at in zip(given, groups.values(), strict=True)]


def check_ema_mix(x: Tensor, decay: Tensor, state: Tensor | None) -> None:
    """Check the arguments of `ema_mix`."""
    check_x(x)
    check_state(x, state, (x.shape[0], x.shape[2]))
    if not isinstance(decay, Tensor) or not decay.is_floating_point() or decay.shape != x.shape[2:]:
        what = f"{tuple(decay.shape)} {decay.dtype}" if isinstance(decay, Tensor) else repr(decay)
        raise ValueError(f"decay is {what}: give a floating-point tensor ({x.shape[2]},)")
    if decay.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = decay[~((decay >= 0) & (decay < 1))]
        if outside.numel():
            raise ValueError(f"decay has {outside[0].item()}: give values with 0 <= decay < 1")


def check_x(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        what = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x is {what}: give a float16, bfloat16, float32 or float64 tensor")
    if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: give (batch, tokens >= 1, coordinates >= 1)")


def check_state(x: Tensor, state: Tensor | None, shape: tuple[int | str, ...]) -> None:
    if state is None:
        return
    wanted = "(" + ", ".join(map(str, shape)) + ")"
    if not isinstance(state, Tensor) or not state.is_floating_point():
        what = state.dtype if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"state is {what}: give a floating-point tensor {wanted}")
    if state.dim() != len(shape) or any(n != m for n, m in zip(state.shape, shape, strict=True) if m != "S"):
        raise ValueError(f"state has shape {tuple(state.shape)}: x {tuple(x.shape)} needs {wanted}")


def check_backend(backend: str, available: Sequence[str]) -> None:
    if backend != "auto" and backend not in available:
        names = ", ".join(map(repr, ("auto", *available)))
        raise ValueError(f"backend={backend!r} is not available: use one of {names}")
