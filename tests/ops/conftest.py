from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from tests.ops.operator_oracle import device_of


@pytest.fixture(autouse=True)
def _device_of_the_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test with a parameter `backend` makes its tensors where that backend works."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    device = device_of(parameters.get("backend", "torch"))
    with nullcontext() if device == "cpu" else torch.device(device):
        yield
