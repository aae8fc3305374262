"""The transformer: GPT-2 or Llama blocks with filters at their sites, and the language model.

Baseline and wavelet model are one class that differ in `config.mixing`. The classifier is in `classifier.py`.

Shapes: B batch, T tokens (new ones), S tokens in the cache, E embedding, H heads, D head width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration import WaveletGPTConfig
from .decoding import PADDING, MixingGeneration, check_attention, reach_told, upgrade_cache
from .frames import FrameEmbedding, FrameLinear
from .mixer import Kernels, Mixer
from .mixing import BLOCK_SITES, Mixers


def _norm(config: WaveletGPTConfig) -> nn.Module:
    kind = nn.LayerNorm if config.architecture == "gpt2" else nn.RMSNorm
    return kind(config.n_embd, eps=config.norm_epsilon)


Mix = Callable[[str, torch.Tensor], torch.Tensor]
"""Filters what is at a site, if there is a filter: `Mixers.at` with what it needs to know."""


def unfiltered(site: str, x: torch.Tensor) -> torch.Tensor:
    """The `Mix` of a part that is used alone."""
    return x


class ResidualLinear(nn.Linear):
    """A linear map whose result is added to the residual stream; it starts smaller than others (`_init_weights`)."""


class Attention(nn.Module):
    """Self-attention with H query heads and `n_kv_head` key/value heads; one projection makes all three."""

    def __init__(self, config: WaveletGPTConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.head_dim = config.head_dim
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.num_key_value_groups = config.n_head // config.n_kv_head
        self.scaling = config.head_dim**-0.5
        self.is_causal = config.causal
        bias = config.architecture == "gpt2"
        self.qkv_proj = nn.Linear(config.n_embd, sum(self.heads) * self.head_dim, bias=bias)
        self.out_proj = ResidualLinear(config.n_embd, config.n_embd, bias=bias)

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        past_key_values: Cache | None,
        mix: Mix = unfiltered,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = hidden.shape[:-1]
        qkv = self.qkv_proj(hidden).view(*shape, -1, self.head_dim)
        parts = zip(("query", "key", "value"), qkv.split(self.heads, dim=-2), strict=True)
        query, key, value = (mix(site, part).transpose(1, 2) for site, part in parts)
        if rotary is not None:
            query, key = rotate(query, key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attn_pdrop if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(out.reshape(*shape, -1).contiguous()), weights


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions on the last channels of each head, as many as `cos` and `sin` (B, T, channels) have."""
    still = query.shape[-1] - cos.shape[-1]
    if not still:
        result: tuple[torch.Tensor, torch.Tensor] = apply_rotary_pos_emb(query, key, cos, sin)
        return result
    turned = apply_rotary_pos_emb(query[..., still:], key[..., still:], cos, sin)
    return torch.cat([query[..., :still], turned[0]], dim=-1), torch.cat([key[..., :still], turned[1]], dim=-1)


class FeedForward(nn.Module):
    """Feed-forward: two layers (GPT-2), or SwiGLU (Llama), whose gate and value come from one projection."""

    def __init__(self, config: WaveletGPTConfig):
        super().__init__()
        self.gated = config.architecture == "llama"
        self.activation = ACT2FN[config.activation_function]
        self.up_proj = nn.Linear(config.n_embd, (1 + self.gated) * config.n_inner, bias=not self.gated)
        self.out_proj = ResidualLinear(config.n_inner, config.n_embd, bias=not self.gated)

    def forward(self, hidden: torch.Tensor, mix: Mix = unfiltered) -> torch.Tensor:
        hidden = mix("mlp_hidden", self.up_proj(hidden))
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * value
        else:
            hidden = self.activation(hidden)
        result: torch.Tensor = self.out_proj(hidden)
        return result


