"""Properties of `wavelet_mix` that hold for every backend."""

import shutil
import threading
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.ops.operator_oracle import BACKENDS, EDGES, FAST, Case, cases, examples, mix, random_kernels, rounding
from waveletgpt.ops import fast, reference, wavelet_mix

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_edge = pytest.mark.parametrize("edge", EDGES)
WINDOWS = [2, 2, 4, 8, 16, 32]
# Both sides of every threshold between the ways to apply a kernel, and an order that is not ascending.
LEARNED = [1, 3, 4, 5, 16, 17, 33, 100, 2, 3]


@each_backend
@examples
@given(case=cases())
def test_equals_numpy(backend: str, case: Case) -> None:
    y = wavelet_mix(case.x, case.windows, case.kernels, edge=case.edge, backend=backend)
    assert_close(y, mix(case.x, case.windows, case.kernels, case.edge))


@each_backend
def test_equals_undecimated_haar_transform(backend: str) -> None:
    """PyWavelets looks ahead, wraps around, and keeps the norm: a_k[t] = 2^(k/2) mean(x[t : t + 2^k])."""
    pywt = pytest.importorskip("pywt")
    tokens, levels = 128, 5
    x = torch.randn(1, tokens, 1, dtype=torch.float64).expand(-1, -1, levels)
    y = wavelet_mix(x, [2**k for k in range(1, levels + 1)], backend=backend)[0]
    transform = pywt.swt(x[0, :, 0].cpu().numpy(), "haar", level=levels)
    for k, (approximation, _) in zip(range(levels, 0, -1), transform, strict=True):
        w = 2**k
        expected = torch.from_numpy(approximation).to(x)[: tokens - w + 1] / 2 ** (k / 2)
        assert_close(y[w - 1 :, k - 1], expected)


@each_backend
@examples
@given(case=cases(), cut=st.integers(0, 23))
def test_is_causal(backend: str, case: Case, cut: int) -> None:
    changed = case.x.clone()
    changed[:, cut:] = torch.randn_like(changed[:, cut:])
    y, other = (wavelet_mix(x, case.windows, case.kernels, edge=case.edge, backend=backend) for x in (case.x, changed))
    # Through an FFT the future is felt as rounding.
    tolerance = {"rtol": 0.0, "atol": 0.0 if case.kernels is None else 1e-13}
    assert_close(y[:, :cut], other[:, :cut], **tolerance)


@each_backend
@examples
@given(case=cases(), factor=st.floats(-10, 10))
def test_is_linear(backend: str, case: Case, factor: float) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return wavelet_mix(x, case.windows, case.kernels, edge=case.edge, backend=backend)

    other = torch.randn_like(case.x)
    assert_close(run(case.x + factor * other), run(case.x) + factor * run(other))


@each_backend
@examples
@given(case=cases(), delay=st.integers(0, 30))
def test_shifted_input_gives_shifted_output(backend: str, case: Case, delay: int) -> None:
    later = torch.nn.functional.pad(case.x, (0, 0, delay, 0))
    y, y_later = (wavelet_mix(x, case.windows, case.kernels, backend=backend) for x in (case.x, later))
    assert_close(y_later[:, delay:], y)
    assert_close(y_later[:, :delay], torch.zeros_like(y_later[:, :delay]))


@each_backend
@examples
@given(case=cases(), cuts=st.lists(st.integers(0, 24), max_size=6))
def test_chunks_equal_whole(backend: str, case: Case, cuts: list[int]) -> None:
    tokens = case.x.shape[1]
    bounds = sorted({0, tokens, *(cut for cut in cuts if cut < tokens)})
    chunks = [
        wavelet_mix(
            case.x[:, start:end],
            case.windows,
            case.kernels,
            edge=case.edge,
            state=case.x[:, :start],
            backend=backend,
        )
        for start, end in pairwise(bounds)
    ]
    whole = wavelet_mix(case.x, case.windows, case.kernels, edge=case.edge, backend=backend)
    assert_close(torch.cat(chunks, 1), whole)


