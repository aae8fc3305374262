"""Mixers against NumPy in float64, alone and inside the model; chunks with a cache; padding.

Shapes: B batch, T tokens, E embedding, C mixed channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.registry import lookup_backend
from transformers import CompileConfig

from tests.tiny import PAD, tiny_config, tiny_model, tokens
from waveletgpt import WaveletGPTForCausalLM
from waveletgpt.model.configuration import WAVELETS, window_schedule
from waveletgpt.model.mixing import MIXERS, DynamicConvolution, LearnableMean, Mixer, Smear
from waveletgpt.model.state import State
from waveletgpt.ops import cpp, reach_of

PEERS = [kind for kind in MIXERS if kind not in ("fixed", "learnable", "wavelet")]


def taps_of_db2(length: int) -> np.ndarray:
    """Approximation filter with so many taps: PyWavelets' scaling filter, stretched and convolved with itself."""
    low, taps, stretch = np.array(pywt.Wavelet("db2").rec_lo) / math.sqrt(2), np.ones(1), 1
    while len(taps) < length:
        taps, stretch = np.convolve(taps, np.kron(low, [1] + [0] * (stretch - 1))[: 3 * stretch + 1]), 2 * stretch
    assert len(taps) == length
    return taps


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
    if kind in ("smear", "dynamic", "bands"):
        return written_out(mixer, x)
    taps = [np.full(w, 1 / w) for w in mixer.windows]
    if kind == "conv":
        taps = list(mixer.taps()[0].detach().double().numpy())
    if kind == "wavelet":
        taps = [taps_of_db2(w) for w in mixer.windows]
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


