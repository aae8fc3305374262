"""What cached decoding remembers for the mixers, and where: states that follow the cache of keys and values.

A layer of the cache holds, beside keys and values, the inputs that its mixers still need. As long as nothing is to be
taken back they lie in slots (see `Layout`); when the cache records its past, all of them lie in order.

Shapes: B batch, C mixed coordinates, S inputs that came before, R slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer


def check_state(state: torch.Tensor, inputs: torch.Tensor | None, *shape: int | None) -> None:
    """Refuse a state whose first dimensions are not `shape` (None: any size), or of another type than `inputs`.

    Raises:
        ValueError: the cache was filled by another model or for another batch.
    """
    if inputs is not None and state.dtype != inputs.dtype and not torch.is_autocast_enabled(inputs.device.type):
        raise ValueError(
            f"this cache holds mixing states in {state.dtype}, the model computes in {inputs.dtype}: it was filled by "
            "another model; start with a new one"
        )
    pairs = zip(state.shape, shape, strict=False)
    if state.ndim < len(shape) or any(want is not None and have != want for have, want in pairs):
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"this cache holds mixing states of shape {tuple(state.shape)}, this batch and model need {wanted}: it was "
            "filled for another batch or by another model; start with a new one"
        )


class MixingCacheLayer(LinearAttentionAndFullAttentionLayer):
    """A layer of a dynamic cache whose mixing states follow what is done to keys and values.

    The library's own layer forgets them when rows are repeated or selected, and cuts off what it did not record.
    """

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each_state(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._each_state(
            lambda state: state[indices.to(state.device) if isinstance(indices, torch.Tensor) else indices]
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; a negative number, as in transformers.

        Raises:
            ValueError: the inputs before them were not recorded, so that mixing could not go on from there.
        """
        removed, tokens = abs(tokens_to_remove), self.get_seq_length()
        if tokens_to_remove > 0 or removed > tokens:
            raise ValueError(
                f"crop({tokens_to_remove}): give a negative number of at most {tokens} tokens to take back"
            )
        if not self.record_past:
            if removed == 0:
                return
            raise ValueError(
                "mixing states cannot take tokens back that were not recorded: call activate_past_recording() on the "
                "cache before the first token"
            )
        for i, there in self.has_previous_state.items():
            state: Any = self.conv_states[i]
            needed: Any = self.conv_kernel_size[i]
            if not there or not state.shape[-1]:  # nothing, or the sums of means, which are made anew
                continue
            recorded = state.shape[-1]
            if recorded - removed < min(needed, tokens - removed):
                raise ValueError(
                    f"crop({tokens_to_remove}): the inputs of the last {recorded} tokens are recorded, of which mixing "
                    f"needs {min(needed, tokens - removed)}; take back at most "
                    f"{max(0, recorded - min(needed, tokens))} tokens, or start with a new cache"
                )
        # Not the library's own: it takes every state for one that is there.
        for i, there in self.has_previous_state.items():
            if there:
                state, needed = self.conv_states[i], self.conv_kernel_size[i]
                end = state.shape[-1] - removed if state.shape[-1] else 0
                self.conv_states[i] = state[..., max(0, end - needed) : end]
        DynamicLayer.crop(self, tokens_to_remove)

    def _each_state(self, change: Any) -> None:
        for i, state in self.conv_states.items():
            if state is not None and self.has_previous_state[i]:
                self.conv_states[i] = change(state)


