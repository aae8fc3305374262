"""Models that take milliseconds."""

from __future__ import annotations

import torch

from waveletgpt import WaveletGPTConfig, WaveletGPTForCausalLM

VOCAB = 29
PAD = VOCAB - 1
"""Tests that pad do so with the last token and don't use it elsewhere."""


def tiny_config(**settings: object) -> WaveletGPTConfig:
    """2 blocks of width 16, 29 tokens, context 32; grouped queries where the architecture has them."""
    base = {"vocab_size": VOCAB, "n_positions": 32, "max_window": 16}
    base |= {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 32}
    grouped = {"n_kv_head": 2} if settings.get("architecture") == "llama" else {}
    return WaveletGPTConfig(**{**base, **grouped, **settings})


def tiny_model(seed: int = 0, **settings: object) -> WaveletGPTForCausalLM:
    """In evaluation mode and with all weights random: as they start, norms and biases would hide mistakes."""
    torch.manual_seed(seed)
    model = WaveletGPTForCausalLM(tiny_config(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """(batch, length) tokens, none of them `PAD`."""
    return torch.randint(0, PAD, (batch, length), generator=torch.Generator().manual_seed(seed))
