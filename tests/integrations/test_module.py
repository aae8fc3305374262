"""`WaveletMixing`: what a training loop of one's own gets."""

from typing import Any

import numpy as np
import pytest
import torch

from waveletgpt import WaveletMixing
from waveletgpt.ops import reach_of, reference

KINDS = (None, "learnable", "delta", "gate")
each_kind = pytest.mark.parametrize("kernels", KINDS)


def mixer(kernels: str | None, seed: int = 0) -> WaveletMixing:
    """With parameters away from their start."""
    torch.manual_seed(seed)
    made = WaveletMixing(12, windows=[2, 8], kernels=kernels).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made


def test_means_are_the_operator() -> None:
    x = torch.randn(2, 9, 12)
    y = WaveletMixing(12, windows=[8, 2])(x)
    expected = reference.wavelet_mix(x[..., :6], [2, 2, 2, 8, 8, 8])
    torch.testing.assert_close(y, torch.cat([expected, x[..., 6:]], -1))


def test_starts() -> None:
    x = torch.randn(2, 9, 12)
    fixed = WaveletMixing(12, [2, 8])(x)
    torch.testing.assert_close(WaveletMixing(12, [2, 8], kernels="learnable")(x), fixed)
    for kernels in ("delta", "gate"):
        assert torch.equal(WaveletMixing(12, [2, 8], kernels=kernels)(x), x)
    haar = WaveletMixing(12, [1, 2, 4], kernels="learnable", start="haar")
    assert [taps.tolist() for taps in haar.taps() or []] == [
        [[1.0], [1.0]],
        [[0.5, 0.5], [0.5, -0.5]],
        [[0.25] * 4, [0.25, 0.25, -0.25, -0.25]],
    ]


@each_kind
def test_resetting_is_starting_anew(kernels: str | None) -> None:
    made = mixer(kernels)
    made.window.zero_()
    made.reset_parameters()
    fresh = WaveletMixing(12, windows=[2, 8], kernels=kernels).double()
    assert made.state_dict().keys() == fresh.state_dict().keys() != set()
    for name, value in fresh.state_dict().items():
        assert torch.equal(made.state_dict()[name], value)


@each_kind
def test_parts_with_state_are_the_whole(kernels: str | None) -> None:
    """Documents that end anywhere, padding in front of one row."""
    made = mixer(kernels)
    x = torch.randn(2, 17, 12, dtype=torch.float64)
    documents = torch.tensor([[0] * 4 + [1] * 13, [1] * 6 + [2] * 9 + [3] * 2])
    whole_reach = reach_of(17, mask=documents)
    for reach in (None, whole_reach):
        whole, state, parts = made(x, reach=reach), made.state(), []
        for first in range(0, 17, 5):
            part = slice(first, first + 5)
            here = None if reach is None else reach[:, part]
            parts.append(made(x[:, part], state=state, reach=here))
        assert state.last().shape == (2, 7, 6)
        real = documents > 0 if reach is not None else torch.ones_like(documents, dtype=torch.bool)
        torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real])


@pytest.mark.parametrize("kernels", [None, "learnable", "gate"])
@pytest.mark.parametrize("size", [1, 3, 5, 17])
def test_partial_edges(kernels: str | None, size: int) -> None:
    """Each token's sum over its document is divided by min(w, reach + 1), whole or in chunks with a state."""
    torch.manual_seed(0)
    made = WaveletMixing(12, windows=[2, 8], kernels=kernels, edge="partial").double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(3, 17, 12, dtype=torch.float64)
    # One document; padding in front and two; three, which are not in step with the chunks.
    documents = torch.tensor([[1] * 17, [0] * 4 + [1] * 3 + [2] * 10, [1] * 6 + [2] * 9 + [3] * 2])
    values, numbers, expected = x.numpy(), documents.numpy(), x.numpy().copy()
    taps = made.taps()
    for b, t, c in np.ndindex(3, 17, made.n_mixed):
        window, group = made.windows[c], c // 3
        h = np.full(window, 1 / window) if taps is None else taps[group][c % 3].detach().numpy()
        there = [j for j in range(window) if t >= j and (numbers[b, t - j : t + 1] == numbers[b, t]).all()]
        mean = sum(h[j] * values[b, t - j, c] for j in there) * window / len(there)
        g = made.gate[c].item() if kernels == "gate" else 1.0
        expected[b, t, c] += g * (mean - values[b, t, c])
    # Of a document that may have begun before, it says no more than that: the state tells how much there was.
    reach, state, parts = reach_of(17, mask=documents), made.state(), []
    assert reach is not None
    for first in range(0, 17, size):
        part = slice(first, first + size)
        parts.append(made(x[:, part], state, reach[:, part]))
    assert state.last().shape == (3, 7, 7)
    real = documents > 0
    torch.testing.assert_close(torch.cat(parts, 1)[real], torch.from_numpy(expected)[real])
    # Without documents, also from the inputs themselves.
    alone, half = made(x[:1]), made(x[:1, 9:], x[:1, :9])
    torch.testing.assert_close(alone, torch.from_numpy(expected[:1]))
    torch.testing.assert_close(half, alone[:, 9:])


@pytest.mark.parametrize("kernels", KINDS[1:])
def test_all_parameters_get_gradients_and_are_vectors(kernels: str) -> None:
    made = mixer(kernels)
    made(torch.randn(2, 9, 12, dtype=torch.float64)).square().sum().backward()
    assert list(made.parameters())
    for parameter in made.parameters():
        assert parameter.ndim == 1
        assert bool((parameter.grad != 0).all())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"windows": [2, 6]}, r"windows=\[2, 6\]: give powers of two"),
    "none": ({"windows": []}, r"windows=\[\]: give powers of two"),
    "kernels": ({"kernels": "fixed"}, "kernels='fixed' is unknown; use one of"),
    "edge": ({"edge": "reflect"}, "edge='reflect' is unknown; use one of"),
    "start": ({"start": "zero"}, "start='zero' is unknown; use one of"),
    "start of means": ({"start": "haar"}, "start='haar' is for kernels=\"learnable\""),
    "details": ({"start": "haar", "kernels": "learnable", "edge": "partial"}, 'start="haar" has details too'),
    "no average": ({"edge": "partial", "kernels": "delta"}, 'edge="partial" is for averages'),
    "fraction": ({"mix_fraction": 1.5}, "mix_fraction=1.5 must be more than 0"),
    "too many": ({"windows": [1, 2, 4, 8, 16, 32, 64]}, "7 windows for 6 mixed channels"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaveletMixing(12, **settings)


def test_hidden_states_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 9, 8\): give \(batch, tokens, 12\)"):
        WaveletMixing(12)(torch.randn(2, 9, 8))