def check_cache(
    cache: Any, mixing_layers: Sequence[int], batch: int, n_layer: int, n_kv_head: int, head_dim: int, n_states: int
) -> None:
    """Refuse a cache that has no place for mixing states, or holds those of another model or batch; make the states of
    a dynamic one follow what is done to it.

    Raises:
        ValueError: with what the cache holds and what this model needs.
    """
    layers = cache.layers
    new = [layers[i] for i in mixing_layers if i < len(layers) and type(layers[i]) is not MixingCacheLayer]
    # An offloaded cache moves the states away together with keys and values, before they are used.
    if cache.offloading or not layers or not all(hasattr(layer, "conv_states") for layer in new):
        raise ValueError(
            f"this {type(cache).__name__} keeps no mixing states at hand; make it with "
            "DynamicCache(config=model.config). (PEFT's prefix tuning makes such a cache and cannot train a model with "
            "mixing: use LoRA or prompt tuning)"
        )
    keys = getattr(layers[0], "keys", None)
    held = (batch, n_kv_head, head_dim) if keys is None or not keys.numel() else (*keys.shape[:2], keys.shape[3])
    if len(layers) != n_layer or held != (batch, n_kv_head, head_dim):
        raise ValueError(
            f"this cache has {len(layers)} layers and keys of {held[0]} x {held[1]} x tokens x {held[2]}, this model "
            f"and batch need {n_layer} and {batch} x {n_kv_head} x tokens x {head_dim}; start with a new one"
        )
    states = next((layers[i].number_of_states for i in mixing_layers), n_states)
    if states != n_states:
        raise ValueError(
            f"this cache keeps {states} mixing states a layer, this model {n_states}: it is of a model with another "
            "mixing; start with a new one"
        )
    for layer in new:
        if type(layer) is LinearAttentionAndFullAttentionLayer:
            layer.__class__ = MixingCacheLayer


class Layout:
    """Where decoding keeps the last w inputs of each coordinate, w its window: in a row of R = sum of w slots.

    Input number t goes to slot (-t) mod w of its coordinate. Read from the slot of the newest input on, and from the
    coordinate's last slot on from its first, inputs come newest first, as the taps of a kernel do.
    """

    def __init__(self, windows: Sequence[int], device: torch.device):
        self.size, self.longest = sum(windows), max(windows)
        self.window = torch.tensor(windows, device=device)
        self.rate = 1 / self.window
        self.start = self.window.cumsum(0) - self.window
        # Of each slot: its coordinate, that one's first, and which of them it is.
        coordinates = torch.arange(len(windows), device=device)
        self.owner = coordinates.repeat_interleave(self.window, output_size=self.size)
        self.base = self.start[self.owner]
        self.place = torch.arange(self.size, device=device) - self.base


class Clock:
    """Which inputs are in the slots: those of the `past` tokens before a forward pass, and of the `tokens` in it.

    One serves all mixers.
    """

    def __init__(self, layout: Layout, past: int | torch.Tensor, tokens: int, batch: int):
        self.layout, self.batch = layout, batch
        # Copies: a cache changes a `past` that is a tensor during the pass.
        self.first, self.last = past + 0, past + tokens - 1
        self._ages: torch.Tensor | None = None
        self._slots: torch.Tensor | None = None

    def slots(self) -> torch.Tensor:
        """(B, C) the slot of each coordinate's last input."""
        if self._slots is None:
            self._slots = (self.layout.start + -self.last % self.layout.window).expand(self.batch, -1)
        return self._slots

    def ages(self) -> torch.Tensor:
        """(R,) how many tokens before the last one the input in each slot came."""
        if self._ages is None:
            self._ages = (self.last + self.layout.place) % self.layout.window[self.layout.owner]
        return self._ages

    def pack(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs up to the last one, (B, any, C), to the row of them (B, R)."""
        inputs = nn.functional.pad(inputs, (0, 0, max(0, self.layout.longest - inputs.shape[1]), 0))
        rows = inputs.shape[1] - 1 - self.ages()
        return inputs.flatten(1).index_select(1, rows * inputs.shape[2] + self.layout.owner)

    def unpack(self, row: torch.Tensor) -> torch.Tensor:
        """The row (B, R) before this pass to inputs (B, S, C), S the longest window; those too old are arbitrary."""
        numbers = self.first - torch.arange(self.layout.longest, 0, -1, device=row.device)
        return row[:, self.layout.start + -numbers[:, None] % self.layout.window]
