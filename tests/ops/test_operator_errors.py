"""Bad arguments: one line that names the argument, its value, and what would do."""

from typing import Any

import pytest
import torch

from tests.ops.operator_oracle import device_of
from waveletgpt.ops import available_backends, ema_mix, reference, unavailable_backends, wavelet_mix

each_backend = pytest.mark.parametrize("backend", [b for b in available_backends() if device_of(b) == "cpu"])
X = torch.randn(2, 6, 3)
DECAY = torch.rand(3)

MIX: dict[str, tuple[dict[str, Any], str]] = {
    "window 0": ({"windows": [2, 0, 4]}, r"windows\[1\] is 0: give an integer >= 1"),
    "negative window": ({"windows": [2, 4, -4]}, r"windows\[2\] is -4"),
    "window with a fraction": ({"windows": [2.5, 2, 2]}, r"windows\[0\] is 2.5"),
    "window of another type": ({"windows": [2, 2.0, 2]}, r"windows\[1\] is 2.0"),
    "not a power of two": ({"windows": [2, 6, 2]}, r"windows\[1\] is 6: the mean needs a power of two"),
    "too few windows": ({"windows": [2, 4]}, "windows has 2 entries: x has 3 channels"),
    "integers": ({"x": X.long()}, "x is a torch.int64 tensor"),
    "no tensor": ({"x": [[1.0]]}, "x is a list"),
    "two dimensions": ({"x": X[0]}, r"x has shape \(6, 3\)"),
    "no tokens": ({"x": X[:, :0]}, r"x has shape \(2, 0, 3\)"),
    "unknown edge": ({"edge": "wrap"}, "edge is 'wrap': use one of"),
    "unknown backend": ({"backend": "cuda"}, "backend is 'cuda': available here are .*'reference'"),
    "state of another batch": ({"state": X[:1]}, r"state has shape \(1, 6, 3\): give \(2, any, 3\)"),
    "state of other channels": ({"state": X[..., :2]}, r"state has shape \(2, 6, 2\)"),
    "state without time": ({"state": X[:, 0]}, r"state has shape \(2, 3\)"),
    "state of integers": ({"state": X.long()}, "state is a torch.int64 tensor"),
    "number of kernels": (
        {"kernels": [torch.ones(2)]},
        "kernels has 1 tensors: give one .* 3 channels, .* 2 distinct",
    ),
    "length of a kernel": (
        {"kernels": [torch.ones(2), torch.ones(3), torch.ones(4)]},
        r"kernels\[1\] has 3 taps: windows\[1\] needs 2",
    ),
    "shape of a kernel": (
        {"kernels": [torch.ones(3, 2), torch.ones(4)]},
        r"kernels\[0\] has shape \(3, 2\): window 2 needs one of \(\(2,\), \(2, 2\)\)",
    ),
    "kernel of integers": ({"kernels": [torch.ones(2).long(), torch.ones(4)]}, r"kernels\[0\] is a torch.int64 tensor"),
    "kernel of no type": ({"kernels": [[0.5, 0.5], torch.ones(4)]}, r"kernels\[0\] is a list"),
}

EMA: dict[str, tuple[dict[str, Any], str]] = {
    "decay 1": ({"decay": torch.tensor([0.5, 1.0, 0.5])}, "decay has 1.0: give values with 0 <= decay < 1"),
    "negative decay": ({"decay": torch.tensor([0.5, 0.5, -0.25])}, "decay has -0.25"),
    "shape of decay": ({"decay": torch.rand(2)}, r"decay has shape \(2,\): give \(3,\)"),
    "type of decay": ({"decay": 0.5}, "decay is a float"),
    "shape of state": ({"state": X}, r"state has shape \(2, 6, 3\): give \(2, 3\)"),
    "integers": ({"x": X.long()}, "x is a torch.int64 tensor"),
    "unknown backend": ({"backend": "nope"}, "backend is 'nope'"),
}


@each_backend
@pytest.mark.parametrize(("arguments", "message"), MIX.values(), ids=MIX)
def test_wavelet_mix(backend: str, arguments: dict[str, Any], message: str) -> None:
    arguments = {"x": X, "windows": [2, 2, 4], "backend": backend, **arguments}
    with pytest.raises(ValueError, match=message) as error:
        wavelet_mix(**arguments)
    assert "\n" not in str(error.value)


@each_backend
@pytest.mark.parametrize(("arguments", "message"), EMA.values(), ids=EMA)
def test_ema_mix(backend: str, arguments: dict[str, Any], message: str) -> None:
    arguments = {"x": X, "decay": DECAY, "backend": backend, **arguments}
    with pytest.raises(ValueError, match=message) as error:
        ema_mix(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("backend", "reason"), unavailable_backends().items())
def test_what_is_missing_is_said(backend: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"backend is '{backend}': ") as error:
        wavelet_mix(X, [2, 2, 4], backend=backend)
    assert reason in str(error.value)


def test_the_definition_alone_has_one_backend() -> None:
    """As it is inside a saved checkpoint."""
    assert reference.wavelet_mix(X, [2, 2, 4], backend="reference").shape == X.shape
    assert reference.ema_mix(X, DECAY, backend="auto").shape == X.shape
    with pytest.raises(ValueError, match="backend is 'torch': available here are"):
        reference.wavelet_mix(X, [2, 2, 4], backend="torch")
