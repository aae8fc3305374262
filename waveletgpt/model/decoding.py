"""Decoding with a cache of transformers: the states of filters lie in its layers, beside keys and values.

`upgrade_cache` gives the layers of any cache room for states (state.py), which then follow whatever is done to keys and
values. `MixingGeneration` makes `generate` do so, and `reach_told` finds out how far back each token may look, from the
arguments of a forward pass. The models of this package and those that `add_mixing` changed share all of it.

Shapes: B batch, T new tokens, S tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .state import State

try:
    from waveletgpt.errors import UserError
    from waveletgpt.ops import reach_of
except ImportError:
    # A checkpoint brings the operator's definition and nothing else.
    from .reference import reach_of  # type: ignore[import-not-found, no-redef]

    UserError = ValueError  # type: ignore[assignment, misc]

PADDING = "wavelet_padding"  # a model's keyword argument: its 2-D mask, beside one that is made for attention already


# States in the layers of a cache.


@lru_cache(None)
def mixed_cache_layer(base: Any) -> type:
    """A cache layer that also keeps the states of the block's filters.

    Made by inheriting once: Python can't assign a class with another base besides to `__class__` here, for cache
    layers derive from ABC.
    """

    class Mixed(base):
        # Inherited, it would put this class in transformers' table of all kinds of layers.
        _layer_type = None
        mixes = True
        record_past = False
        states: dict[str, State]

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.states = {}

        def state(self, name: str, needed: int, counting: bool) -> State:
            """The state of the filter `name`, which is made at the first call."""
            found = self.states.get(name)
            if found is None:
                found = State(needed, counting, self.record_past, self.is_compileable)
                self.states[name] = found
            elif (found.needed, found.counting) != (needed, counting):
                raise UserError(
                    f"this cache holds mixing states of {found.needed} tokens for {name}, this model needs {needed}: "
                    "it was filled by another model; start with a new one"
                )
            return found

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._each_row(lambda held: held.index_select(0, beam_idx.to(held.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._each_row(lambda held: held.repeat_interleave(repeats, 0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._each_row(lambda held: held[indices.to(held.device) if isinstance(indices, Tensor) else indices])

        def reset(self) -> None:
            super().reset()
            for state in self.states.values():
                state.reset()

        def activate_past_recording(self) -> None:
            parent = getattr(super(), "activate_past_recording", None)
            if parent is not None:
                parent()
            self.record_past = True
            for state in self.states.values():
                state.recording = True

        def crop(self, tokens_to_remove: int) -> None:
            """Take back the last tokens; a negative number, as in transformers.

            Raises:
                ValueError: a cache that cannot, or inputs that were not recorded.
            """
            if not hasattr(super(), "crop"):
                raise UserError(f"{base.__name__} cannot take tokens back: use a DynamicCache")
            if tokens_to_remove > 0 or -tokens_to_remove > self.get_seq_length():
                raise UserError(
                    f"crop({tokens_to_remove}): with mixing, give how many tokens to remove as a negative number, at "
                    f"most {self.get_seq_length()}"
                )
            for state in self.states.values():  # all or none: a block may have several filters
                state.check_crop(-tokens_to_remove)
            super().crop(tokens_to_remove)
            for state in self.states.values():
                state.crop(-tokens_to_remove)

        def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
            for state in self.states.values():
                state.each_row(change)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _rebuild_layer, (base,), self.__dict__

    Mixed.__name__ = Mixed.__qualname__ = f"Mixed{base.__name__}"
    return Mixed


def _rebuild_layer(base: type) -> Any:
    """An empty layer, for pickle and copy, which cannot find a class that was made at run time."""
    made: Any = mixed_cache_layer(base)
    return made.__new__(made)


def has_states(layer: Any) -> bool:
    return getattr(layer, "mixes", False)


def upgrade_cache(cache: Any, layers: int = 0, *, empty: bool = False) -> None:
    """Give every layer of a cache room for states, in place; make a dynamic one's first `layers` if they are not there.

    Raises:
        ValueError: a cache of another kind, or one that holds tokens of a model without mixing (unless `empty` says
            that it was made in this forward pass).
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise UserError(f"past_key_values is a {type(cache).__name__}: mixing needs a DynamicCache or StaticCache")
    kind = cache.layer_class_to_replicate
    if kind is not None and not has_states(kind):
        kind = cache.layer_class_to_replicate = mixed_cache_layer(kind)
    while kind is not None and len(cache.layers) < layers:
        cache.layers.append(kind())
    if all(map(has_states, cache.layers)):
        return
    if not empty and cache.get_seq_length() > 0:
        raise UserError(
            "past_key_values holds tokens but no mixing states: a model without mixing filled it (prefix tuning, or "
            "a prompt's cache from before add_mixing); fill it with this model, or start with a new one"
        )
    for layer in cache.layers:
        if not has_states(layer):
            base: Any = type(layer)
            layer.__class__ = mixed_cache_layer(base)
            setattr(layer, "states", {})  # noqa: B010 - it is of the new class now