@each_backend
@pytest.mark.parametrize("learned", [False, True])
def test_decoding_with_the_last_inputs_equals_whole(backend: str, learned: bool) -> None:
    """A state of the longest window less one is enough: what is older has no influence."""
    windows = [8, 1, 4, 16, 2]
    kernels = random_kernels(windows) if learned else None
    x = torch.randn(2, 40, 5, dtype=torch.float64)
    whole = wavelet_mix(x, windows, kernels, backend=backend)
    for t in range(1, 40):
        y = wavelet_mix(x[:, t : t + 1], windows, kernels, state=x[:, max(0, t - 15) : t], backend=backend)
        assert_close(y[:, 0], whole[:, t])


@each_backend
@pytest.mark.parametrize("tokens", [1, 2, 3, 63, 64, 65])
@pytest.mark.parametrize("windows", [WINDOWS, LEARNED])
def test_lengths_around_windows(backend: str, tokens: int, windows: list[int]) -> None:
    kernels = random_kernels(windows) if windows is LEARNED else None
    x = torch.randn(2, tokens, len(windows), dtype=torch.float64)
    assert_close(wavelet_mix(x, windows, kernels, backend=backend), mix(x, windows, kernels))


@each_backend
@each_edge
@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("windows", [WINDOWS, LEARNED])
def test_every_dtype(backend: str, edge: str, dtype: torch.dtype, windows: list[int]) -> None:
    """Sums are in float32 or wider, so that a half-precision result is the exact one, rounded once."""
    kernels = random_kernels(windows) if windows is LEARNED else None
    x = torch.randn(2, 70, len(windows)).to(dtype)
    y = wavelet_mix(x, windows, kernels, edge=edge, backend=backend)
    assert y.dtype == dtype
    expected = mix(x, windows, kernels, edge)
    relative, absolute = rounding(backend, dtype, bool(kernels))
    if kernels and edge == "partial":
        absolute *= 10  # w / n, up to 100 here, enlarges the rounding of an FFT too
    assert_close(y.double(), expected, rtol=relative, atol=absolute)


@each_backend
@each_edge
def test_kernel_forms(backend: str, edge: str) -> None:
    """One per channel, per window for each of its channels, or per window and shared."""
    windows = [4, 2, 4, 7, 2]
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    single = random_kernels(windows)
    y = wavelet_mix(x, windows, single, edge=edge, backend=backend)
    assert_close(y, mix(x, windows, single, edge))
    grouped = [torch.stack([single[1], single[4]]), torch.stack([single[0], single[2]]), single[3][None]]
    assert_close(wavelet_mix(x, windows, grouped, edge=edge, backend=backend), y)
    shared = [single[1], single[0], single[3]]
    spread = [shared[(2, 4, 7).index(w)] for w in windows]
    assert_close(wavelet_mix(x, windows, shared, edge=edge, backend=backend), mix(x, windows, spread, edge))


@each_backend
@each_edge
def test_uniform_kernels_equal_the_mean(backend: str, edge: str) -> None:
    x = torch.randn(2, 50, len(WINDOWS), dtype=torch.float64)
    kernels = [torch.full((w,), 1 / w, dtype=torch.float64) for w in WINDOWS]
    expected = wavelet_mix(x, WINDOWS, edge=edge, backend=backend)
    assert_close(wavelet_mix(x, WINDOWS, kernels, edge=edge, backend=backend), expected)


@each_backend
def test_partial_edge_keeps_a_constant(backend: str) -> None:
    x = torch.ones(1, 50, len(WINDOWS), dtype=torch.float64)
    assert_close(wavelet_mix(x, WINDOWS, edge="partial", backend=backend), x)


@each_backend
@each_edge
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("learned", [False, True])
def test_gradients(backend: str, edge: str, tokens: int, learned: bool) -> None:
    windows = [4, 1, 2, 16] if not learned else [3, 1, 3, 14]
    kernels = [torch.randn(w, dtype=torch.float64, requires_grad=True) for w in windows] if learned else []
    x = torch.randn(2, tokens, 4, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, state: torch.Tensor, *kernels: torch.Tensor) -> torch.Tensor:
        return wavelet_mix(x, windows, kernels or None, edge=edge, state=state, backend=backend)

    assert torch.autograd.gradcheck(run, (x, state, *kernels))
    if backend == "reference" or not learned:
        assert torch.autograd.gradgradcheck(run, (x, state, *kernels))


