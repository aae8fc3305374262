"""Filters at sites: what each recipe of the literature computes, against its formula; decoding at every site.

Shapes: B batch, T tokens, H heads, D channels of a head, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import rotate_half

from tests.tiny import tiny_config, tiny_model, tokens
from waveletgpt import WaveletGPTConfig, WaveletGPTForCausalLM
from waveletgpt.model.configuration import SITES
from waveletgpt.model.mixing import MIXERS, Mixer, starting_taps
from waveletgpt.recipes import load_recipe
from waveletgpt.training.recipe import Recipe

HEADS = {"query": 4, "key": 2, "value": 2}


def of_recipe(name: str) -> WaveletGPTForCausalLM:
    """A tiny Llama of a recipe's settings, whose filters have random weights."""
    recipe = Recipe().override({"architecture": "llama", **load_recipe(name)}, name)
    sizes = {
        "vocab_size": 31,
        "n_positions": 32,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_inner": 32,
    }
    torch.manual_seed(0)
    model = WaveletGPTForCausalLM(WaveletGPTConfig(**{**recipe.changes(), **sizes})).eval()
    with torch.no_grad():
        for mixer in mixers(model):
            for parameter in mixer.parameters():
                parameter.normal_()
    return model


def mixers(model: WaveletGPTForCausalLM) -> list[Mixer]:
    return [module for module in model.modules() if isinstance(module, Mixer)]


