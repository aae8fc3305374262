"""What the operators must compute, in NumPy float64, one token at a time, and random cases to compute it on."""

from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from waveletgpt.ops import autograd, unavailable_backends


def device_of(backend: str) -> str:
    """Where a backend works: Triton on a GPU, but on a CPU with TRITON_INTERPRET=1."""
    return "cuda" if backend == "triton" and autograd.KERNELS[backend].unavailable("cpu") else "cpu"


def _parameter(backend: str) -> object:
    if backend in unavailable_backends():
        return pytest.param(backend, marks=pytest.mark.skip(reason=unavailable_backends()[backend]))
    return pytest.param(backend, marks=pytest.mark.gpu) if device_of(backend) == "cuda" else backend


FAST = [_parameter(backend) for backend in autograd.KERNELS]
BACKENDS = [*FAST, "reference"]
EDGES = ("zero", "partial")
examples = settings(max_examples=40)


def rounding(backend: str, dtype: torch.dtype, learned: bool) -> tuple[float, float]:
    """How far a result may be from the exact one: relative to it, and absolutely for values of about 1.

    It is the exact one rounded once, but for sums in float32. Triton holds taps in 16 bits where x is bfloat16, and its
    interpreter cuts off what bfloat16 cannot hold.
    """
    half = dtype == torch.bfloat16 and backend == "triton"
    sums = 1e-12 if dtype == torch.float64 else 1e-4 if half and learned else 1e-5
    ulps = 1.01 if half and device_of(backend) == "cpu" else 0.51
    return ulps * torch.finfo(dtype).eps + sums, sums


def mix(x: Tensor, windows: list[int], kernels: list[Tensor] | None = None, edge: str = "zero") -> Tensor:
    """`wavelet_mix` with one kernel per channel."""
    values = x.double().cpu().numpy()
    y = np.zeros_like(values)
    for c, w in enumerate(windows):
        h = np.full(w, 1 / w) if kernels is None else kernels[c].detach().double().cpu().numpy()
        for t in range(x.shape[1]):
            reach = min(w, t + 1)
            for j in range(reach):
                y[:, t, c] += h[j] * values[:, t - j, c]
            if edge == "partial":
                y[:, t, c] *= w / reach
    return torch.from_numpy(y).to(x.device)


def ema(x: Tensor, decay: Tensor, state: Tensor | None = None) -> Tensor:
    values, a = x.double().cpu().numpy(), decay.detach().double().cpu().numpy()
    last = np.zeros_like(values[:, 0]) if state is None else state.double().cpu().numpy()
    y = np.zeros_like(values)
    for t in range(x.shape[1]):
        y[:, t] = last = a * last + (1 - a) * values[:, t]
    return torch.from_numpy(y).to(x.device)


@dataclass
class Case:
    x: Tensor
    windows: list[int]
    kernels: list[Tensor] | None
    edge: str


@st.composite
def cases(draw: st.DrawFn, max_tokens: int = 24, learned: bool | None = None) -> Case:
    """Float64 inputs; windows in any order, shorter and longer than the sequence; with or without kernels."""
    generator = torch.Generator("cpu").manual_seed(draw(st.integers(0, 2**32)))
    learned = draw(st.booleans()) if learned is None else learned
    lengths = st.integers(1, 40) if learned else st.sampled_from([1, 2, 4, 8, 16, 32, 64])
    windows = draw(st.lists(lengths, min_size=1, max_size=6))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, max_tokens)), len(windows))
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(torch.get_default_device())
    kernels = [torch.randn(w, generator=generator, dtype=torch.float64, device="cpu") for w in windows]
    kernels = [kernel.to(torch.get_default_device()) for kernel in kernels] if learned else None
    return Case(x, windows, kernels, draw(st.sampled_from(EDGES)))


def random_kernels(windows: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(w, dtype=dtype) / w**0.5 for w in windows]