@each_edge
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("windows", [WINDOWS, LEARNED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_low_precision_gradients(backend: str, edge: str, windows: list[int], dtype: torch.dtype) -> None:
    """Float32 has its own ways to apply a kernel, which a check in float64 does not reach."""
    kernels = [k.requires_grad_() for k in random_kernels(windows, torch.float32)] if windows is LEARNED else []
    x = torch.randn(2, 70, len(windows)).to(dtype).requires_grad_()
    grad = torch.randn(2, 70, len(windows)).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *kernels)]
    expected = torch.autograd.grad(
        wavelet_mix(exact[0], windows, exact[1:] or None, edge=edge, backend="reference"), exact, grad.double()
    )
    got = torch.autograd.grad(wavelet_mix(x, windows, kernels or None, edge=edge, backend=backend), [x, *kernels], grad)
    for a, b, tensor in zip(got, expected, (x, *kernels), strict=True):
        assert a.dtype == tensor.dtype
        relative, absolute = rounding(backend, a.dtype, bool(kernels))
        assert_close(a.double(), b, rtol=relative, atol=10 * absolute)


@each_backend
@pytest.mark.parametrize("windows", [WINDOWS, LEARNED])
def test_layouts_of_the_input(backend: str, windows: list[int]) -> None:
    n = len(windows)
    kernels = random_kernels(windows) if windows is LEARNED else None
    wide = torch.randn(3, 40, 2 * n, dtype=torch.float64)
    layouts = {
        "half of the embedding": wide[..., :n],
        "every other": wide[..., ::2],
        "time last": wide[..., :n].transpose(1, 2).contiguous().transpose(1, 2),
        "one for all": wide[:1, :1, :1].expand(3, 40, n),
    }
    for name, x in layouts.items():
        y = wavelet_mix(x, windows, kernels, backend=backend)
        assert_close(y, wavelet_mix(x.contiguous(), windows, kernels, backend=backend), msg=name)
        assert y.is_contiguous()


@each_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("learned", [False, True])
def test_nan_stays_in_its_window_and_channel(backend: str, bad: float, learned: bool) -> None:
    if backend == "triton" and learned:
        pytest.skip("NaN reaches a little further there: test_triton.py")
    windows = LEARNED if learned else WINDOWS
    kernels = random_kernels(windows, torch.float32) if learned else None
    x = torch.randn(2, 130, len(windows))
    clean = wavelet_mix(x, windows, kernels, backend=backend)
    at = 20
    for c, w in enumerate(windows):
        dirty = x.clone()
        dirty[0, at, c] = bad
        y = wavelet_mix(dirty, windows, kernels, backend=backend)
        touched = torch.zeros_like(y, dtype=torch.bool)
        touched[0, at : at + w, c] = True
        assert not y[touched].isfinite().any()
        assert_close(y[~touched], clean[~touched])
        now = wavelet_mix(dirty[:, at + w : at + w + 1], windows, kernels, state=dirty[:, : at + w], backend=backend)
        assert now[0, 0, c].isfinite()


@each_backend
@pytest.mark.parametrize("windows", [WINDOWS, LEARNED])
def test_is_deterministic(backend: str, windows: list[int]) -> None:
    kernels = random_kernels(windows, torch.float32) if windows is LEARNED else None
    x = torch.randn(8, 500, len(windows))
    first = wavelet_mix(x, windows, kernels, backend=backend)
    kept = first.clone()
    wavelet_mix(torch.randn_like(x), windows, kernels, backend=backend)
    assert torch.equal(first, kept), "a later call wrote to an earlier result"
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(wavelet_mix(x, windows, kernels, backend=backend), first)


@each_backend
@pytest.mark.parametrize("windows", [WINDOWS, LEARNED])
def test_autocast_changes_nothing(backend: str, windows: list[int]) -> None:
    kernels = random_kernels(windows, torch.float32) if windows is LEARNED else None
    x = torch.randn(2, 40, len(windows), requires_grad=True)
    expected = wavelet_mix(x, windows, kernels, backend=backend)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = wavelet_mix(x, windows, kernels, backend=backend)
        grad = torch.autograd.grad(y.sum(), x)[0]
    assert_close(y, expected)
    assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


