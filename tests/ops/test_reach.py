"""Documents that lie one after the other, each filtered as if it were alone."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests.ops.operator_oracle import BACKENDS, EDGES, FAST, Case, cases, ema, examples, mix, random_kernels, rounding
from waveletgpt.ops import ema_mix, reach_of, wavelet_mix

each_backend = pytest.mark.parametrize("backend", BACKENDS)
LENGTHS = (5, 1, 9, 3)
WINDOWS = [4, 2, 1, 8, 4]


def reach_of_lengths(rows: list[list[int]]) -> Tensor:
    return torch.tensor([[t for n in row for t in range(n)] for row in rows])


def each_alone(x: Tensor, rows: list[list[int]], windows: list[int], kernels: list[Tensor] | None, edge: str) -> Tensor:
    """The oracle, one document after the other."""
    y = torch.empty_like(x)
    for b, row in enumerate(rows):
        for end, n in zip(np.cumsum(row), row, strict=True):
            part = slice(end - n, end)
            y[b : b + 1, part] = mix(x[b : b + 1, part], windows, kernels, edge)
    return y


@each_backend
@examples
@given(case=cases(), data=st.data())
def test_each_document_by_itself(backend: str, case: Case, data: st.DataObject) -> None:
    batch, tokens, _ = case.x.shape
    rows = []
    for _ in range(batch):
        cuts = sorted(data.draw(st.sets(st.integers(1, tokens - 1), max_size=4))) if tokens > 1 else []
        rows.append(np.diff([0, *cuts, tokens]).tolist())
    y = wavelet_mix(
        case.x,
        case.windows,
        case.kernels,
        edge=case.edge,
        reach=reach_of_lengths(rows).to(case.x.device),
        backend=backend,
    )
    expected = each_alone(case.x, rows, case.windows, case.kernels, case.edge)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@each_backend
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("learned", [False, True])
def test_one_document_is_no_reach(backend: str, edge: str, learned: bool) -> None:
    """Also where it began before what is here, which is said by a reach beyond all there is."""
    x, state = torch.randn(2, 11, 5), torch.randn(2, 3, 5)
    kernels = random_kernels(WINDOWS, torch.float32) if learned else None
    for before, reach in (
        (None, torch.arange(11)),
        (state, torch.arange(11) + 3),
        (state, torch.arange(11) + (1 << 30)),
    ):
        y = wavelet_mix(x, WINDOWS, kernels, edge=edge, state=before, reach=reach[None], backend=backend)
        torch.testing.assert_close(y, wavelet_mix(x, WINDOWS, kernels, edge=edge, state=before, backend=backend))


@each_backend
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("learned", [False, True])
def test_chunks_with_state_are_one_call(backend: str, size: int, learned: bool) -> None:
    x = torch.randn(2, 18, 5, dtype=torch.float64)
    kernels = random_kernels(WINDOWS) if learned else None
    reach = reach_of_lengths([list(LENGTHS), [7, 11]])
    parts = []
    for first in range(0, 18, size):
        part = slice(first, first + size)
        before = x[:, max(0, first - 7) : first]
        parts.append(wavelet_mix(x[:, part], WINDOWS, kernels, state=before, reach=reach[:, part], backend=backend))
    torch.testing.assert_close(torch.cat(parts, 1), wavelet_mix(x, WINDOWS, kernels, reach=reach, backend=backend))


@each_backend
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("learned", [False, True])
def test_gradients(backend: str, edge: str, learned: bool) -> None:
    x = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    reach = torch.tensor([[2, 3, 4, 0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    kernels = [kernel.requires_grad_() for kernel in random_kernels(WINDOWS)] if learned else []

    def run(x: Tensor, state: Tensor, *kernels: Tensor) -> Tensor:
        return wavelet_mix(x, WINDOWS, kernels or None, edge=edge, state=state, reach=reach, backend=backend)

    assert torch.autograd.gradcheck(run, (x, state, *kernels))
    if not learned:
        assert torch.autograd.gradgradcheck(run, (x, state))


# Around the 8 tokens of a step and the vectors of channels of compiled kernels; kernels long enough for an FFT, for
# which documents are set apart, or (many short ones) are not; one longer than compiled kernels take.
ROWS = {
    "long": [[100, 1, 150, 29], [7, 8, 9, 250, 6]],
    "short": [[3] * 93 + [1], [1] * 40 + [8] * 30],
    "padded": [[-200, 80], [-1, 270, -9]],
}
MEANS = [2, 64, 1, 4, 512, 16, 8, 2] * 5
TAPS = {"means": None, "short taps": [2, 40, 1, 3, 64, 17, 8, 5] * 3, "taps": [2, 40, 1, 3, 70, 17, 300, 8] * 3}


def reach_of_rows(rows: list[list[int]]) -> Tensor:
    """A negative number is so much padding."""
    return torch.tensor([[t if n > 0 else -1 for n in row for t in range(abs(n))] for row in rows])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taps", TAPS.values(), ids=TAPS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_results_and_gradients_are_the_exact_ones(
    backend: str, dtype: torch.dtype, taps: list[int] | None, rows: list[list[int]]
) -> None:
    windows, reach = taps or MEANS, reach_of_rows(rows)
    kernels = random_kernels(windows, torch.promote_types(dtype, torch.float32)) if taps else []
    inputs = [torch.randn(2, 280, len(windows)).to(dtype), torch.randn(2, 90, len(windows)).to(dtype), *kernels]
    ours = [value.clone().requires_grad_() for value in inputs]
    exact = [value.double().requires_grad_() for value in inputs]
    grad = torch.randn(2, 280, len(windows)).to(dtype)
    results = []
    for values, name in ((ours, backend), (exact, "reference")):
        x, state, *weights = values
        y = wavelet_mix(x, windows, weights or None, state=state, reach=reach, backend=name)
        results.append((y, *torch.autograd.grad(y, values, grad.to(y.dtype))))
    for got, expected in zip(*results, strict=True):
        relative, absolute = rounding(backend, got.dtype, taps is not None)
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got.double(), expected, rtol=relative, atol=max(absolute, 2e-6) * scale)


@each_backend
def test_kernels_longer_than_compiled_ones_take(backend: str) -> None:
    x = torch.randn(1, 1300, 3, dtype=torch.float64, requires_grad=True)
    reach, windows = reach_of_rows([[100, 1200]]), [2000, 1100, 5]
    kernels = [kernel.requires_grad_() for kernel in random_kernels(windows)]
    results = []
    for name in (backend, "reference"):
        y = wavelet_mix(x, windows, kernels, reach=reach, backend=name)
        results.append((y, *torch.autograd.grad(y, [x, *kernels], torch.ones_like(y))))
    torch.testing.assert_close(*results)


@each_backend
def test_any_form_of_reach(backend: str) -> None:
    """Of 32 bits, one row for all, not dense; limited to the longest window, or beyond all there is."""
    x, rows = torch.randn(2, 18, 5, requires_grad=True), reach_of_lengths([list(LENGTHS)] * 2)
    for kernels in (None, random_kernels(WINDOWS, torch.float32)):
        results = []
        for reach in (rows, rows[:1], rows.int(), rows.t().contiguous().t(), rows.clamp(max=7)):
            y = wavelet_mix(x, WINDOWS, kernels, reach=reach, backend=backend)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("backend", FAST)
def test_means_save_reach_only(backend: str) -> None:
    saved: list[Tensor] = []
    reach = reach_of_lengths([list(LENGTHS)])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        wavelet_mix(torch.randn(1, 18, 5, requires_grad=True), WINDOWS, reach=reach, backend=backend)
    assert [value.data_ptr() for value in saved] == [reach.data_ptr()]


@each_backend
@pytest.mark.parametrize("began_before", [False, True])
def test_what_other_documents_hold_stays_there(backend: str, began_before: bool) -> None:
    """What is not finite stays in its document, and in its channel and window there."""
    x, reach = torch.randn(1, 40, 2), reach_of_lengths([[17, 23]])
    clean = x.clone()
    x[:, :15, 1] = float("nan")
    if began_before:
        reach[:, :17] = 1 << 30
    for kernels in (None, random_kernels([4, 8], torch.float32), random_kernels([4, 32], torch.float32)):
        windows = [4, 8] if kernels is None else [len(kernel) for kernel in kernels]
        y, expected = (wavelet_mix(part, windows, kernels, reach=reach, backend=backend) for part in (x, clean))
        torch.testing.assert_close(y[:, 17:], expected[:, 17:])
        assert y[:, :17, 1].isnan().all()
        if backend in ("cpp", "reference"):
            torch.testing.assert_close(y[..., 0], expected[..., 0])
        x.requires_grad_()
        (grad,) = torch.autograd.grad(wavelet_mix(x, windows, kernels, reach=reach, backend=backend)[:, 17:].sum(), x)
        assert grad.isfinite().all()
        x = x.detach()


@each_backend
def test_half_precision_sums_in_float32(backend: str) -> None:
    x = torch.randn(1, 18, 5).bfloat16()
    y = wavelet_mix(x, WINDOWS, reach=reach_of_lengths([list(LENGTHS)]), backend=backend)
    expected = each_alone(x.double(), [list(LENGTHS)], WINDOWS, None, "zero")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0.51 * torch.finfo(torch.bfloat16).eps + 1e-5, atol=1e-5)


@each_backend
def test_compiled_whole(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the definition is not meant for compilers")
    reach, kernels = reach_of_lengths([list(LENGTHS)]), random_kernels(WINDOWS)
    for taps in (None, kernels):
        x = torch.randn(1, 18, 5, dtype=torch.float64, requires_grad=True)

        def run(x: Tensor, taps: Any = taps) -> Tensor:
            return wavelet_mix(x, WINDOWS, taps, reach=reach, backend=backend)

        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), run(x))
        (expected,) = torch.autograd.grad(run(x).square().sum(), x)
        (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(got, expected)


@each_backend
def test_ema(backend: str) -> None:
    x, decay = torch.randn(1, 18, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    y = ema_mix(x, decay, reach=reach_of_lengths([list(LENGTHS)]), backend=backend)
    expected = [ema(part, decay) for part in x.split(LENGTHS, dim=1)]
    torch.testing.assert_close(y, torch.cat(expected, 1))


def test_every_way_to_say_where_documents_begin() -> None:
    expected = reach_of_lengths([list(LENGTHS)])
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]
    ways = (
        reach_of(18, positions=expected),
        reach_of(18, cu_seqlens=torch.tensor([0, 5, 6, 15, 18])),
        reach_of(18, seq_idx=numbers),
        reach_of(18, mask=numbers + 1),
    )
    for i, way in enumerate(ways):
        assert way is not None
        # Numbers don't say whether the first document began before.
        first = 5 if i >= 2 else 0
        assert torch.equal(way[:, first:], expected[:, first:])
        assert i < 2 or (way[:, :5] >= 1 << 29).all()
    assert reach_of(18) is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 6))
def test_a_mask_that_numbers_documents_may_come_in_chunks(lengths: list[int], size: int) -> None:
    """Also where a document begins with a chunk. A reach beyond the chunk's first token is unlimited."""
    numbers = torch.tensor([[n + 1 for n, length in enumerate(lengths) for _ in range(length)]])
    whole = reach_of(numbers.shape[1], mask=numbers)
    assert whole is not None
    for first in range(0, numbers.shape[1], size):
        last = min(first + size, numbers.shape[1])
        part = reach_of(last - first, mask=numbers[:, :last])
        assert part is not None
        wanted = whole[:, first:last]
        inside = wanted <= torch.arange(last - first)
        torch.testing.assert_close(part[inside], wanted[inside])
        assert (part[~inside] > 1 << 29).all()


