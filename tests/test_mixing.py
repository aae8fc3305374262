"""Mixers against NumPy in float64, alone and inside the model; chunks with a cache; padding.

Shapes: B batch, T tokens, E embedding, C mixed coordinates.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_model, tokens
from transformers import DynamicCache

from waveletgpt import WaveletGPTForCausalLM
from waveletgpt.mixing import MIXERS, Clock, Layout, LearnableMean, Mixer

PEERS = ["ema", "conv", "shift"]


def oracle(mixer: Mixer, kind: str, x: np.ndarray, edge: str = "zero") -> np.ndarray:
    """What `mixer` should make of x (B, T, C): sums written out, in float64."""
    T, C = x.shape[1:]
    y = np.zeros_like(x)
    if kind == "shift":
        y[:, 1:] = x[:, :-1]
        return y
    if kind == "ema":
        a = np.arange(1, C + 1) / (C + 1)
        for t in range(T):
            y[:, t] = sum((1 - a) * a**j * x[:, t - j] for j in range(t + 1))
        return y
    taps = [np.full(w, 1 / w) for w in mixer.windows]
    if kind == "conv":
        taps = list(mixer.kernel.detach().double().numpy())
    if kind == "learnable":
        left = dict(zip(sorted(set(mixer.windows)), [k.detach().double().numpy() for k in mixer.kernels], strict=True))
        taps, used = [], dict.fromkeys(left, 0)
        for w in mixer.windows:
            taps.append(left[w] if left[w].ndim == 1 else left[w][used[w]])
            used[w] += 1
    for c in range(C):
        for t in range(T):
            y[:, t, c] = sum(taps[c][j] * x[:, t - j, c] for j in range(min(len(taps[c]), t + 1)))
            if edge == "partial" and kind in ("fixed", "learnable"):
                y[:, t, c] *= len(taps[c]) / min(len(taps[c]), t + 1)
    return x + y if kind == "conv" else y


def make_mixer(kind: str, **changes: object) -> Mixer:
    mixer = MIXERS[kind](tiny_config(mixing=kind, max_window=8, **changes))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize("edge", ["zero", "partial"])
@pytest.mark.parametrize("kind", list(MIXERS))
def test_mixer_equals_its_sum_and_leaves_the_rest_alone(kind: str, edge: str) -> None:
    for changes in ({}, {"mix_fraction": 1.0}, {"mix_fraction": 0.2, "mix_sharing": "level"}):
        mixer = make_mixer(kind, mix_edge=edge, **changes)
        hidden = torch.randn(2, 11, 16)
        out = mixer(hidden, seen=torch.arange(1, 12)[None])
        C = mixer.n_mixed
        np.testing.assert_allclose(
            out[..., :C].detach(), oracle(mixer, kind, hidden[..., :C].double().numpy(), edge), atol=1e-6
        )
        assert torch.equal(out[..., C:], hidden[..., C:])


@given(
    kind=st.sampled_from(list(MIXERS)),
    edge=st.sampled_from(["zero", "partial"]),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_chunks_with_a_cache_are_the_whole(kind: str, edge: str, chunks: list[int]) -> None:
    mixer = make_mixer(kind, mix_edge=edge)
    whole = torch.randn(2, sum(chunks), 16)
    seen = torch.arange(1, sum(chunks) + 1)[None]
    cache = DynamicCache(config=tiny_config(mixing=kind)).layers[0]
    parts, past = [], 0
    for x, s in zip(whole.split(chunks, 1), seen.split(chunks, 1), strict=True):
        clock = Clock(Layout(mixer.windows, x.device), past, x.shape[1], x.shape[0]) if mixer.windows else None
        parts.append(mixer(x, s, cache=cache, clock=clock))
        past += x.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), mixer(whole, seen), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", list(MIXERS))
def test_padding_in_front_changes_nothing(kind: str) -> None:
    mixer = make_mixer(kind, mix_edge="partial")
    x = torch.randn(1, 9, 16)
    mask = torch.tensor([[0, 0, 0] + [1] * 9])
    padded = mixer(torch.cat([torch.full((1, 3, 16), 1e3), x], 1), (mask.cumsum(-1)).clamp(min=1), mask)
    torch.testing.assert_close(padded[:, 3:], mixer(x, torch.arange(1, 10)[None]), atol=1e-6, rtol=1e-5)


def test_ema_decays_are_spread_evenly_within_0_and_1() -> None:
    decay = make_mixer("ema", mix_fraction=1.0).decay()
    assert decay[0] > 0
    assert decay[-1] < 1
    torch.testing.assert_close(decay.diff(), torch.full((15,), 1 / 17))


@pytest.mark.parametrize("kind", PEERS)
def test_the_edge_rule_is_for_means(kind: str) -> None:
    hidden = torch.randn(1, 6, 16)
    torch.manual_seed(0)
    zero = make_mixer(kind, mix_edge="zero")
    torch.manual_seed(0)
    partial = make_mixer(kind, mix_edge="partial")
    assert torch.equal(zero(hidden, torch.arange(1, 7)[None]), partial(hidden, torch.arange(1, 7)[None]))


@pytest.mark.parametrize("sharing", ["coordinate", "level"])
def test_learnable_starts_as_the_mean_and_learns_every_tap(sharing: str) -> None:
    config = tiny_config(mixing="learnable", mix_sharing=sharing, max_window=8)
    mixer, mean = LearnableMean(config), MIXERS["fixed"](config)
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(mixer(x), mean(x), atol=1e-6, rtol=1e-5)
    mixer(x).square().sum().backward()
    assert all((kernel.grad != 0).all() for kernel in mixer.kernels)
    counts = {w: mixer.windows.count(w) for w in (2, 4, 8)}
    expected = [(w,) if sharing == "level" else (n, w) for w, n in counts.items()]
    assert [tuple(kernel.shape) for kernel in mixer.kernels] == expected


@pytest.mark.parametrize("kind", ["fixed", "learnable", "ema"])
def test_half_precision_is_the_rounded_result(kind: str) -> None:
    mixer = make_mixer(kind)
    x = torch.randn(2, 12, 16)
    exact = mixer(x)
    rounded = mixer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    # Inputs, kernels and result are rounded to 8 bits; sums of up to 8 terms of size about 1.
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.02)


# ---- inside the model ----


def trace(model: torch.nn.Module, ids: torch.Tensor, name: str) -> tuple[np.ndarray, np.ndarray]:
    """First input and output of the named module in a forward pass, in float64."""
    caught = []

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        caught.extend(value.detach().double().numpy() for value in (args[0], output))

    handle = model.get_submodule(name).register_forward_hook(hook)
    model(ids)
    handle.remove()
    return caught[0], caught[1]


@pytest.mark.parametrize("edge", ["zero", "partial"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_fixed_is_the_mean_of_each_blocks_output(architecture: str, edge: str) -> None:
    model = tiny_model(architecture=architecture, mixing="fixed", mix_edge=edge, n_positions=64, max_window=32)
    plain = tiny_model(architecture=architecture, mixing="none", n_positions=64)
    plain.load_state_dict(model.state_dict())
    C, ids = model.config.n_mixed, tokens(2, 40)

    # The first block sees the same input in both, so its output without mixing is what is mixed.
    unmixed, mixed = (trace(m, ids, "model.blocks.0")[1] for m in (plain, model))
    mixer = model.model.blocks[0].mixers[0]
    expected = np.concatenate([oracle(mixer, "fixed", unmixed[..., :C], edge), unmixed[..., C:]], -1)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)

    # The second one's output is mixed too, with the same windows.
    before, _ = trace(model, ids, "model.blocks.1.mixers.0")
    _, after = trace(model, ids, "model.blocks.1")
    expected = np.concatenate([oracle(mixer, "fixed", before[..., :C], edge), before[..., C:]], -1)
    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_input_placement_mixes_what_the_sublayers_read() -> None:
    model = tiny_model(mixing="fixed", mix_placement="input")
    C, ids = model.config.n_mixed, tokens()
    for norm, reader, index in (("norm_1", "attention.qkv_proj", 0), ("norm_2", "feed_forward", 1)):
        _, normed = trace(model, ids, f"model.blocks.1.{norm}")
        read, _ = trace(model, ids, f"model.blocks.1.{reader}")
        expected = oracle(model.model.blocks[1].mixers[index], "fixed", normed[..., :C])
        np.testing.assert_allclose(read[..., :C], expected, atol=1e-5)
        np.testing.assert_allclose(read[..., C:], normed[..., C:], atol=1e-6)


@pytest.mark.parametrize("placement", ["block", "input"])
def test_only_the_chosen_blocks_mix(placement: str) -> None:
    model = tiny_model(n_layer=3, mix_layers=[1], mix_placement=placement)
    assert [len(block.mixers) for block in model.model.blocks] == [0, 2 if placement == "input" else 1, 0]
    # With no block left it is the model without mixing.
    ids = tokens()
    emptied = tiny_model(mix_layers=[], mix_placement=placement)
    assert torch.equal(emptied(ids).logits, tiny_model(mixing="none")(ids).logits)


def test_learnable_and_conv_start_as_fixed_and_none() -> None:
    ids = tokens()
    for kind, same in (("learnable", "fixed"), ("conv", "none")):
        torch.manual_seed(0)
        first = WaveletGPTForCausalLM(tiny_config(mixing=kind)).eval()
        torch.manual_seed(0)
        second = WaveletGPTForCausalLM(tiny_config(mixing=same)).eval()
        torch.testing.assert_close(first(ids).logits, second(ids).logits, atol=1e-6, rtol=1e-5)
