"""What a model costs, from its configuration and weights: parameters, FLOPs, decoding state, and mixing's share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from waveletgpt.integrations.architecture import context_of, identity
from waveletgpt.integrations.module import WaveletMixing

from .configuration import WaveletGPTConfig
from .mixer import Mixer
from .mixing import BLOCK_SITES, Mixers

if TYPE_CHECKING:
    from waveletgpt.runs.records import ModelRecord, StateBytes


def mixers_in(model: Any) -> list[nn.Module]:
    """All mixers of a model, its own or added to it."""
    return [module for module in model.modules() if isinstance(module, Mixer | WaveletMixing)]


def count_parameters(model: Any) -> tuple[int, int]:
    """(all parameters, those of mixers); tied weights count once."""
    extra = sum(p.numel() for mixer in mixers_in(model) for p in mixer.parameters())
    return sum(p.numel() for p in model.parameters()), extra


def mixers_of(config: WaveletGPTConfig) -> list[Mixer]:
    """All mixers of a model with this configuration, without memory for their weights."""
    with torch.device("meta"):
        places = [Mixers(config, BLOCK_SITES) for layer in range(config.n_layer) if config.mixes(layer)]
        return [mixer for place in (Mixers(config, ("embedding",)), *places) for mixer in place]  # type: ignore[misc]


def mixing_flops_per_token(config: WaveletGPTConfig) -> int:
    """FLOPs per token that mixing adds to a training step, forward and backward; see `Mixer.flops`.

    A model that is not causal does all of it twice.
    """
    return sum(mixer.flops() for mixer in mixers_of(config)) * (1 if config.causal else 2)


def flops_per_token(model: Any) -> int:
    """FLOPs per token of a training step (forward and backward): 6 N + 12 L E T (PaLM, arXiv 2204.02311, Appendix B)
    plus mixing. N leaves out embeddings that are only looked up, and the mixers, counted by their own rule; a
    classifier's head, used once for each example, counts as its share of a token of examples at the full context."""
    config = model.config
    head = sum(p.numel() for p in model.score.parameters()) if hasattr(model, "score") else 0
    every_token = _used_by_each_token(model) - head
    flops = 6 * every_token + 6 * head // (config.n_inputs * config.n_positions)
    if config.frame_size is not None:
        flops -= 2 * config.frame_size * config.frame_hidden  # nothing flows back into the waveform
    attention = 12 * config.n_layer * config.n_embd * config.n_positions
    result: int = flops + attention + mixing_flops_per_token(config)
    return result


def _used_by_each_token(model: Any) -> int:
    """Parameters but those of embeddings that are only looked up, and of mixers."""
    used = {p for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    result: int = sum(p.numel() for p in used) - count_parameters(model)[1]
    return result


def decoding_state_bytes(config: WaveletGPTConfig, itemsize: int = 4) -> StateBytes:
    """Bytes per sequence that cached decoding holds at the full context: keys and values, and what mixers remember.

    A model that is not causal decodes nothing.
    """
    if not config.causal:
        return {"keys_values": 0, "mixing": 0}
    keys_values = 2 * config.n_layer * config.n_kv_head * config.head_dim * config.n_positions
    mixing = sum(mixer.state_bytes(itemsize) for mixer in mixers_of(config))
    return {"keys_values": keys_values * itemsize, "mixing": mixing}


def describe(model: Any) -> ModelRecord:
    """The `model` part of run.json."""
    config = model.config
    if not isinstance(config, WaveletGPTConfig):
        return describe_other(model)
    parameters, extra = count_parameters(model)
    return {
        "parameters": parameters,
        "extra_parameters": extra,
        "flops_per_token": flops_per_token(model),
        "mixing_flops_per_token": mixing_flops_per_token(config),
        "windows": config.mix_windows(),
        "mix_width": config.site_shape(config.sites[0])[1] if config.sites else config.n_embd,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_positions": config.n_positions,
        "state_bytes": decoding_state_bytes(config),
    }


def describe_other(model: Any) -> ModelRecord:
    """The same of a model of transformers.

    FLOPs are 6 N + 12 L H D T (H heads of width D) plus mixing, whatever the architecture: of experts all are counted,
    and every layer as if it attended to the whole context. So are its keys and values.
    """
    config, context = model.config, context_of(model.config)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    mixers = [mixer for mixer in mixers_in(model) if isinstance(mixer, WaveletMixing)]
    parameters, extra = count_parameters(model)
    mixing = sum(mixer.flops() for mixer in mixers)
    return {
        "model_type": config.model_type,
        "identity": identity(config),
        "parameters": parameters,
        "extra_parameters": extra,
        "flops_per_token": 6 * _used_by_each_token(model) + 12 * layers * heads * head_dim * context + mixing,
        "mixing_flops_per_token": mixing,
        "windows": list(mixers[0].windows) if mixers else [],
        "mix_width": config.hidden_size,
        "n_embd": config.hidden_size,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": context,
        "state_bytes": {
            "keys_values": 2 * layers * kv_heads * head_dim * context * 4,
            "mixing": sum(mixer.state_bytes(4) for mixer in mixers),
        },
    }
