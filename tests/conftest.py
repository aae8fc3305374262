"""For all tests: no network, one thread, a fixed seed, little garbage; those marked `gpu` only where there is one."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; processes that tests start have it, too

import gc
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# How long an example takes depends on what else the machine does. The suite tries the same examples each time, so that
# a change is judged by what it changed; `pytest --hypothesis-profile explore` tries new ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture(autouse=True, scope="module")
def _collect_what_is_new() -> None:
    """What was imported stays, and need not be looked at again: half of a tiny run was the collector's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_seed_and_thread() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
