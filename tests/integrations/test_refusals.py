"""What `add_mixing` refuses, each in one clear line, with the model left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    LlamaForCausalLM,
    StaticCache,
)

from tests.integrations.tiny_models import (
    BASE,
    EXPERTS,
    REFUSED,
    VOCAB,
    close,
    mixed,
    mixers,
    stock,
    tokens,
)
from waveletgpt import add_mixing
from waveletgpt.errors import UserError


@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_layers_get_no_keywords(name: str) -> None:
    model = stock(name)
    kind = type(model)
    with pytest.raises(UserError, match="gives its decoder layers no keyword arguments"):
        add_mixing(model)
    assert type(model) is kind
    assert model(tokens(1, 5)).logits.isfinite().all()


SETTINGS_WRONG = {
    "mixing": ({"mixing": "ema"}, "mixing='ema' is unknown; use one of"),
    "window": ({"max_window": 6}, "max_window=6 is not a power of two"),
    "windows": ({"max_window": 2, "min_window": 4}, "max_window=2 is smaller than min_window=4"),
    "layers": ({"layers": [0, 3]}, r"layers=\[0, 3\]: give \"all\" or numbers of blocks from 0 to 2"),
    "word": ({"layers": "first"}, "layers='first': give"),
    "pretrained": ({"pretrained": True}, "pretrained=True is unknown"),
    "edge": ({"mix_edge": "none"}, "edge='none' is unknown"),
    "site": ({"mix_placement": "block+key"}, "mix_placement='block\\+key': .* at one or several, joined with"),
    "no site": ({"mix_placement": []}, r"mix_placement=\[\]: .* at one or several"),
    "start": ({"mix_start": "zero", "mixing": "learnable"}, "start='zero' is unknown"),
    "start of means": ({"mix_start": "haar"}, "mix_start='haar' is for mixing=\"learnable\", not 'fixed'"),
    "fraction": ({"mix_fraction": 2.0}, "mix_fraction=2.0 must be"),
}


@pytest.mark.parametrize(("settings", "message"), SETTINGS_WRONG.values(), ids=SETTINGS_WRONG)
def test_settings(settings: dict[str, Any], message: str) -> None:
    model = stock("llama")
    with pytest.raises(UserError, match=message) as error:
        add_mixing(model, **settings)
    assert "\n" not in str(error.value)
    assert type(model) is LlamaForCausalLM
    assert not mixers(model)


def test_a_feed_forward_that_is_no_module() -> None:
    model = stock("opt")
    with pytest.raises(UserError, match=r'OPTDecoderLayer has no module mlp or .*: give mix_placement="block"'):
        add_mixing(model, mix_placement="input")
    assert not mixers(model)


def test_models_that_are_none_of_these() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import (
        CLIPVisionConfig,
        LlamaForSequenceClassification,
        LlavaConfig,
        LlavaForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )

    from tests.tiny import tiny_model

    with pytest.raises(UserError, match="WaveletLlamaForCausalLM has mixing already"):
        add_mixing(mixed("llama"))
    with pytest.raises(UserError, match="WaveletGPTForCausalLM has mixing of its own"):
        add_mixing(tiny_model())
    small = T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="T5ForConditionalGeneration is an encoder-decoder or composite model"):
        add_mixing(T5ForConditionalGeneration(small))
    with pytest.raises(UserError, match="LlamaForSequenceClassification is not the class that AutoModelForC"):
        add_mixing(LlamaForSequenceClassification(stock("llama").config))
    with pytest.raises(UserError, match="before PEFT or DDP wraps it"):
        add_mixing(get_peft_model(stock("llama"), LoraConfig(task_type="CAUSAL_LM")))
    adapted = stock("llama")
    adapted.add_adapter(LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="LlamaForCausalLM has a PEFT adapter already: add mixing first"):
        add_mixing(adapted)
    pictures = LlavaConfig(text_config=stock("llama").config.to_dict(), vision_config=CLIPVisionConfig().to_dict())
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=r"LlavaForConditionalGeneration is an .* composite model"),
    ):
        add_mixing(LlavaForConditionalGeneration(pictures))
    with pytest.raises(UserError, match="model is a Linear"):
        add_mixing(torch.nn.Linear(2, 2))


def test_a_model_that_unsloth_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """It puts functions of its own into the classes of transformers."""

    def fast_forward(*args: Any, **kwargs: Any) -> None: ...

    model = stock("llama")
    for module in ("unsloth.models.llama", "unsloth_compiled_module_llama"):
        fast_forward.__module__ = module
        monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", fast_forward)
        with pytest.raises(UserError, match=r"LlamaForCausalLM is patched by unsloth, .*: load it with transformers"):
            add_mixing(model)
    assert type(model) is LlamaForCausalLM


@torch.no_grad()
def test_parts_of_a_sequence_in_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Context parallelism of torch (and accelerate), and Ulysses of DeepSpeed, which registers its attention."""
    import torch.distributed as dist
    from torch.distributed.tensor.experimental import context_parallel
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, x = mixed("llama"), tokens(1, 8)
    expected = model(x).logits
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        with context_parallel(mesh, buffers=[x], buffer_seq_dims=[1]), pytest.raises(UserError, match=PARALLEL):
            model(x)
    finally:
        dist.destroy_process_group()
    close(model(x).logits, expected)

    def wrapper(*args: Any, **kwargs: Any) -> None: ...

    wrapper.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", wrapper)
    with pytest.raises(UserError, match=PARALLEL):
        model(x)


