"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter (TRITON_INTERPRET=1), else skipped.

The properties of all backends are tested in float64, which this backend leaves to torch; so they are here again.
"""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.ops.operator_oracle import FAST, random_kernels, rounding
from waveletgpt.ops import triton, wavelet_mix

on_triton = pytest.mark.parametrize("backend", FAST[:1])
HALF = (torch.float16, torch.bfloat16)
# Blocks of short windows only, of one long one, of two, and of more, not in order; some longer than the sequences.
MEANS = {
    "short": [2] * 20 + [4] * 20 + [1, 8] * 5,
    "long": [16] * 40 + [64] * 20 + [128] * 30,
    "any": [4, 512, 1, 64, 2, 128, 2048] * 5,
    "both": [2] * 64 + [32] * 20 + [256] * 10,
}
LEARNED = {"short": [4] * 17, "mixed": [1, 3, 16, 17, 33, 100, 2] * 3, "long": [300, 7]}


def check(
    x: torch.Tensor, windows: list[int], kernels: list[torch.Tensor] | None, backend: str, **more: object
) -> None:
    """Result and gradients are the exact ones, rounded once; sums of hundreds in float32 differ a little more."""
    inputs = [x, *(kernels or [])]
    ours = [tensor.detach().requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y = wavelet_mix(ours[0], windows, ours[1:] or None, backend=backend, **more)
    if "state" in more:
        more["state"] = more["state"].double()
    expected = wavelet_mix(exact[0], windows, exact[1:] or None, backend="reference", **more)
    grad = torch.randn_like(y)
    results = [y, *torch.autograd.grad(y, ours, grad)]
    references = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for i, (result, reference) in enumerate(zip(results, references, strict=True)):
        assert result.dtype == inputs[max(0, i - 1)].dtype
        scale = max(1.0, reference.abs().max().item())
        relative, absolute = rounding(backend, result.dtype, bool(kernels))
        assert_close(result.double(), reference, rtol=relative, atol=absolute * scale)


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize("windows", MEANS.values(), ids=MEANS)
def test_means(backend: str, dtype: torch.dtype, tokens: int, windows: list[int]) -> None:
    """On the first channels of an embedding, as in the model."""
    hidden = torch.randn(2, tokens, len(windows) + 24).to(dtype)
    check(hidden[..., : len(windows)], windows, None, backend)


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize("windows", LEARNED.values(), ids=LEARNED)
def test_learned_kernels(backend: str, dtype: torch.dtype, tokens: int, windows: list[int]) -> None:
    hidden = torch.randn(2, tokens, len(windows) + 24).to(dtype)
    check(hidden[..., : len(windows)], windows, random_kernels(windows, torch.float32), backend)


@on_triton
@pytest.mark.parametrize("edge", ["zero", "partial"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("new", [1, 70])
def test_goes_on_from_a_state(backend: str, edge: str, learned: bool, new: int) -> None:
    windows = LEARNED["mixed"] if learned else MEANS["any"]
    kernels = random_kernels(windows, torch.float32) if learned else None
    x = torch.randn(2, new, len(windows))
    check(x, windows, kernels, backend, edge=edge, state=torch.randn(2, 150, len(windows)))


@on_triton
@pytest.mark.parametrize("learned", [False, True])
def test_layouts_of_the_input(backend: str, learned: bool) -> None:
    windows = LEARNED["mixed"] if learned else MEANS["any"]
    n = len(windows)
    kernels = random_kernels(windows, torch.float32) if learned else None
    wide = torch.randn(3, 80, 2 * n)
    layouts = {
        "not aligned": wide[..., 1 : n + 1],
        "every other": wide[..., ::2],
        "time last": wide[..., :n].transpose(1, 2).contiguous().transpose(1, 2),
        "one for all": wide[:1, :1, :1].expand(3, 80, n),
    }
    for name, x in layouts.items():
        y = wavelet_mix(x, windows, kernels, backend=backend)
        assert torch.equal(y, wavelet_mix(x.contiguous(), windows, kernels, backend=backend)), name
        assert y.is_contiguous()


@on_triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_nan_stays_in_its_window_and_channel(backend: str, bad: float, dtype: torch.dtype) -> None:
    windows = [2, 16, 64, 128, 512]
    x = torch.randn(1, 250, len(windows)).to(dtype)
    clean = wavelet_mix(x, windows, backend=backend)
    for c, w in enumerate(windows):
        dirty = x.clone()
        dirty[0, 100, c] = bad
        y = wavelet_mix(dirty, windows, backend=backend)
        touched = torch.zeros_like(y, dtype=torch.bool)
        touched[0, 100 : 100 + w, c] = True
        assert not y[touched].isfinite().any()
        assert_close(y[~touched], clean[~touched])


@on_triton
def test_nan_reaches_a_little_further_with_kernels(backend: str) -> None:
    windows = [4, 70]
    kernels = random_kernels(windows, torch.float32)
    x = torch.randn(2, 1000, 2)
    clean = wavelet_mix(x, windows, kernels, backend=backend)
    x[0, 400, 1] = float("nan")
    y = wavelet_mix(x, windows, kernels, backend=backend)
    assert y[0, 400:470, 1].isnan().all()
    y[0, 400 - 48 : 470 + 48, 1] = clean[0, 400 - 48 : 470 + 48, 1]
    assert_close(y, clean)


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_every_element_is_written(backend: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    real = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(real[0](*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(real[1](*a, **k)))
    for windows, learned in ((MEANS["any"], False), (MEANS["both"], False), (LEARNED["mixed"], True)):
        kernels = [k.requires_grad_() for k in random_kernels(windows, torch.float32)] if learned else []
        x = torch.randn(2, 70, len(windows)).to(dtype).requires_grad_()
        state = torch.randn(2, 100, len(windows)).to(dtype)
        y = wavelet_mix(x, windows, kernels or None, state=state, backend=backend)
        for tensor in (y, *torch.autograd.grad(y.sum(), [x, *kernels])):
            assert tensor.isfinite().all()


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


@on_triton
@pytest.mark.parametrize("learned", [False, True])
def test_gives_the_same_bits(backend: str, learned: bool) -> None:
    windows = LEARNED["mixed"] if learned else MEANS["both"]
    x = torch.randn(4, 200, len(windows), requires_grad=True)
    kernels = [k.requires_grad_() for k in random_kernels(windows, torch.float32)] if learned else []
    runs = []
    for _ in range(3):
        y = wavelet_mix(x, windows, kernels or None, backend=backend)
        runs.append((y, *torch.autograd.grad(y.square().sum(), [x, *kernels])))
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


@on_triton
@pytest.mark.parametrize("learned", [False, True])
def test_compiled_autocast_and_checkpointed(backend: str, learned: bool) -> None:
    torch._dynamo.reset()
    windows = LEARNED["mixed"] if learned else MEANS["any"]
    kernels = [k.requires_grad_() for k in random_kernels(windows, torch.float32)] if learned else []
    x = torch.randn(2, 70, len(windows)).bfloat16().requires_grad_()

    def run(x: torch.Tensor, *kernels: torch.Tensor) -> torch.Tensor:
        return wavelet_mix(x, windows, kernels or None, backend=backend).float().square().sum()

    expected = torch.autograd.grad(run(x, *kernels), [x, *kernels])
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        losses = {
            "compiled": torch.compile(run, fullgraph=True, backend="aot_eager")(x, *kernels),
            "autocast": run(x, *kernels),
            "checkpointed": checkpoint(run, x, *kernels, use_reentrant=False),
        }
    for name, loss in losses.items():
        assert all(map(torch.equal, torch.autograd.grad(loss, [x, *kernels]), expected)), name


@pytest.mark.gpu
@pytest.mark.parametrize("learned", [False, True])
def test_replays_in_a_cuda_graph(learned: bool) -> None:
    windows = LEARNED["mixed"] if learned else MEANS["both"]
    kernels = [k.cuda().requires_grad_() for k in random_kernels(windows, torch.float32)] if learned else []
    x = torch.randn(4, 200, len(windows), device="cuda", requires_grad=True)

    def run() -> tuple[torch.Tensor, ...]:
        y = wavelet_mix(x, windows, kernels or None, backend="triton")
        return (y, *torch.autograd.grad(y.square().sum(), [x, *kernels]))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()  # compiles, and puts its tables on the device
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(map(torch.equal, results, run()))


def test_auto_takes_it_on_gpus_only() -> None:
    if triton.unavailable("cuda") is None:
        assert triton.unavailable() is None or not torch.cuda.is_available()
    else:
        assert "Triton is not installed" in str(triton.unavailable())