def written_out(mixer: Any, x: np.ndarray) -> np.ndarray:
    """The formulas of filters that depend on the token or have a number per level, token by token."""
    y, (B, T, C) = x.copy(), x.shape
    past = np.concatenate([np.zeros((B, 64, C)), x], 1)  # x_{t-j} is past[:, 64 + t - j]
    p = {name: value.detach().double().numpy() for name, value in mixer.named_parameters()}
    for t in range(T):
        now = x[:, t]
        before = [past[:, 64 + t - j] for j in range(64)]
        if isinstance(mixer, Smear):
            gate = 1 / (1 + np.exp(-now[:, : len(p["gate"])] @ p["gate"]))
            y[:, t] += p["scale"] * gate[:, None] * before[1]
        elif isinstance(mixer, DynamicConvolution):
            G, k = p["bias"].shape
            taps = (now @ p["weight"].T).reshape(B, G, k) + p["bias"]
            for c in range(C):
                y[:, t, c] += sum(taps[:, c % G, j] * before[j][:, c] for j in range(k))
        else:
            for level, (a, d) in enumerate(zip(p["approximation"], p["detail"], strict=True)):
                w = mixer.levels[level]
                mean, finer = (np.mean(before[:n], 0) for n in (w, w // 2))
                y[:, t] += a * mean + d * (finer - mean)
            if mixer.row_length:
                y[:, t] += p["row"] * before[mixer.row_length]
    return y


def make_mixer(kind: str, **changes: object) -> Mixer:
    mixer = MIXERS[kind](tiny_config(mixing=kind, max_window=8, **changes))
    with torch.no_grad():
        for parameter in mixer.parameters():
            # Taps of "dynamic" are sums over channels, and its results products: kept near 1, as the others' are.
            parameter.copy_(torch.randn_like(parameter) * (0.1 if kind == "dynamic" else 1.0))
    return mixer


@pytest.mark.parametrize("edge", ["zero", "partial"])
@pytest.mark.parametrize("kind", list(MIXERS))
def test_mixer_equals_its_sum_and_leaves_the_rest_alone(kind: str, edge: str) -> None:
    for changes in ({}, {"mix_fraction": 1.0}, {"mix_fraction": 0.2, "mix_sharing": "level"}):
        mixer = make_mixer(kind, mix_edge=edge, **changes)
        hidden = torch.randn(2, 11, 16)
        out = mixer(hidden)
        C = mixer.n_mixed
        np.testing.assert_allclose(
            out[..., :C].detach(), oracle(mixer, kind, hidden[..., :C].double().numpy(), edge), atol=1e-6
        )
        assert torch.equal(out[..., C:], hidden[..., C:])


def in_parts(mixer: Mixer, parts: Iterable[torch.Tensor], state: State) -> torch.Tensor:
    """`parts` (B, any, E) one after the other, on what is in the state."""
    return torch.cat([mixer(x, state=state) for x in parts], 1)


def state_for(mixer: Mixer, **settings: bool) -> State:
    return State(mixer.past, mixer.edge == "partial", **settings)


@given(
    kind=st.sampled_from(list(MIXERS)),
    edge=st.sampled_from(["zero", "partial"]),
    # Single tokens, and many of them, are what decoding is made of.
    chunks=st.lists(st.one_of(st.just(1), st.integers(1, 9)), min_size=1, max_size=25),
    learning=st.booleans(),
    static=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_chunks_with_a_state_are_the_whole(
    kind: str, edge: str, chunks: list[int], learning: bool, static: bool
) -> None:
    mixer = make_mixer(kind, mix_edge=edge)
    whole = torch.randn(2, sum(chunks), 16)
    with torch.set_grad_enabled(learning and not static):
        parts = in_parts(mixer, whole.split(chunks, 1), state_for(mixer, static=static))
    torch.testing.assert_close(parts, mixer(whole), atol=1e-6, rtol=1e-5)


@given(
    kind=st.sampled_from(list(MIXERS)),
    edge=st.sampled_from(["zero", "partial"]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    padding=st.integers(0, 5),
    chunk=st.integers(1, 30),
    fraction=st.sampled_from([0.5, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_documents_in_a_row_are_each_alone(
    kind: str, edge: str, lengths: list[int], padding: int, chunk: int, fraction: float
) -> None:
    """Packed, padded in front, whole or in chunks; and nothing flows back to another document, nor does a NaN."""
    mixer = make_mixer(kind, mix_edge=edge, mix_fraction=fraction, **({"mix_row": 5} if kind == "bands" else {}))
    documents = [torch.randn(1, length, 16) for length in lengths]
    row = torch.cat([torch.full((1, padding, 16), 7.0), *documents], 1).requires_grad_()
    numbers = torch.tensor([[0] * padding + [i + 1 for i, length in enumerate(lengths) for _ in range(length)]])
    reach, expected = reach_of(row.shape[1], mask=numbers), torch.cat([mixer(one) for one in documents], 1)
    whole = mixer(row, reach)
    torch.testing.assert_close(whole[:, padding:], expected, atol=1e-5, rtol=1e-5)
    state, parts = state_for(mixer), []
    for first in range(0, row.shape[1], chunk):
        parts.append(mixer(row[:, first : first + chunk], reach[:, first : first + chunk], state))
    torch.testing.assert_close(torch.cat(parts, 1)[:, padding:], expected, atol=1e-5, rtol=1e-5)
    last = numbers == len(lengths)
    (gradient,) = torch.autograd.grad(whole[last].sum(), row)
    assert torch.equal(gradient[~last], torch.zeros_like(gradient[~last]))
    spoilt = torch.where(last[..., None], row, float("nan"))
    torch.testing.assert_close(mixer(spoilt, reach)[last], whole[last], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list(MIXERS))
def test_both_directions_stay_within_a_document(kind: str) -> None:
    mixer, x = make_mixer(kind, causal=False, mix_edge="partial"), torch.randn(1, 12, 16)
    numbers = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3])
    found = mixer(x, reach_of(12, mask=numbers))
    for part in (slice(0, 5), slice(5, 9)):
        torch.testing.assert_close(found[:, part], mixer(x[:, part]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list(MIXERS))
def test_gradients_flow_through_a_state(kind: str) -> None:
    mixer, whole = make_mixer(kind), torch.randn(2, 12, 16)
    weights = torch.randn(2, 12, 16)

    def gradients(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        x = whole.clone().requires_grad_()
        return list(torch.autograd.grad((run(x) * weights).sum(), [x, *mixer.parameters()]))

    expected = gradients(mixer)
    for gradient, other in zip(
        gradients(lambda x: in_parts(mixer, x.split([4, 1, 1, 3, 1, 1, 1], 1), state_for(mixer))), expected, strict=True
    ):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list(MIXERS))
@torch.no_grad()
def test_tokens_can_be_taken_back(kind: str) -> None:
    mixer = make_mixer(kind, mix_edge="partial")
    state = state_for(mixer)
    whole, wrong = torch.randn(2, 30, 16), torch.randn(2, 30, 16)
    in_parts(mixer, whole[:, :9].split([5, 1, 1, 1, 1], 1), state)
    # Speculation: 4 tokens of which 2 were right, twice; then plain decoding again.
    state.recording = True
    for past in (9, 11):
        in_parts(mixer, [torch.cat([whole[:, past : past + 2], wrong[:, :2]], 1)], state)
        state.crop(2)
    parts = in_parts(mixer, whole[:, 13:].split([1, 1, 1, 4, *[1] * 10], 1), state)
    torch.testing.assert_close(parts, mixer(whole)[:, 13:], atol=1e-6, rtol=1e-5)
    # And the state can be used again.
    state.reset()
    parts = in_parts(mixer, wrong.split([3, 1, 1, 20, 1, 1, 3], 1), state)
    torch.testing.assert_close(parts, mixer(wrong), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_rounding_does_not_add_up() -> None:
    mixer = make_mixer("fixed")
    whole = torch.randn(1, 3000, 16)
    whole[:, 5] *= 1e6  # as large as a first token's values get
    parts = in_parts(mixer, whole.split([4, *[1] * 2996], 1), state_for(mixer))
    torch.testing.assert_close(parts[:, 20:], mixer(whole)[:, 20:], atol=1e-6, rtol=1e-6)


@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    needed=st.integers(1, 30),
    static=st.booleans(),
    learning=st.booleans(),
)
@settings(deadline=None)
def test_a_state_holds_the_last_inputs_in_order(chunks: list[int], needed: int, static: bool, learning: bool) -> None:
    state, whole = State(needed, static=static), torch.randn(2, sum(chunks), 3)
    with torch.set_grad_enabled(learning):
        for i, part in enumerate(whole.split(chunks, 1)):
            state.append(part)
            seen = whole[:, : sum(chunks[: i + 1])]
            kept = seen[:, -needed:]
            zeros = torch.zeros(2, needed - kept.shape[1] if static else 0, 3)
            assert torch.equal(state.last(), torch.cat([zeros, kept], 1))


@pytest.mark.parametrize("name", WAVELETS)
def test_wavelet_coefficients_are_those_of_pywavelets(name: str) -> None:
    config = tiny_config(mixing="wavelet", mix_wavelet=name, mix_band="both", mix_fraction=1.0, max_window=8)
    mixer = MIXERS["wavelet"](config).double()
    # One period of a periodic signal, late enough that all taps are over it; channels: 16, of 3 scales.
    period = np.random.default_rng(0).normal(size=128)
    x = torch.tensor(np.tile(period, 3))[None, :, None].expand(1, -1, 16)
    y = mixer(x)[0, -128:].numpy()
    # PyWavelets' filters delay most. Backwards in time they are ours; when a coefficient comes is a convention.
    coefficients = pywt.swt(period[::-1], name, level=3, norm=True)
    by_scale = {2 ** (3 - i): [part[::-1] for part in pair] for i, pair in enumerate(coefficients)}
    scales = window_schedule(16, 2, 8)
    for scale in (2, 4, 8):
        members = [c for c in range(16) if scales[c] == scale]
        for place, c in enumerate(members):
            expected = by_scale[scale][place >= (len(members) + 1) // 2]
            shifted = [np.roll(expected, shift) for shift in range(128)]
            nearest = min(min(abs(y[:, c] - s).max(), abs(y[:, c] + s).max()) for s in shifted)
            assert nearest < 1e-6  # taps are kept in float32


def test_haars_approximations_are_means_and_details_what_they_leave_out() -> None:
    hidden, parts = torch.randn(2, 40, 16), {}
    for band in ("approximation", "detail"):
        config = tiny_config(mixing="wavelet", mix_wavelet="haar", mix_band=band, max_window=8)
        parts[band] = MIXERS["wavelet"](config)(hidden)[..., : config.n_mixed]
    mean = MIXERS["fixed"](tiny_config(mixing="fixed", max_window=8))
    finer = MIXERS["fixed"](tiny_config(mixing="fixed", min_window=1, max_window=4))
    torch.testing.assert_close(parts["approximation"], mean(hidden)[..., : mean.n_mixed])
    torch.testing.assert_close(parts["approximation"] + parts["detail"], finer(hidden)[..., : finer.n_mixed])


@pytest.mark.parametrize("kind", ["fixed", "learnable", "conv"])
def test_many_sequences_decode_as_one_does(kind: str) -> None:
    mixer = MIXERS[kind](tiny_config(mixing=kind, max_window=256))
    whole = torch.randn(200, 6, 16)
    with torch.no_grad():
        many = in_parts(mixer, whole.split([3, 1, 1, 1], 1), state_for(mixer))
        one = in_parts(mixer, whole[7:8].split([3, 1, 1, 1], 1), state_for(mixer))
    torch.testing.assert_close(many[7:8], one, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))
@pytest.mark.parametrize("sharing", ["coordinate", "level"])
@pytest.mark.parametrize("kind", ["fixed", "learnable", "wavelet", "conv"])
@pytest.mark.parametrize(("fraction", "longest", "batch"), [(0.5, 4, 1), (0.5, 256, 3), (1.0, 64, 2), (0.2, 8, 1)])
def test_a_token_in_one_call_is_the_same(
    kind: str, sharing: str, fraction: float, longest: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"mix_sharing": sharing, "mix_fraction": fraction, "max_window": longest}
    mixer = MIXERS[kind](tiny_config(mixing=kind, **changes))
    for kernel in mixer.parameters():
        torch.nn.init.normal_(kernel)
    parts = [torch.randn(batch, tokens, 16) for tokens in (longest, *[1] * 30)]
    results, newest = [], cpp.newest
    monkeypatch.setattr(cpp, "newest", lambda *a: results.append(newest(*a)) or results[-1])
    with torch.no_grad():
        one_call = in_parts(mixer, parts, state_for(mixer))
        assert len(results) == 30
        assert all(result is not None for result in results)
        monkeypatch.setattr(cpp, "newest", lambda *_: None)
        torch.testing.assert_close(one_call, in_parts(mixer, parts, state_for(mixer)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["fixed", "learnable", "wavelet", "ema"])
def test_decoding_compiles_once(kind: str) -> None:
    torch.compiler.reset()
    model, ids = tiny_model(mixing=kind, mix_edge="partial", n_layer=1, tie_word_embeddings=False), tokens()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    compiling = CompileConfig(fullgraph=True, mode=None, backend=backend)
    compiling._compile_all_devices = True
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    compiled = model.generate(ids, cache_implementation="static", compile_config=compiling, **options)
    assert torch.equal(compiled, model.generate(ids, use_cache=False, **options))
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", list(MIXERS))
def test_padding_in_front_changes_nothing(kind: str) -> None:
    mixer = make_mixer(kind, mix_edge="partial")
    x = torch.randn(1, 9, 16)
    mask = torch.tensor([[0, 0, 0] + [1] * 9])
    padded = mixer(torch.cat([torch.full((1, 3, 16), 1e3), x], 1), reach_of(12, mask=mask))
    torch.testing.assert_close(padded[:, 3:], mixer(x), atol=1e-6, rtol=1e-5)


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
    assert torch.equal(zero(hidden), partial(hidden))


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


@pytest.mark.parametrize("kind", ["fixed", "learnable", "wavelet", "ema"])
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
