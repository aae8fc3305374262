"""What the compiled kernels promise beyond what every backend does."""

import itertools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.ops.operator_oracle import mix, random_kernels
from waveletgpt.ops import cpp, ema_mix, wavelet_mix

needs_compiled = pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))


@needs_compiled
# Around the 16 (8 in float64) channels of a vector and the 8 tokens of a step.
@pytest.mark.parametrize("channels", [1, 5, 8, 16, 17, 24, 40])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 63, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_are_those_of_torch_bit_for_bit(channels: int, tokens: int, dtype: torch.dtype) -> None:
    windows = [2 ** (c * 7 % 12) for c in range(channels)]
    x = torch.randn(2, tokens, 2 * channels, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, tokens, channels, dtype=dtype)
    results = []
    for backend in ("cpp", "torch"):
        y = wavelet_mix(x[..., :channels], windows, backend=backend)
        results.append((y, torch.autograd.grad(y, x, grad)[0]))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@needs_compiled
@pytest.mark.parametrize("channels", [1, 17, 40])
# Around a step of 8, the part of 64 taps, and the 1024 tokens that gradients are added up in.
@pytest.mark.parametrize(("tokens", "longest"), [(7, 70), (130, 64), (130, 65), (1030, 9), (1100, 1030)])
def test_learned_kernels(channels: int, tokens: int, longest: int) -> None:
    """The last size has more taps than are applied directly."""
    windows = [1 + (c * 31 + longest - 1) % longest for c in range(channels)]
    kernels = [kernel.requires_grad_() for kernel in random_kernels(windows)]
    x = torch.randn(2, tokens, channels, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    results = []
    for backend in ("cpp", "reference"):
        y = wavelet_mix(x, windows, kernels, backend=backend)
        results.append((y, *torch.autograd.grad(y, [x, *kernels], grad)))
    for ours, exact in zip(*results, strict=True):
        assert_close(ours, exact)


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    real = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real[0](*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: real[1](*a, **k).fill_(float("nan")))
    windows, state = [1, 3, 70, 2, 16] * 5, torch.randn(2, 100, 25).to(dtype)
    x = torch.randn(2, 21, 25).to(dtype).requires_grad_()
    kernels = [kernel.requires_grad_() for kernel in random_kernels(windows, torch.float32)]
    y = wavelet_mix(x, windows, kernels, state=state, backend="cpp")
    z = wavelet_mix(y, [2, 4, 8, 64, 128] * 5, state=state, backend="cpp")
    for tensor in (y, z, *torch.autograd.grad(z.sum(), [x, *kernels])):
        assert tensor.isfinite().all()


@needs_compiled
def test_bfloat16_is_rounded_as_torch_does() -> None:
    x = torch.randn(1, 4000, 32).bfloat16()
    x[0, :8, 0] = torch.tensor([0.0, -0.0, 1e-40, 3e38, -3e38, float("inf"), -float("inf"), float("nan")])
    # Windows of 1 give it back; the mean of two is exact in float32, so there is one rounding.
    assert torch.equal(wavelet_mix(x, [1] * 32, backend="cpp").view(torch.int16), x.view(torch.int16))
    y = wavelet_mix(x[..., 1:], [2] * 31, backend="cpp")
    assert torch.equal(y, mix(x[..., 1:], [2] * 31).bfloat16())


@needs_compiled
def test_threads_change_no_bit() -> None:
    windows = [2 ** (1 + c // 5) for c in range(40)]
    x = torch.randn(8, 300, 40, requires_grad=True)
    kernels = [kernel.requires_grad_() for kernel in random_kernels(windows, torch.float32)]
    decay = torch.rand(40)
    grad = torch.randn(8, 300, 40)
    results = []
    for threads, reach in itertools.product((1, 2, 3), (None, torch.arange(300)[None] % 111)):
        torch.set_num_threads(threads)
        y = wavelet_mix(x, windows, reach=reach, backend="cpp")
        z = wavelet_mix(x, windows, kernels, reach=reach, backend="cpp")
        e = ema_mix(x, decay, backend="cpp")
        grads = torch.autograd.grad(z, [x, *kernels], grad)
        results.append((y, z, e, torch.autograd.grad(y, x, grad)[0], *grads))
    for i, result in enumerate(results[2:]):
        assert all(map(torch.equal, results[i % 2], result))


@needs_compiled
def test_vectors_of_every_width() -> None:
    """Means are the same bits, all else differs by rounding; a processor with wide vectors runs the others too."""
    library: Any = cpp._LIBRARY
    widest = library.waveletgpt_vectors(64)
    windows, rows = [2 ** (c * 7 % 12) for c in range(41)], torch.arange(300)[None] % 111
    kernels = [kernel.requires_grad_() for kernel in random_kernels([5] * 41, torch.float32)]
    results = []
    try:
        for width in (16, 32, 64):
            assert library.waveletgpt_vectors(width) == min(width, widest)
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                torch.manual_seed(0)
                x = torch.randn(2, 300, 41).to(dtype).requires_grad_()
                y, z = wavelet_mix(x, windows, backend="cpp"), wavelet_mix(x, windows, reach=rows, backend="cpp")
                exact = (y, z, torch.autograd.grad(z, x, torch.ones_like(z))[0])
                learned = wavelet_mix(x, [5] * 41, kernels, reach=rows, backend="cpp")
                near = [learned, *torch.autograd.grad(learned, [x, *kernels], torch.ones_like(learned))]
                results.append((width, dtype, exact, [*near, ema_mix(x, torch.rand(41), backend="cpp")]))
    finally:
        library.waveletgpt_vectors(64)
    for (_, _, exact, near), (_, dtype, others, close) in itertools.product(results[:3], results[3:]):
        if exact[0].dtype == dtype:
            assert all(map(torch.equal, exact, others))
            assert_close(close, near)


@needs_compiled
def test_other_default_devices_do_not_matter() -> None:
    """The tables it keeps are read by their addresses."""
    x, windows, kernels = torch.randn(2, 9, 3), [2, 4, 8], random_kernels([2, 4, 8], torch.float32)
    expected = wavelet_mix(x, windows, backend="reference"), wavelet_mix(x, windows, kernels, backend="reference")
    cpp._sizes.cache_clear()
    cpp._layout.cache_clear()
    with torch.device("meta"):
        got = wavelet_mix(x, windows, backend="cpp"), wavelet_mix(x, windows, kernels, backend="cpp")
    assert_close(got, expected)


def test_why_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpp, "__file__", str(tmp_path / "cpp.py"))
    library, reason = cpp._load()
    assert library is None
    assert "not compiled" in str(reason)
    (tmp_path / f"_kernels{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    library, reason = cpp._load()
    assert library is None
    assert "does not load" in str(reason)
    assert "\n" not in str(reason)


@needs_compiled
@torch.no_grad()
@pytest.mark.parametrize(
    ("windows", "kernels"),
    [([2, 4], []), ([2, 4], [None, None]), (["2", 4], None), ([2.0, 4], None), ([2, 4, 8], None), ([3, 4], None)],
)
def test_the_short_way_of_one_token_refuses_as_the_long_one_does(windows: Any, kernels: Any) -> None:
    x, state = torch.randn(1, 1, 2), torch.randn(1, 5, 2)
    messages = []
    for backend in ("auto", "torch"):
        with pytest.raises(ValueError, match=r"windows|kernels") as error:
            wavelet_mix(x, windows, kernels, state=state, backend=backend)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