PARALLEL = r"context and sequence parallelism give each process a part of the sequence, .*: use data parallelism"


@torch.no_grad()
def test_inputs_that_do_not_say_enough() -> None:
    model, x = mixed("llama"), tokens(1, 9)
    made = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    with pytest.raises(UserError, match="doesn't say which tokens are padding: give the 2-D one"):
        model(x, attention_mask=made)
    model(x, attention_mask=made, wavelet_padding=None)
    with pytest.raises(RuntimeError, match="LlamaDecoderLayer was called outside its model's forward pass"):
        model.model.layers[0](torch.randn(1, 9, 32, dtype=torch.float64))
    for attention in ("paged|sdpa", "vllm", "sglang"):
        model.config._attn_implementation = attention
        with pytest.raises(UserError, match="has a cache of its own, which keeps no mixing states"):
            model(x)


@torch.no_grad()
def test_caches_that_do_not_fit() -> None:
    model, plain, x = mixed("llama"), stock("llama"), tokens(1, 9)
    filled = plain(x).past_key_values
    with pytest.raises(UserError, match="holds tokens but no mixing states"):
        model(x, past_key_values=filled)
    cache = model(x).past_key_values
    with pytest.raises(UserError, match=r"can't take back 4 tokens: call cache.activate_past_recording\(\)"):
        cache.crop(-4)
    with pytest.raises(UserError, match="give how many tokens to remove as a negative number, at most 9"):
        cache.crop(4)
    static = StaticCache(config=model.config, max_cache_len=16)
    model(x, past_key_values=static)
    with pytest.raises(UserError, match="StaticLayer cannot take tokens back: use a DynamicCache"):
        static.crop(-1)
    both = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    with pytest.raises(UserError, match="past_key_values is a EncoderDecoderCache: mixing needs a DynamicCache"):
        model(x, past_key_values=both)


@torch.no_grad()
def test_a_cache_without_a_place_for_each_block() -> None:
    """MiniMax keeps the states of its linear attention in a cache of its own; without one mixing works."""
    config = AutoConfig.for_model(
        "minimax", **BASE, **EXPERTS, head_dim=8, layer_types=["full_attention"] * 2 + ["linear_attention"]
    )
    model, x = add_mixing(AutoModelForCausalLM.from_config(config).eval()), tokens(1, 9)
    assert model(x, use_cache=False).logits.isfinite().all()
    with pytest.raises(UserError, match=r"a MiniMaxCache, has no entry for block 2 .*: use this model with use_cache="):
        model(x)


@torch.no_grad()
def test_layers_with_several_residual_streams() -> None:
    config = AutoConfig.for_model(
        "deepseek_v4", **BASE | {"num_hidden_layers": 2}, head_dim=8, moe_intermediate_size=16, q_lora_rank=16,
        n_routed_experts=4, num_experts_per_tok=2, qk_rope_head_dim=4,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
    )  # fmt: skip
    model = add_mixing(AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(UserError, match=r"has hidden states of shape \(1, 9, 4, 32\), not .*: mixing can't be added"):
        model(tokens(1, 9))
