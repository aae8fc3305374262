"""The transformer: GPT-2 or Llama blocks with a mixer, as Hugging Face models that go on with a text or classify one.

Baseline and wavelet model are one class that differ in `config.mixing`.

Shapes: B batch, T tokens (new ones), S tokens in the cache, E embedding, H heads, D head width, V vocabulary,
N samples of a waveform.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration import WaveletGPTConfig
from .decoding import Clock, Layout, check_cache
from .mixing import Kernels, Mixer, Mixers


def _norm(config: WaveletGPTConfig) -> nn.Module:
    kind = nn.LayerNorm if config.architecture == "gpt2" else nn.RMSNorm
    return kind(config.n_embd, eps=config.norm_epsilon)


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
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = hidden.shape[:-1]
        qkv = self.qkv_proj(hidden).view(*shape, -1, self.head_dim)
        query, key, value = (part.transpose(1, 2) for part in qkv.split(self.heads, dim=-2))
        if rotary is not None:
            query, key = apply_rotary_pos_emb(query, key, *rotary)
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


class FeedForward(nn.Module):
    """GELU feed-forward (GPT-2), or SwiGLU (Llama), whose gate and value come from one projection."""

    def __init__(self, config: WaveletGPTConfig):
        super().__init__()
        self.gated = config.architecture == "llama"
        self.up_proj = nn.Linear(config.n_embd, (1 + self.gated) * config.n_inner, bias=not self.gated)
        self.out_proj = ResidualLinear(config.n_inner, config.n_embd, bias=not self.gated)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.up_proj(hidden)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            return self.out_proj(nn.functional.silu(gate) * value)
        return self.out_proj(nn.functional.gelu(hidden, approximate="tanh"))


class Block(GradientCheckpointingLayer):
    """One transformer block, then its mixer."""

    def __init__(self, config: WaveletGPTConfig, layer: int):
        super().__init__()
        self.layer_idx = layer
        self.post_norm = config.norm_position == "post"
        self.norm_1 = _norm(config)
        self.attention = Attention(config, layer)
        self.norm_2 = _norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.mixers = Mixers(config, layer)

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        seen: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        clock: Clock | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        context = {
            "seen": seen,
            "padding_mask": padding_mask,
            "clock": clock,
            "cache": past_key_values.layers[self.layer_idx] if past_key_values is not None and self.mixers else None,
        }

        mix = self.mixers.at

        def attend(x: torch.Tensor) -> torch.Tensor:
            x = mix("attention", x, **context)
            return self.dropout(self.attention(x, attention_mask, rotary, past_key_values, **kwargs)[0])

        def feed(x: torch.Tensor) -> torch.Tensor:
            return self.dropout(self.feed_forward(mix("feed_forward", x, **context)))

        if self.post_norm:
            hidden = self.norm_1(hidden + attend(hidden))
            hidden = self.norm_2(hidden + feed(hidden))
        else:
            hidden = hidden + attend(self.norm_1(hidden))
            hidden = hidden + feed(self.norm_2(hidden))
        return mix("output", hidden, **context)


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
    # Engines that bring their own attention and key/value cache (vLLM, SGLang) ask for this and turn the model down
    # without it: they would decode without the mixing states, silently wrong. `forward` turns down those that insist.
    _supports_attention_backend = False
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
        elif isinstance(module, ClassificationHead) and module.query is not None:
            init.zeros_(module.query)


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
        # It reads the names that our configuration shares with Llama's.
        self.rotary = LlamaRotaryEmbedding(config) if config.position_embedding == "rope" else None  # type: ignore[arg-type]
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.windows = config.mix_windows()
        self.mixing_layers = [layer for layer in range(config.n_layer) if config.mixes(layer)]
        # Read at every token, and a configuration's attributes are slow.
        self.cache_shape = (config.n_layer, config.n_kv_head, config.head_dim, config.number_of_conv_states)
        self.layouts: dict[torch.device, Layout] = {}
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

    def _refuse_what_mixing_gets_wrong(
        self,
        cache: Cache | None,
        position_ids: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        batch: int,
        **kwargs: Any,
    ) -> None:
        """ValueError for caches without mixing states, for packed documents, and for serving engines."""
        if cache is not None:
            check_cache(cache, self.mixing_layers, batch, *self.cache_shape)
        attention = self.config._attn_implementation or ""
        if attention.startswith(("paged", "sglang", "vllm")):
            raise ValueError(f"attention {attention!r} has its own cache, which keeps no mixing states; use generate()")
        packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seqlens", "seq_idx"))
        # A compiler cannot look at values.
        if position_ids is not None and position_ids.shape[1] > 1 and not torch.compiler.is_compiling():
            restarts = position_ids.diff(dim=-1) < 1
            if padding_mask is not None:
                real = padding_mask.bool()
                restarts = restarts & real[:, 1:] & real[:, :-1]
            packed = packed or bool(restarts.any())
        if packed:
            raise ValueError(
                "position_ids or cu_seq_lens put several documents in a row (packing): mixing would average across "
                'them; give one document per row, or use mixing="none"'
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
        return self.dropout(hidden)

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
            attention_mask: (B, S + T), 0 at padding; or the dict of masks that `generate` prepares.
            position_ids: (B, T); None counts the real tokens.
            past_key_values: a cache made with `DynamicCache(config=model.config)` or `StaticCache(...)`.

        Raises:
            ValueError: packed documents, sequences beyond learned positions, a cache without mixing states, the
                attention of a serving engine, which brings such a cache; any cache if the model is not causal.
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
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0

        masks: dict[str, Any]
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            # Only positions that were given can mean packing; looking for it in others would cost a synchronisation.
            masks = create_masks(self.config, hidden, attention_mask, past_key_values, position_ids)
        if self.config.mixing != "none":
            self._refuse_what_mixing_gets_wrong(
                past_key_values, position_ids, masks["linear_attention"], hidden.shape[0], **kwargs
            )
        positions = self._positions(hidden, attention_mask, position_ids, past)
        hidden = self._embed(hidden, positions, past + hidden.shape[1])
        rotary = self.rotary(hidden, position_ids=positions) if self.rotary is not None else None

        clock = None
        if past_key_values is not None and self.windows:
            if hidden.device not in self.layouts:
                self.layouts[hidden.device] = Layout(self.windows, hidden.device)
            clock = Clock(self.layouts[hidden.device], past, hidden.shape[1], hidden.shape[0])
        for block in self.blocks:
            hidden = block(
                hidden,
                attention_mask=masks["full_attention"],
                rotary=rotary,
                past_key_values=past_key_values,
                seen=positions + 1,
                padding_mask=masks["linear_attention"],
                clock=clock,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


def sinusoids(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Fixed positions of Vaswani et al. 2017, Section 3.5: sines in the first half of the width, cosines in the second.

    positions (B, T) -> (B, T, width), float32.
    """
    half = (width + 1) // 2
    frequencies = torch.exp(torch.arange(half, device=positions.device) * (-math.log(10000.0) / half))
    angles = positions[..., None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]