def depthwise(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """x (B, T, C), taps (C, w) with tap 0 on the newest -> (B, T, C): torch's own convolution."""
    C, w = taps.shape
    return F.conv1d(F.pad(x.mT, (w - 1, 0)), taps.flip(1)[:, None], groups=C).mT


def residual_convolution(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    return x + depthwise(x, mixer.kernel)


def convolution(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    return depthwise(x, mixer.kernel)


def token_shift(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    """m x_t + (1 - m) x_{t-1}, with one number a channel."""
    [other] = mixer.kernel.T
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    return (1 - other) * x + other * before


def mix_of_two_by_head(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    """a k_t + b k_{t-1} with two numbers a head; channel c of head h is x[c H + h]."""
    B, T, C = x.shape
    H = len(mixer.kernel)
    k = x.view(B, T, C // H, H)
    before = torch.cat([torch.zeros_like(k[:, :1]), k[:, :-1]], 1)
    return (mixer.kernel[:, 0] * k + mixer.kernel[:, 1] * before).view(B, T, C)


def smear(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out[:, 1:] += (mixer.scale * torch.sigmoid(x[:, 1:, : len(mixer.gate)] @ mixer.gate))[..., None] * x[:, :-1]
    return out


def previous_for_half(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    """Of each head's 4 channels the first 2 are those of the token before."""
    H = x.shape[2] // 4
    k = x.unflatten(2, (4, H)).clone()
    k[:, 1:, :2], k[:, 0, :2] = k[:, :-1, :2].clone(), 0
    return k.flatten(2)


def taps_of_the_token(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    (B, T, C), G = x.shape, mixer.sets
    taps = (x @ mixer.weight.mT).view(B, T, G, 4) + mixer.bias
    out = x.clone()
    for t in range(T):
        for j in range(min(4, t + 1)):
            out[:, t] += (taps[:, t, :, j].repeat(1, C // G)) * x[:, t - j]
    return out


@pytest.mark.parametrize(
    ("name", "sites", "formula"),
    [
        ("canon-a", "attention_input", residual_convolution),
        ("canon-b", "query key value", residual_convolution),
        ("canon-ac", "attention_input mlp_input", residual_convolution),
        ("canon-abcd", "attention_input query key value mlp_input mlp_hidden", residual_convolution),
        ("primer", "query key value", convolution),
        ("sconv", "key value attention_output mlp_output", residual_convolution),
        ("kv-shifting", "key value", mix_of_two_by_head),
        ("token-shift", "attention_input mlp_input", token_shift),
        ("partial-key-offset", "key", previous_for_half),
        ("dynamic-convolution", "query key value", taps_of_the_token),
    ],
)
def test_a_recipe_is_its_sources_formula(name: str, sites: str, formula: Callable) -> None:
    model = of_recipe(name)
    for block in model.model.blocks:
        assert block.mixers.sites == tuple(sites.split())
        for site, mixer in zip(block.mixers.sites, block.mixers, strict=True):
            width = 64 if site == "mlp_hidden" else 16
            shape = (2, 9, HEADS[site], 4) if site in HEADS else (2, 9, width)
            x = torch.randn(shape)
            flat = x.transpose(2, 3).flatten(2) if x.ndim == 4 else x
            expected = formula(mixer, flat)
            if x.ndim == 4:
                expected = expected.unflatten(2, (4, -1)).transpose(2, 3)
            torch.testing.assert_close(mixer(x), expected, atol=1e-5, rtol=1e-5)


def test_smear_is_its_sources_formula() -> None:
    model = of_recipe("smear")
    assert [len(block.mixers) for block in model.model.blocks] == [0, 0]
    [mixer], x = model.model.mixers, torch.randn(2, 9, 16)
    torch.testing.assert_close(mixer(x), smear(mixer, x))


def test_primer_has_three_taps_and_its_start() -> None:
    torch.testing.assert_close(starting_taps("recent", 2, 3), torch.tensor([[1 / 2, 1 / 6, 1 / 6]] * 2))
    model = of_recipe("primer")
    assert {mixer.kernel.shape[-1] for mixer in mixers(model)} == {3}  # type: ignore[union-attr]


def test_starts_are_what_they_are_called() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert starting_taps("haar", 3, 4).tolist() == [[0.25] * 4, [0.25] * 4, [0.25, 0.25, -0.25, -0.25]]
    assert starting_taps("mean", 1, 2).tolist() == [[0.5, 0.5]]
    assert not starting_taps("zero", 2, 4).any()
    convex = starting_taps("convex", 1000, 2)
    torch.testing.assert_close(convex.sum(1), torch.ones(1000))
    assert convex.min() >= 0
    assert 0.27 < convex[:, 0].std() < 0.31  # a uniform number's: 0.289
    uniform = starting_taps("uniform", 1000, 4)
    assert 0.45 < uniform.abs().max() <= 0.5
    # What else a model draws does not depend on the start of its taps.
    assert torch.equal(state, torch.get_rng_state())


def test_other_starts_leave_the_other_weights_as_they_are() -> None:
    settings = {"mixing": "conv", "mix_placement": "query+attention_input+mlp_input"}
    weights = []
    for start in ("zero", "uniform"):
        torch.manual_seed(1)
        weights.append(WaveletGPTForCausalLM(tiny_config(mix_start=start, **settings)).state_dict())
    plain = [name for name in weights[0] if "mixers" not in name]
    assert plain
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in plain)
    kernels = [weights[1][name] for name in weights[1] if name.endswith("kernel")]
    assert len({float(kernel.sum()) for kernel in kernels}) == len(kernels)  # no two alike


def test_taps_that_sum_to_one_start_as_asked_and_stay_so() -> None:
    for sharing in ("coordinate", "head", "level"):
        models = []
        for unit_sum in (False, True):
            config = tiny_config(
                mixing="conv", mix_placement="key", mix_start="convex", mix_sharing=sharing, mix_residual=False,
                mix_unit_sum=unit_sum,
            )  # fmt: skip
            torch.manual_seed(1)
            models.append(WaveletGPTForCausalLM(config))
        free, bound = models
        for one, other in zip(mixers(free), mixers(bound), strict=True):
            # The random start has that sum already.
            torch.testing.assert_close(one.weights(), other.weights())  # type: ignore[operator]
        optimizer = torch.optim.SGD(bound.parameters(), lr=1.0)
        bound(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        for one, other in zip(mixers(free), mixers(bound), strict=True):
            [start], [now] = one.weights(), other.weights()  # type: ignore[operator]
            assert (now - start).abs().max() > 1e-6
            torch.testing.assert_close(now.sum(1), torch.ones(len(now)))


def test_the_squared_relu_is_primers() -> None:
    model = tiny_model(activation_function="relu2")
    feed_forward, x = model.model.blocks[0].feed_forward, torch.randn(2, 3, 16)
    torch.testing.assert_close(feed_forward(x), feed_forward.out_proj(feed_forward.up_proj(x).clamp(min=0) ** 2))


def test_rotary_positions_turn_the_last_channels_only() -> None:
    model = of_recipe("partial-key-offset")
    attention, seen = model.model.blocks[0].attention, []
    cache = DynamicCache(config=model.config)
    hook = attention.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(tokens(2, 9), past_key_values=cache)
        hook.remove()
        hidden, _, (cos, sin) = seen[0][:3]
        qkv = attention.qkv_proj(hidden).view(2, 9, 8, 4)
    key = qkv[:, :, 4:6].transpose(1, 2)  # (B, H, T, D)
    still = torch.cat([torch.zeros_like(key[:, :, :1, :2]), key[:, :, :-1, :2]], 2)
    turned = key[..., 2:] * cos[:, None] + rotate_half(key[..., 2:]) * sin[:, None]
    assert cos.shape[-1] == 2
    torch.testing.assert_close(cache.layers[0].keys, torch.cat([still, turned], -1))


@pytest.mark.parametrize("mixing", list(MIXERS))
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_filtered_heads_go_through_fused_attention(mixing: str, architecture: str) -> None:
    """Which wants a head's channels side by side in memory, and of which torch otherwise takes a slow way, unasked."""
    model = tiny_model(
        mixing=mixing, mix_placement="query+key+value", architecture=architecture, attn_implementation="sdpa"
    )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(tokens()).logits.sum().backward()


@pytest.mark.parametrize("mixing", list(MIXERS))
def test_decoding_with_the_cache_is_recomputing_at_every_site(mixing: str) -> None:
    # All sites at once: a wrong one would show.
    extra = {"mix_row": 5} if mixing == "bands" else {}
    model = tiny_model(
        mixing=mixing, mix_placement="+".join(SITES), architecture="llama", n_kv_head=2, max_window=8,
        rope_fraction=0.5, **extra,
    )  # fmt: skip
    with torch.no_grad():
        for mixer in mixers(model):
            for parameter in mixer.parameters():
                parameter.normal_(std=0.3)
        ids = tokens(2, 20)
        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 1, 1, 1, 1, 5, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("mixing", ["fixed", "conv", "bands", "ema"])
def test_tokens_can_be_taken_back_at_every_site(mixing: str) -> None:
    model, ids = tiny_model(mixing=mixing, mix_placement="embedding+key+mlp_output", max_window=4), tokens(2, 14)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
        cache.activate_past_recording()
        model(tokens(2, 3), past_key_values=cache)
        for layer in cache.layers:
            layer.crop(-3)
        rest = model(ids[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 8:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_padding_does_not_leak_at_any_site(site: str) -> None:
    model, ids = tiny_model(mixing="fixed", mix_placement=site, max_window=8), tokens(1, 9)
    padded = torch.cat([tokens(1, 3), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 9])
    with torch.no_grad():
        out = model(padded, attention_mask=mask).logits[:, 3:]
        torch.testing.assert_close(out, model(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("placement", ["block", "input", "attention_input,mlp_input", ["mlp_input", "attention_input"]])
def test_placements_have_several_spellings(placement: str | list[str]) -> None:
    sites = tiny_config(mix_placement=placement).sites
    assert sites == (("block",) if placement == "block" else ("attention_input", "mlp_input"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix_placement": "keys"}, "mix_placement='keys' names no site: give one or several, joined with"),
        ({"mix_placement": "key", "mix_fraction": 0.1}, "mix_fraction=0.1 selects no channel at the site 'key'"),
        ({"mix_start": "big"}, "mix_start='big' is unknown; use one of mean, haar"),
        ({"mix_start": "haar", "mix_sharing": "level"}, 'needs mix_sharing="coordinate"'),
        ({"mix_kernel_size": 0}, "mix_kernel_size=0 must be at least 1"),
        ({"mix_kernel_size": 1, "mix_unit_sum": True}, "mix_unit_sum leaves nothing to learn of one tap"),
        ({"activation_function": "swish3"}, "activation_function='swish3' is unknown; use one of"),
        ({"rope_fraction": 1.5}, "rope_fraction=1.5 must be from 0 to 1"),
        ({"rope_fraction": 0.25, "architecture": "llama"}, "even n_embd / n_head, got 16 / 4 with rope_fraction=0.25"),
    ],
)
def test_bad_settings_of_sites_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(mixing="learnable", **settings)


@pytest.mark.parametrize("mixing", ["learnable", "conv", "wavelet", "dynamic"])
def test_weights_that_are_moved_in_for_each_module_count(mixing: str) -> None:
    """`cpu_offload` keeps parameters elsewhere and brings a module's in when it is called."""
    model, ids = tiny_model(mixing=mixing, mix_placement="block+key", max_window=4), tokens()
    with torch.no_grad():
        for mixer in mixers(model):
            for parameter in mixer.parameters():
                parameter.normal_()
        expected = model(ids).logits
        offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
        assert any(parameter.is_meta for parameter in offloaded.parameters())
        torch.testing.assert_close(offloaded(ids, use_cache=False).logits, expected)