@each_backend
def test_gradient_checkpointing_changes_nothing(backend: str) -> None:
    x = torch.randn(2, 40, len(WINDOWS), requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        return wavelet_mix(x, WINDOWS, backend=backend).square().sum()

    expected = torch.autograd.grad(run(x), x)[0]
    assert torch.equal(torch.autograd.grad(checkpoint(run, x, use_reentrant=False), x)[0], expected)


@each_backend
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(backend: str, compiler: str) -> None:
    if compiler == "inductor" and backend in ("cpp", "reference"):
        pytest.skip("takes long; nothing there that the others lack")
    if compiler == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()
    windows, learned = [2, 2, 4, 8], [2, 2, 4, 70]
    kernels = [torch.randn(2, 2, requires_grad=True), torch.randn(4), torch.randn(70)]

    def run(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        fixed = wavelet_mix(x, windows, edge="partial", state=state, backend=backend)
        return wavelet_mix(fixed, learned, kernels, backend=backend).square().sum()

    x, state = torch.randn(2, 90, 4, requires_grad=True), torch.randn(2, 5, 4)
    wanted = [x, kernels[0]]
    expected = torch.autograd.grad(run(x, state), wanted)
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend=compiler)(x, state), wanted)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_operators_are_well_formed() -> None:
    """Shapes known without running, no hidden aliases or writes: what compilers rely on."""
    windows = [4, 2, 70]
    x = torch.randn(2, 80, 3)
    taps = torch.randn(sum(windows))
    ops = torch.ops.waveletgpt
    checks = ("test_schema", "test_faketensor")
    for reach in (None, torch.arange(80)[None] % 50):
        torch.library.opcheck(ops.mean.default, (x, [4, 2, 8], True, 0, "torch", reach), test_utils=checks)
        torch.library.opcheck(ops.filter.default, (x, windows, taps, 5, "torch", reach), test_utils=checks)
        torch.library.opcheck(ops.filter_backward.default, (x, x, windows, taps, "torch", reach), test_utils=checks)
    torch.library.opcheck(ops.decayed_sum.default, (x, torch.rand(3), True, "torch"), test_utils=checks)


@pytest.mark.parametrize("backend", FAST)
def test_mean_saves_nothing_for_its_gradient(backend: str) -> None:
    saved: list[torch.Tensor] = []
    x = torch.randn(2, 40, len(WINDOWS), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        wavelet_mix(x, WINDOWS, backend=backend)
    assert not saved


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large inputs are worked on block by block."""
    windows = [2 ** (1 + c // 26) for c in range(130)]
    x = torch.randn(3, 40, 130, dtype=torch.float64)
    whole = wavelet_mix(x, windows, backend="torch")
    monkeypatch.setattr(fast, "BLOCK", 40 * 64)
    assert torch.equal(wavelet_mix(x, windows, backend="torch"), whole)


def test_inference_mode_and_training_share_scratch() -> None:
    x = torch.randn(2, 33, len(WINDOWS))
    fast._cascade.cache_clear()
    with torch.inference_mode():
        first = wavelet_mix(x, WINDOWS, backend="torch")
    y = wavelet_mix(x.requires_grad_(), WINDOWS, backend="torch")
    y.sum().backward()
    assert_close(y.detach(), first)


def test_threads_do_not_share_scratch() -> None:
    inputs = [torch.randn(4, 200, len(WINDOWS)) for _ in range(4)]
    expected = [wavelet_mix(x, WINDOWS, backend="torch") for x in inputs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(wavelet_mix(inputs[i], WINDOWS, backend="torch"), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fast_path_without_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of torch without oneDNN."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    kernels = random_kernels(LEARNED, torch.float32)
    x = torch.randn(2, 70, len(LEARNED))
    assert_close(
        wavelet_mix(x, LEARNED, kernels, backend="torch").double(), mix(x, LEARNED, kernels), rtol=1e-5, atol=1e-5
    )
