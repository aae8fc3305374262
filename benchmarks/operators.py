"""Ways to compute the operators, for operator_cpu.py and operator_gpu.py: this package's, and what else there is.

Shapes: B batch, T tokens, C mixed channels (half of the embedding: a view, as in the model).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measuring import Stopwatch, demand_parity, rounds
from torch import Tensor

from waveletgpt.ops import ema_mix, wavelet_mix


@dataclass
class Way:
    """One way to compute an operator: `run` takes `inputs` (the first is x) and gives y."""

    name: str
    run: Callable[..., Tensor]
    inputs: list[Tensor]
    exact: bool = True
    """Ours: as near to the definition as rounding allows."""


def dyadic_windows(longest: int, channels: int) -> list[int]:
    """2 ... longest (at least 2), dealt evenly."""
    levels = max(1, (longest - 1).bit_length())
    return [2 ** (1 + c * levels // channels) for c in range(channels)]


def by_cumsum(x: Tensor, windows: list[int]) -> Tensor:
    longest = max(windows)
    sums = F.pad(x.float().cumsum(1), (0, 0, longest, 0))
    parts = []
    for w in sorted(set(windows)):
        first, end = windows.index(w), windows.index(w) + windows.count(w)
        late, early = sums[:, longest:, first:end], sums[:, longest - w : -w, first:end]
        parts.append((late - early) / w)
    return torch.cat(parts, 2).to(x.dtype)


def by_fft(x: Tensor, kernels: Tensor) -> Tensor:
    length = 1 << (x.shape[1] + kernels.shape[1] - 2).bit_length()
    spectrum = torch.fft.rfft(x.transpose(1, 2).float(), length) * torch.fft.rfft(kernels.float(), length)
    return torch.fft.irfft(spectrum, length)[..., : x.shape[1]].transpose(1, 2).to(x.dtype)


def by_conv1d(x: Tensor, kernels: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (kernels.shape[1] - 1, 0))
    return F.conv1d(padded, kernels.to(x.dtype).flip(1).unsqueeze(1), groups=len(kernels)).transpose(1, 2)


def signal(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> Tensor:
    """The mixed half of hidden states."""
    batch, tokens, channels = shape
    hidden = torch.randn(batch, tokens, 2 * channels, device=device).to(dtype)
    return hidden[..., :channels].requires_grad_()


def copy(x: Tensor) -> Way:
    """On a GPU of as many bytes without gaps: torch copies with gaps at less than the memory's bandwidth."""
    source = x.detach().contiguous().requires_grad_() if x.is_cuda else x
    return Way("copy", lambda x: x.clone(memory_format=torch.contiguous_format), [source])


def mean_ways(x: Tensor, windows: list[int], backends: list[str], peers: bool = True) -> list[Way]:
    ways = [Way(name, lambda x, b=name: wavelet_mix(x, windows, backend=b), [x]) for name in backends]
    if not peers:
        return ways
    longest = max(windows)
    kernels = torch.stack([F.pad(torch.full((w,), 1 / w), (0, longest - w)) for w in windows]).to(x.device)
    ways += [
        Way("cumsum", lambda x: by_cumsum(x, windows), [x], exact=False),
        Way("fft", lambda x: by_fft(x, kernels), [x], exact=False),
    ]
    if x.is_cuda and longest > 512:  # a second a call
        return ways
    return [*ways, Way("conv1d", lambda x: by_conv1d(x, kernels), [x], exact=False)]


def learned_ways(x: Tensor, windows: list[int], backends: list[str], peers: bool = True) -> list[Way]:
    distinct = sorted(set(windows))
    groups = [(torch.randn(windows.count(w), w, device=x.device) / w**0.5).requires_grad_() for w in distinct]
    ways = [Way(b, lambda x, *k, b=b: wavelet_mix(x, windows, k, backend=b), [x, *groups]) for b in backends]
    if not peers:
        return ways
    kernels = torch.cat([F.pad(group.detach(), (0, distinct[-1] - group.shape[1])) for group in groups])
    kernels.requires_grad_()
    ways += [Way("fft", by_fft, [x, kernels], exact=False), Way("conv1d", by_conv1d, [x, kernels], exact=False)]
    if x.is_cuda and windows == distinct * len(windows):
        ways += [Way(name, run, [x, kernels], exact=False) for name, run in short_convolutions(windows[0]).items()]
    return ways


def short_convolutions(taps: int) -> dict[str, Callable[..., Tensor]]:
    """Those of causal-conv1d and flash-linear-attention, where they are installed."""
    found: dict[str, Callable[..., Tensor]] = {}
    if taps > 4:
        return found
    try:
        from causal_conv1d import causal_conv1d_fn

        found["causal-conv1d"] = lambda x, k: causal_conv1d_fn(x.transpose(1, 2), k.flip(1).to(x.dtype)).transpose(1, 2)
    except ImportError:
        pass
    try:
        from fla.modules.convolution import causal_conv1d

        def by_fla(x: Tensor, k: Tensor) -> Tensor:
            y: Any = causal_conv1d(x.contiguous(), k.flip(1).to(x.dtype))
            return y[0] if isinstance(y, tuple) else y

        found["flash-linear-attention"] = by_fla
    except ImportError:
        pass
    return found


def ema_ways(x: Tensor, backends: list[str]) -> list[Way]:
    decay = torch.linspace(0.01, 0.99, x.shape[2], device=x.device)
    return [Way(name, lambda x, b=name: ema_mix(x, decay, backend=b), [x]) for name in backends]


def check(ways: list[Way], reference: Way, grad: Tensor, label: str) -> None:
    """All give the result and the gradient of x that the definition gives in float64, up to their rounding.

    Looked at in the first sequence.
    """
    x, *others = (tensor.detach().double() for tensor in reference.inputs)
    x = x[:1].requires_grad_()
    expected = reference.run(x, *others)
    (expected_grad,) = torch.autograd.grad(expected, x, grad[:1].double())
    rounding = torch.finfo(grad.dtype).eps
    for way in ways:
        # Ours round once; others round their taps too, and lose digits in long sums.
        tolerance = rounding + 1e-5 if way.exact else 8 * rounding + 1e-3
        y = way.run(*way.inputs)
        demand_parity(f"{label}: {way.name}", y[:1], expected, tolerance)
        (got,) = torch.autograd.grad(y, way.inputs[:1], grad)
        demand_parity(f"{label}: the gradient of {way.name}", got[:1], expected_grad, tolerance)


def measure(
    ways: list[Way], grad: Tensor, stopwatch: Stopwatch, seconds: float
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of forward and of backward (by all inputs) of each way, in turn.

    A quick one runs once before it is timed: it would else start with its code and data out of the caches, or not,
    depending on which way went before it.
    """
    times: dict[str, tuple[list[float], list[float]]] = {way.name: ([], []) for way in ways}
    for i in rounds(seconds):
        for way in ways[i % len(ways) :] + ways[: i % len(ways)]:
            if i > 0 and times[way.name][1][-1] < 5e-3:
                torch.autograd.grad(way.run(*way.inputs), way.inputs, grad)
            forward, y = stopwatch(lambda way=way: way.run(*way.inputs))
            backward, _ = stopwatch(lambda way=way, y=y: torch.autograd.grad(y, way.inputs, grad))
            times[way.name][0].append(forward)
            times[way.name][1].append(backward)
            del y
    return times
