"""What a model costs, from its configuration and weights: parameters, FLOPs, decoding state, and mixing's share."""

from __future__ import annotations

from typing import Any

from .configuration import WaveletGPTConfig
from .mixing import Mixer


def count_parameters(model: Any) -> tuple[int, int]:
    """(all parameters, those of mixers); tied weights count once."""
    extra = sum(p.numel() for module in model.modules() if isinstance(module, Mixer) for p in module.parameters())
    return sum(p.numel() for p in model.parameters()), extra


def mixing_flops_per_token(config: WaveletGPTConfig) -> int:
    """FLOPs per token that mixing adds to a training step, forward and backward.

    A mean over w = 2^k takes k additions (the dyadic recurrence) and one scaling, and its gradient the same. A learned
    kernel takes w multiply-adds forward, and as many for each of its two gradients. EMA counts as 3 operations.
    """
    windows = config.mix_windows()
    if config.mixing == "fixed":
        once = sum((w.bit_length() - 1) + 1 for w in windows) * 2
    elif config.mixing in ("learnable", "conv"):
        once = sum(2 * w for w in windows) * 3
    elif config.mixing == "ema":
        once = 3 * config.n_mixed * 2
    else:
        once = 0
    places = 2 if config.mix_placement == "input" else 1
    return once * places * sum(config.mixes(layer) for layer in range(config.n_layer))


def flops_per_token(config: WaveletGPTConfig, parameters: int, extra_parameters: int = 0) -> int:
    """FLOPs per token of a training step (forward and backward): 6 N + 12 L E T (PaLM, arXiv 2204.02311, Appendix B)
    plus mixing. N leaves out embeddings that are only looked up (positions; tokens unless tied to the head), and the
    mixers, counted by their own rule."""
    positions = config.n_positions if config.position_embedding == "learned" else 0
    tokens = 0 if config.tie_word_embeddings else config.vocab_size
    matrices = parameters - extra_parameters - (positions + tokens) * config.n_embd
    attention = 12 * config.n_layer * config.n_embd * config.n_positions
    return 6 * matrices + attention + mixing_flops_per_token(config)


def decoding_state_bytes(config: WaveletGPTConfig, itemsize: int = 4) -> dict[str, int]:
    """Bytes per sequence that cached decoding holds at the full context: keys and values, and what mixers remember."""
    keys_values = 2 * config.n_layer * config.n_kv_head * config.head_dim * config.n_positions
    remembered = max(1, max(config.mix_windows(), default=1) - 1) * config.n_mixed * config.number_of_conv_states
    mixing = sum(config.mixes(layer) for layer in range(config.n_layer)) * remembered
    return {"keys_values": keys_values * itemsize, "mixing": mixing * itemsize}


def describe(model: Any) -> dict[str, Any]:
    """The `model` part of run.json."""
    config = model.config
    parameters, extra = count_parameters(model)
    return {
        "parameters": parameters,
        "extra_parameters": extra,
        "flops_per_token": flops_per_token(config, parameters, extra),
        "mixing_flops_per_token": mixing_flops_per_token(config),
        "windows": config.mix_windows(),
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_positions": config.n_positions,
        "state_bytes": decoding_state_bytes(config),
    }