class Block(GradientCheckpointingLayer):
    """One transformer block, with filters at those of its sites that the configuration names."""

    def __init__(self, config: WaveletGPTConfig, layer: int):
        super().__init__()
        self.layer_idx = layer
        self.post_norm = config.norm_position == "post"
        self.norm_1 = _norm(config)
        self.attention = Attention(config, layer)
        self.norm_2 = _norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.mixers = Mixers(config, BLOCK_SITES if config.mixes(layer) else ())

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        reach: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        cache = past_key_values.layers[self.layer_idx] if past_key_values is not None and self.mixers else None

        def mix(site: str, x: torch.Tensor) -> torch.Tensor:
            return self.mixers.at(site, x, reach, cache)

        def attend(x: torch.Tensor) -> torch.Tensor:
            x = self.attention(mix("attention_input", x), attention_mask, rotary, past_key_values, mix, **kwargs)[0]
            result: torch.Tensor = self.dropout(mix("attention_output", x))
            return result

        def feed(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.dropout(mix("mlp_output", self.feed_forward(mix("mlp_input", x), mix)))
            return result

        if self.post_norm:
            hidden = self.norm_1(hidden + attend(hidden))
            hidden = self.norm_2(hidden + feed(hidden))
        else:
            hidden = hidden + attend(self.norm_1(hidden))
            hidden = hidden + feed(self.norm_2(hidden))
        return mix("block", hidden)


class WaveletGPTPreTrainedModel(PreTrainedModel):
    """Weight initialisation, and what the Hugging Face tools ask about the models."""

    config: WaveletGPTConfig
    config_class = WaveletGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - as declared by the base class, here and below
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = False  # vLLM and SGLang would decode without the states, silently wrong
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Outside of its own models transformers calls this for modules that hold parameters themselves, and no others.
        super()._init_weights(module)
        if isinstance(module, Mixer | Kernels):
            module.reset_parameters(init)
        elif isinstance(module, ResidualLinear):
            # Each block adds two terms to the residual stream: scaled so that its variance stays put (GPT-2, 2.3).
            std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, FrameLinear):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)


