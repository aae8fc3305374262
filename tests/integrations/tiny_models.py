"""Tiny random models of transformers, one for each architecture, and what mixing does to them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from waveletgpt import WaveletMixing, add_mixing

VOCAB = 97
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.3}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "qwen2": BASE,
    "qwen3": BASE | {"head_dim": 8},
    "mistral": BASE | {"sliding_window": 6},
    "gemma2": BASE | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": BASE
    | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "num_hidden_layers": 4}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {key: value for key, value in BASE.items() if key != "num_key_value_heads"},
    "phi": BASE,
    "phi3": BASE,
    "olmo2": BASE,
    "smollm3": BASE,
    "stablelm": BASE,
    "starcoder2": BASE | {"use_sliding_window": False},
    "qwen3_moe": BASE | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": BASE | EXPERTS,
    "granitemoe": BASE | EXPERTS,
    "gpt_oss": BASE | EXPERTS | {"head_dim": 8, "sliding_window": 6, "num_hidden_layers": 4},
    "opt": {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
    | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "gemma": BASE | {"head_dim": 8},
    "glm4": BASE | {"head_dim": 8},
    "granite": BASE,
    "cohere2": BASE,
    "olmo3": BASE,
    "qwen2_moe": BASE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "lfm2": BASE | {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
    "falcon_h1": BASE
    | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
    | {"mamba_d_state": 8, "mamba_chunk_size": 8},
    "qwen3_next": BASE
    | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    | {"shared_expert_intermediate_size": 16},
}
EAGER = {"gemma2", "gpt_oss"}  # their attention has no other way; in float64 its masks make NaN
RECURRENT = {"falcon_h1", "qwen3_next"}  # they compute in float32
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gptj": GPT2 | {"rotary_dim": 4},
    "falcon": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}
MIXINGS = ("fixed", "learnable", "delta", "gate")


def stock(name: str, seed: int = 0, dtype: torch.dtype | None = None) -> Any:
    """In evaluation mode; float64, if not given and if the architecture can."""
    config = AutoConfig.for_model(name, **{**SPECIAL, **(SETTINGS | REFUSED)[name]})
    if dtype is None:
        dtype = torch.float32 if name in EAGER | RECURRENT else torch.float64
    if hasattr(config, "num_experts_per_tok") and dtype == torch.float64:
        config._experts_implementation = "eager"  # grouped products of matrices have no float64
    torch.manual_seed(seed)
    attention = "eager" if name in {*EAGER, *REFUSED} else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def placement(name: str) -> str:
    """All sites at once: a wrong one would show. OPT's feed-forward is no module of its own."""
    return "attention_input+block" if name == "opt" else "attention_input+mlp_input+block"


def mixed(name: str, mixing: str = "fixed", mix_edge: str = "zero", **settings: Any) -> Any:
    """At all sites, with the mixers' parameters away from their start."""
    model = add_mixing(stock(name, **settings), mixing=mixing, mix_edge=mix_edge, mix_placement=placement(name))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "wavelet_mixing" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def mixers(model: Any) -> list[WaveletMixing]:
    return [module for module in model.modules() if isinstance(module, WaveletMixing)]


def tokens(batch: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-8) -> None:
    if torch.float32 in (a.dtype, b.dtype):
        tolerance = max(tolerance, 2e-4)
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, check_dtype=False)
