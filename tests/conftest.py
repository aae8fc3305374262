"""For all tests: no network, one thread, a fixed seed; those marked `gpu` only where there is one."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

from collections.abc import Callable, Iterator

import pytest
import torch

from waveletgpt import WaveletGPTConfig, WaveletGPTForCausalLM

VOCAB = 29
"""Tokens of the tiny models."""

TINY = {
    "vocab_size": VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 32, "max_window": 16,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture(autouse=True)
def _one_seed_and_thread() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_config(**settings: object) -> WaveletGPTConfig:
    """2 blocks of width 16, 29 tokens, context 32; grouped queries where the architecture has them."""
    grouped = {"n_kv_head": 2} if settings.get("architecture") == "llama" else {}
    return WaveletGPTConfig(**{**TINY, **grouped, **settings})


@pytest.fixture(scope="session")
def make_model() -> Callable[..., WaveletGPTForCausalLM]:
    """make_model(seed=0, **settings): a tiny model in evaluation mode, all of its weights random."""

    def make(seed: int = 0, **settings: object) -> WaveletGPTForCausalLM:
        torch.manual_seed(seed)
        model = WaveletGPTForCausalLM(tiny_config(**settings)).eval()
        with torch.no_grad():  # at their start norms and biases would hide mistakes, and all logits be nearly equal
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """(2, 12) tokens; a test that pads does so with the last token, which is not among them."""
    return torch.randint(0, VOCAB - 1, (2, 12), generator=torch.Generator().manual_seed(1))
