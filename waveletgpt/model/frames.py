"""Raw waveforms as input: frames of samples in place of tokens.

Shapes: B batch, N samples, T frames, E embedding.
"""

from __future__ import annotations

import torch
from torch import nn

from .configuration import WaveletGPTConfig


class FrameLinear(nn.Linear):
    """A linear map of samples; it keeps their variance, or quiet recordings would start as nothing but positions."""


class FrameEmbedding(nn.Module):
    """Frames of a waveform to embeddings, in place of a table of tokens (Audio Transformers, arXiv 2105.00335)."""

    def __init__(self, config: WaveletGPTConfig):
        super().__init__()
        assert config.frame_size is not None
        self.up_proj = FrameLinear(config.frame_size, config.frame_hidden)
        self.down_proj = FrameLinear(config.frame_hidden, config.n_embd)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(nn.functional.gelu(self.up_proj(frames), approximate="tanh"))
        return result


def split_frames(
    samples: torch.Tensor, mask: torch.Tensor | None, size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cut waveforms into frames that do not overlap; zeros fill up the last one.

    samples (B, N), mask (B, N) or None -> frames (B, T, size), mask (B, T) or None, with T = ceil(N / size). The first
    frame starts with the first real sample, however much padding comes before it.
    """
    if mask is not None:
        N = samples.shape[1]
        order = (mask.long().argmax(1, keepdim=True) + torch.arange(N, device=mask.device)) % N
        samples, mask = (samples * mask.to(samples.dtype)).gather(1, order), mask.gather(1, order)
    fill = (0, -samples.shape[1] % size)
    frames = nn.functional.pad(samples, fill).unflatten(1, (-1, size))
    if mask is not None:
        mask = nn.functional.pad(mask, fill).unflatten(1, (-1, size)).amax(-1)
    return frames, mask