def test_padding_looks_at_nothing() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    reach = reach_of(5, mask=mask)
    assert reach is not None
    assert reach[0].tolist() == [-1, -1, 0, 1, 2]
    assert reach[1, 3:].tolist() == [-1, -1]
    assert (reach[1, :3] > 1 << 29).all()  # it may have begun before
    assert torch.equal(reach_of(3, mask=mask), reach_of(3, mask=mask[:, 2:]))


X = torch.randn(2, 6, 3)
WRONG: dict[str, tuple[Any, str]] = {
    "no tensor": ([0, 1], "reach is a list: give a tensor of int32 or int64"),
    "floats": (torch.zeros(2, 6), "reach is a torch.float32 tensor"),
    "another length": (torch.zeros(2, 5).long(), r"reach has shape \(2, 5\): give \(2, 6\)"),
}


@each_backend
@pytest.mark.parametrize(("reach", "message"), WRONG.values(), ids=WRONG)
def test_wrong_reach(backend: str, reach: Any, message: str) -> None:
    for run in (lambda: wavelet_mix(X, [2, 2, 4], reach=reach, backend=backend),
                lambda: ema_mix(X, torch.rand(3), reach=reach, backend=backend)):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run()


@each_backend
def test_kernels_on_another_device(backend: str) -> None:
    """Offloaded parameters lie on `meta`: an error, and no numbers."""
    kernels = [torch.ones(2, device="meta"), torch.ones(4, device="meta")]
    with pytest.raises(ValueError, match=r"kernels\[0\] is on meta: give it on"):
        wavelet_mix(torch.randn(1, 4, 3), [2, 2, 4], kernels, backend=backend)


def test_wrong_boundaries() -> None:
    with pytest.raises(ValueError, match=r"positions has shape \(1, 4\): give \(batch, 6\)"):
        reach_of(6, positions=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 1, 6, 6\)"):
        reach_of(6, mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match=r"cu_seqlens has shape \(1, 2\)"):
        reach_of(6, cu_seqlens=torch.zeros(1, 2).long())