# The arguments of a forward pass.


def reach_told(inputs: Tensor, attention_mask: Any, told: dict[str, Any]) -> Tensor | None:
    """How many tokens before each one it may look at, (B or 1, T), of a model's arguments; None: all there are.

    Args:
        inputs: (B, T, ...).
        attention_mask: (B, S + T), 0 at padding; or what was made of it for attention.
        told: the other arguments. `PADDING` is taken out; `cu_seq_lens_q`, `seq_idx`, and `position_ids` that start
            again say where packed documents begin.

    Raises:
        ValueError: a mask made for attention without the 2-D one; one that is too short.
    """
    tokens = inputs.shape[1]
    mask = attention_mask
    if PADDING in told:
        mask = told.pop(PADDING)
    elif isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim != 2):
        if tokens > 1:
            raise UserError(
                "attention_mask is made for attention already and doesn't say which tokens are padding: give the 2-D "
                f"one, or {PADDING}=(B, T) beside it (None for no padding)"
            )
        mask = None  # the next token of decoding is never padding
    bounds: dict[str, Tensor] = {}
    cu_seqlens = told.get("cu_seq_lens_q")
    if cu_seqlens is not None and inputs.shape[0] == 1:
        bounds["cu_seqlens"] = cu_seqlens
    elif told.get("seq_idx") is not None:
        bounds["seq_idx"] = told["seq_idx"]
    elif mask is None and tokens > 1 and getattr(told.get("position_ids"), "ndim", 0) == 2:
        # As attention does it: positions tell documents apart where no mask says otherwise.
        bounds["positions"] = told["position_ids"]
    if mask is not None:
        if mask.shape[1] < tokens:
            raise UserError(f"attention_mask has {mask.shape[1]} tokens: give at least the {tokens} of this call")
        # Asking costs less than mixing with limits, but would break a graph in two.
        if torch.compiler.is_compiling() or not bool((mask[:, -tokens - 1 :] == 1).all()):
            bounds["mask"] = mask
    return reach_of(tokens, **bounds)  # type: ignore[arg-type]


def check_attention(name: str | None) -> None:
    """Refuse attention that keeps a cache of its own, or gives each process a part of a sequence.

    Raises:
        ValueError: with what to use instead.
    """
    name = name or ""
    if name.startswith(("paged", "vllm", "sglang")):
        raise UserError(f"attention {name!r} has a cache of its own, which keeps no mixing states: use generate()")
    _check_whole_sequences(name)


@torch.compiler.assume_constant_result
def _check_whole_sequences(attention: str) -> None:
    """All ways to split sequences over processes replace attention by their own."""
    functions = (nn.functional.scaled_dot_product_attention, ALL_ATTENTION_FUNCTIONS.get(attention))
    modules = [getattr(function, "__module__", None) or "" for function in functions]
    if any(module.startswith(("torch.distributed", "deepspeed")) for module in modules):
        raise UserError(
            "context and sequence parallelism give each process a part of the sequence, where mixing can't see the "
            "tokens before: use data parallelism (DDP, FSDP) instead"
        )


class MixingGeneration:
    """What a model with mixing adds to `generate`; a base class that comes before the model's own."""

    _supports_attention_backend = False  # vLLM and SGLang would decode without the states, silently wrong

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        out = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            upgrade_cache(cache)
            if generation_config.is_assistant:  # its guesses will be taken back
                cache.activate_past_recording()
        return out

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, and with it `generate_batch`: it has a cache of its own, which keeps no mixing states."""
        if self.config.get_text_config().__dict__.get("mixing") == "none":  # type: ignore[attr-defined]
            return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        raise UserError("continuous batching has a cache of its own, which keeps no mixing states: use generate()")

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: Any, attention_mask: Any = None, inputs_embeds: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As the model does; the 2-D mask goes along where a mask for attention is made of it."""
        # All are named here because transformers reads of the signature what a model can be given.
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        new = inputs.get("input_ids")
        tokens = (inputs["inputs_embeds"] if new is None else new).shape[1]
        prepared = inputs.get("attention_mask")
        if tokens > 1 and (isinstance(prepared, dict) or (isinstance(prepared, Tensor) and prepared.ndim != 2)):
            flat = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
            inputs[PADDING] = attention_mask[:, -tokens:].contiguous() if flat else None
        result: dict[str, Any] = inputs
        return result
