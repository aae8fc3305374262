"""Properties of `ema_mix` that hold for every backend."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from tests.ops.operator_oracle import FAST, ema, examples
from waveletgpt.ops import ema_mix, reference

# Triton leaves it to "torch".
each_backend = pytest.mark.parametrize("backend", [*FAST[1:], "reference"])
# Both ends: no memory at all, and nearly nothing but memory.
DECAY = torch.tensor([0.0, 0.3, 0.9, 0.9999], dtype=torch.float64)


@each_backend
@examples
@given(tokens=st.integers(1, 70), cuts=st.lists(st.integers(1, 69), max_size=4), remembers=st.booleans())
def test_equals_numpy_whole_and_in_chunks(backend: str, tokens: int, cuts: list[int], remembers: bool) -> None:
    x = torch.randn(2, tokens, 4, dtype=torch.float64)
    state = torch.randn(2, 4, dtype=torch.float64) if remembers else None
    expected = ema(x, DECAY, state)
    assert_close(ema_mix(x, DECAY, state=state, backend=backend), expected)
    for start, end in pairwise(sorted({0, tokens, *(cut for cut in cuts if cut < tokens)})):
        y = ema_mix(x[:, start:end], DECAY, state=state, backend=backend)
        assert_close(y, expected[:, start:end])
        state = y[:, -1]


@each_backend
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_every_dtype(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 70, 8).to(dtype)[..., ::2]
    y = ema_mix(x, DECAY, backend=backend)
    assert y.dtype == dtype
    sums = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(y.double(), ema(x, DECAY), rtol=0.51 * torch.finfo(dtype).eps + sums, atol=sums)


@each_backend
@pytest.mark.parametrize("tokens", [1, 2, 11])
def test_gradients(backend: str, tokens: int) -> None:
    x = torch.randn(2, tokens, 3, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, decay: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return ema_mix(x, decay, state=state, backend=backend)

    assert torch.autograd.gradcheck(run, (x, decay, state))
    assert torch.autograd.gradgradcheck(run, (x, decay, state))


@each_backend
def test_keeps_a_constant(backend: str) -> None:
    x = torch.full((1, 70, 4), 3.0, dtype=torch.float64)
    assert_close(ema_mix(x, DECAY, state=x[:, 0], backend=backend), x)


@each_backend
def test_nan_reaches_neither_the_past_nor_others(backend: str) -> None:
    x = torch.randn(2, 70, 4)
    clean = ema_mix(x, DECAY, backend=backend)
    x[0, 20, 2] = float("nan")
    y = ema_mix(x, DECAY, backend=backend)
    assert y[0, 20:, 2].isnan().all()
    y[0, 20:, 2] = clean[0, 20:, 2]
    assert_close(y, clean)


@each_backend
def test_compiles_whole(backend: str) -> None:
    torch._dynamo.reset()
    x, decay = torch.randn(2, 20, 4, requires_grad=True), torch.rand(4, requires_grad=True)

    def run(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return ema_mix(x, decay, state=x[:, 0], backend=backend).square().sum()

    expected = torch.autograd.grad(run(x, decay), (x, decay))
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x, decay), (x, decay))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


@each_backend
def test_autocast_changes_nothing(backend: str) -> None:
    x = torch.randn(2, 20, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ema_mix(x, DECAY, backend=backend)
    assert torch.equal(y, ema_mix(x, DECAY, backend=backend))