def create_masks(
    config: WaveletGPTConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None = None,
) -> dict[str, Any]:
    """The attention's mask, and the (B, T) padding mask of the mixers, both None where nothing is masked."""
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    return {
        "full_attention": (create_causal_mask if config.causal else create_bidirectional_mask)(**arguments),
        "linear_attention": create_recurrent_attention_mask(**arguments) if config.mixing != "none" else None,
    }


class WaveletGPTForCausalLM(WaveletGPTPreTrainedModel, GenerationMixin):
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

    @staticmethod
    def create_masks_for_generate(
        config: WaveletGPTConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        # Blocks with and without a mixer take the same pair, so the library's table of layer types does not apply.
        return create_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)


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
        return self.down_proj(nn.functional.gelu(self.up_proj(frames), approximate="tanh"))


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


class ClassificationHead(nn.Module):
    """Pool over time, then classify with the Long Range Arena's perceptrons (arXiv 2011.04006, its `classifier_head`).

    One document: E -> n_inner -> labels. Two, pooled to u and v: [u, v, u - v, u v] -> n_inner -> n_inner/2 -> labels.
    """

    def __init__(self, config: WaveletGPTConfig):
        super().__init__()
        self.pooling = config.pooling
        self.n_inputs = config.n_inputs
        # Zero: it starts as the mean.
        self.query = nn.Parameter(torch.zeros(config.n_embd)) if config.pooling == "attention" else None
        labels: Any = config.num_labels  # declared as if it could be None
        widths = [config.n_embd, config.n_inner, labels]
        if config.n_inputs == 2:
            widths = [4 * config.n_embd, config.n_inner, -(-config.n_inner // 2), labels]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """hidden (B * n_inputs, T, E), mask (B * n_inputs, T) or None -> logits (B, labels)."""
        x = self.pool(hidden, mask)
        if self.n_inputs == 2:
            u, v = x.unflatten(0, (-1, 2)).unbind(1)
            x = torch.cat([u, v, u - v, u * v], dim=-1)
        for layer in self.layers[:-1]:
            x = nn.functional.relu(layer(x))
        return self.layers[-1](x)

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """hidden (B, T, E) -> (B, E) over the tokens that are real by mask (B, T)."""
        B, T, _ = hidden.shape
        real = torch.ones(B, T, dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
        if self.pooling == "last":
            last = (torch.arange(T, device=hidden.device) * real).argmax(1)
            return hidden[torch.arange(B, device=hidden.device), last]
        scores = hidden.new_zeros(B, T) if self.query is None else hidden @ self.query
        # Not infinity: a document may be empty.
        weights = scores.masked_fill(~real, torch.finfo(scores.dtype).min).softmax(1)
        return (weights.to(hidden.dtype)[:, None] @ hidden)[:, 0]


def _only_padded_after(mask: torch.Tensor) -> bool:
    """Whether by mask (B, T) all padding follows the real tokens: if causal, these never see it and need no mask.

    Costs a synchronisation, as the library's own look at a mask does, and like that is left out while compiling.
    """
    return not torch.compiler.is_compiling() and bool((mask[:, 1:] <= mask[:, :-1]).all())


class WaveletGPTForSequenceClassification(WaveletGPTPreTrainedModel):
    """The transformer with a head that classifies whole texts, pairs of texts, or waveforms."""

    def __init__(self, config: WaveletGPTConfig):
        super().__init__(config)
        self.model = WaveletGPTModel(config)
        self.score = ClassificationHead(config)
        if config.frame_size is not None:
            self.main_input_name = "input_values"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, num_labels) in the model's dtype, and the loss if asked for.

        Args:
            input_ids: (B, T); with `n_inputs=2` (B, 2, T), and so for the others.
            attention_mask: of the same shape, 0 at padding, which may be on either side; None: everything is real.
            labels: (B,) class of each; or (B, num_labels), floats: 0 and 1 for
                `problem_type="multi_label_classification"`, else shares of the classes.
            input_values: (B, N) waveforms in [-1, 1], in place of `input_ids`, if the model has a `frame_size`.
            inputs_embeds: (B, T, E), in place of `input_ids`.

        Raises:
            ValueError: none or several of the inputs, or one that does not fit the configuration; and as the model.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        if (input_values is not None) + (input_ids is not None) + (inputs_embeds is not None) != 1:
            raise ValueError("give one of input_ids, input_values and inputs_embeds")
        if inputs_embeds is None and (input_values is None) != (self.config.frame_size is None):
            wanted = (
                "input_ids, no waveforms: it has no frame_size" if self.config.frame_size is None else "input_values"
            )
            raise ValueError(f"this model reads {wanted}")
        ids, samples, embeddings, mask = (
            self._one_document_per_row(x) for x in (input_ids, input_values, inputs_embeds, attention_mask)
        )
        if samples is not None and self.config.frame_size is not None:
            frames, mask = split_frames(samples, mask, self.config.frame_size)
            embeddings = self.model.embed_tokens(frames.to(self.dtype))
        bare = mask is None or (
            self.config.causal and mask.shape[1] <= self.config.n_positions and _only_padded_after(mask)
        )
        outputs = self.model(input_ids=ids, attention_mask=None if bare else mask, inputs_embeds=embeddings, **kwargs)
        logits = self.score(outputs.last_hidden_state, mask)
        loss = None
        if labels is not None:
            multiple = self.config.problem_type == "multi_label_classification"
            if labels.is_floating_point() and not multiple:
                # Shares of the classes, as mix-up makes them: the library's loss takes numbers of classes only.
                loss = nn.functional.cross_entropy(logits.float(), labels.float())
            else:
                loss = self.loss_function(
                    labels=labels.float() if multiple else labels,
                    pooled_logits=logits.float(),
                    config=self.config,
                    num_items_in_batch=None if multiple else num_items_in_batch,
                )
            if labels.ndim == 2 and num_items_in_batch is not None:
                # These losses are means over this batch; accumulation wants the share of all items in the step.
                loss = loss * labels.numel() / num_items_in_batch
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _one_document_per_row(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """(B, 2, ...) -> (2 B, ...), if examples have two documents."""
        if self.config.n_inputs == 1 or x is None:
            return x
        if x.ndim < 3 or x.shape[1] != 2:
            raise ValueError(f"an input has shape {tuple(x.shape)}: n_inputs=2 needs (B, 2, ...)")
        return x.flatten(0, 1)


AutoModel.register(WaveletGPTConfig, WaveletGPTModel, exist_ok=True)
AutoModelForCausalLM.register(WaveletGPTConfig, WaveletGPTForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(WaveletGPTConfig, WaveletGPTForSequenceClassification, exist_ok=True)

__all__ = [
    "WaveletGPTForCausalLM",
    "WaveletGPTForSequenceClassification",
    "WaveletGPTModel",
    "WaveletGPTPreTrainedModel",
]