class WaveletGPTModel(WaveletGPTPreTrainedModel):
    """Embeddings, blocks and final norm. See `WaveletGPTConfig` for the variants."""

    def __init__(self, config: WaveletGPTConfig):
        super().__init__(config)
        config.check()
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, config.n_embd) if config.frame_size is None else FrameEmbedding(config)
        )
        self.embed_positions = (
            nn.Embedding(config.n_positions, config.n_embd) if config.position_embedding == "learned" else None
        )
        self.rotary = _rotary(config)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.mixers = Mixers(config, ("embedding",))  # its state lies in the first block's layer of the cache
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        # A layer of the cache that has states, and their names.
        homes: list[Any] = [block.mixers for block in self.blocks]
        places = [(i, [m.name for m in home if m.past]) for i, home in enumerate([*homes, self.mixers]) if home]
        layer, names = places[0] if places else (0, [])
        self.remembered = (layer if layer < config.n_layer else 0), names
        self.norm = _norm(config) if config.norm_position == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def _positions(
        self, hidden: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None, past: int | torch.Tensor
    ) -> torch.Tensor:
        """(B or 1, T) index of each token among the real ones of its row."""
        T = hidden.shape[1]
        if position_ids is None:
            if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
                return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
            return torch.arange(T, device=hidden.device)[None] + past
        return position_ids

    def _open_cache(self, cache: Cache, batch: int, past: int | torch.Tensor) -> None:
        """Make room for the states of mixers.

        Raises:
            ValueError: what is in the cache is of another model or batch.
        """
        config, there = self.config, len(cache.layers)
        keys = getattr(cache.layers[0], "keys", None) if there else None
        if keys is not None and keys.numel():
            held, needed = (*keys.shape[:2], keys.shape[3]), (batch, config.n_kv_head, config.head_dim)
            if there != config.n_layer or held != needed:
                raise ValueError(
                    f"this cache has {there} layers and keys of {held[0]} x {held[1]} x tokens x {held[2]}, this model "
                    f"and batch need {config.n_layer} and {batch} x {needed[1]} x tokens x {needed[2]}; start with a "
                    "new one"
                )
        upgrade_cache(cache, config.n_layer)
        if type(past) is int and past:
            # What filled one block filled all: every token comes here.
            layer, names = self.remembered
            missing = [name for name in names if name not in cache.layers[layer].states]  # type: ignore[union-attr]
            if missing:
                raise ValueError(
                    f"this cache keeps no mixing state for {missing[0]} in block {layer}: a model with another mixing "
                    "filled it; start with a new one"
                )

    def _embed(self, hidden: torch.Tensor, positions: torch.Tensor, total: int | torch.Tensor) -> torch.Tensor:
        """Token embeddings plus absolute positions, where the scheme has them."""
        if self.embed_positions is not None:
            # The length of a static cache is a tensor, which a compiler cannot look at.
            known = not (isinstance(total, torch.Tensor) and torch.compiler.is_compiling())
            compiling = torch.compiler.is_compiling()
            # Padding takes no position.
            if known and total > self.config.n_positions and (compiling or positions.max() >= self.config.n_positions):
                raise ValueError(
                    f"{total} tokens exceed n_positions={self.config.n_positions} of the learned positions; "
                    'shorten the input, or train with position_embedding "rope", "sinusoidal" or "none"'
                )
            hidden = hidden + self.embed_positions(positions)
        elif self.config.position_embedding == "sinusoidal":
            hidden = hidden * math.sqrt(self.config.n_embd) + sinusoids(positions, self.config.n_embd).to(hidden.dtype)
        result: torch.Tensor = self.dropout(hidden)
        return result

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of input_ids (B, T), or of inputs_embeds (B, T, E).

        Args:
            attention_mask: (B, S + T), 0 at padding; or a mask for attention, with the first as `wavelet_padding`.
            position_ids: (B, T); None counts the real tokens. Where they start again, without an attention_mask,
                another document begins: neither attention nor mixing looks beyond.
            past_key_values: a cache of transformers; mixing keeps its states in it.

        Raises:
            ValueError: sequences beyond learned positions, a cache that another model filled, the attention of a
                serving engine, which brings a cache without states; any cache if the model is not causal.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if not self.config.causal:
            if past_key_values is not None:
                raise ValueError(
                    "a model that is not causal takes no past_key_values: later tokens change earlier ones"
                )
            use_cache = False
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        given = past_key_values  # beside a cache the library's mask does not look for packed documents
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0

        mixes = self.config.mixing != "none"
        told = {"position_ids": position_ids, **kwargs}
        reach = reach_told(hidden, attention_mask, told) if mixes else None
        kwargs.pop(PADDING, None)
        if mixes:
            check_attention(self.config._attn_implementation)
            if past_key_values is not None:
                self._open_cache(past_key_values, hidden.shape[0], past)
        # Only positions that were given can mean packing; looking for it in others would cost a synchronisation.
        made: Any = attention_mask  # one that is made for attention already is handed back
        mask = (create_causal_mask if self.config.causal else create_bidirectional_mask)(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=made,
            past_key_values=given,
            position_ids=position_ids,
        )
        positions = self._positions(hidden, attention_mask, position_ids, past)
        hidden = self._embed(hidden, positions, past + hidden.shape[1])
        rotary = self.rotary(hidden, position_ids=positions) if self.rotary is not None else None

        if self.mixers:
            cache = past_key_values.layers[0] if past_key_values is not None else None
            hidden = self.mixers.at("embedding", hidden, reach, cache)
        for block in self.blocks:
            hidden = block(
                hidden, attention_mask=mask, rotary=rotary, past_key_values=past_key_values, reach=reach, **kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


def _rotary(config: WaveletGPTConfig) -> LlamaRotaryEmbedding | None:
    """Llama's rotary positions for heads as wide as the part that they turn; None where they turn nothing."""
    if not config.rotary_width:
        return None
    narrow = copy.copy(config)
    narrow.n_embd = config.rotary_width * config.n_head
    # It reads the names that our configuration shares with Llama's.
    return LlamaRotaryEmbedding(narrow)  # type: ignore[arg-type]


def sinusoids(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Fixed positions of Vaswani et al. 2017, Section 3.5: sines in the first half of the width, cosines in the second.

    positions (B, T) -> (B, T, width), float32.
    """
    half = (width + 1) // 2
    frequencies = torch.exp(torch.arange(half, device=positions.device) * (-math.log(10000.0) / half))
    angles = positions[..., None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]


class WaveletGPTForCausalLM(MixingGeneration, WaveletGPTPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: WaveletGPTConfig):
        super().__init__(config)
        if not config.causal or config.frame_size is not None:
            raise ValueError("a language model needs causal=True and tokens (frame_size=None)")
        self.model = WaveletGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T or logits_to_keep, V) in the model's dtype, and the loss in nats per token if asked for.

        Args:
            labels: (B, T), shifted here as in every Hugging Face model; -100 is ignored.
            shift_labels: (B, T) in place of `labels`, already shifted: the target of each position.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=shift_labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoModel.register(WaveletGPTConfig, WaveletGPTModel, exist_ok=True)
AutoModelForCausalLM.register(WaveletGPTConfig, WaveletGPTForCausalLM, exist_ok=True)

__all__ = [
    "WaveletGPTForCausalLM",
    "WaveletGPTModel",
    "WaveletGPTPreTrainedModel",
]
