"""The configuration: window schedule, defaults, refusals, and that it survives being saved."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from tests.tiny import tiny_config
from waveletgpt import WaveletGPTConfig
from waveletgpt.model.configuration import window_schedule


@given(n=st.integers(1, 200), low=st.integers(0, 4), levels=st.integers(1, 11))
def test_uniform_schedule_is_the_formula_of_the_paper(n: int, low: int, levels: int) -> None:
    expected = [2 ** (low + int(j * levels / n)) for j in range(n)]
    assert window_schedule(n, 2**low, 2 ** (low + levels - 1)) == expected


def test_the_papers_windows() -> None:
    # Half of 128 channels, windows 2 ... 512: 9 levels of 7 or 8 channels (64 = 9 x 7 + 1).
    config = WaveletGPTConfig(n_embd=128, n_head=8, n_layer=10, n_positions=512)
    windows = config.mix_windows()
    assert len(windows) == config.n_mixed == 64
    assert sorted(set(windows)) == [2**k for k in range(1, 10)]
    assert windows == sorted(windows)
    assert set(Counter(windows).values()) == {7, 8}


@given(levels=st.integers(1, 8), repeats=st.integers(1, 3))
def test_geometric_schedule_halves_from_level_to_level(levels: int, repeats: int) -> None:
    n = repeats * (2**levels - 1)  # 1 + 2 + 4 + ...: divides without remainder
    counts = Counter(window_schedule(n, 2, 2**levels, "geometric"))
    assert counts == {2 ** (k + 1): repeats * 2 ** (levels - 1 - k) for k in range(levels)}


@given(n=st.integers(1, 300), levels=st.integers(1, 11))
def test_geometric_schedule_favours_short_windows(n: int, levels: int) -> None:
    windows = window_schedule(n, 2, 2**levels, "geometric")
    assert len(windows) == n
    assert windows == sorted(windows)
    assert set(windows) <= {2**k for k in range(1, levels + 1)}
    # At least half of the channels, up to the one that a rounding takes.
    assert windows.count(2) >= n / 2 - 1


def test_equal_windows_are_a_single_scale() -> None:
    assert set(tiny_config(min_window=8, max_window=8).mix_windows()) == {8}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "mamba"}, "architecture='mamba' is unknown; use one of gpt2, llama"),
        ({"mixing": "haar"}, "mixing='haar' is unknown; use one of none, fixed"),
        ({"norm_position": "both"}, "norm_position='both'"),
        ({"position_embedding": "alibi"}, "position_embedding='alibi'"),
        ({"mix_edge": "reflect"}, "mix_edge='reflect'"),
        ({"mix_sharing": "layer"}, "mix_sharing='layer'"),
        ({"mix_wavelet": "db1"}, "mix_wavelet='db1' is unknown; use one of haar, db2"),
        ({"mix_band": "high"}, "mix_band='high' is unknown; use one of approximation, detail, both"),
        ({"mix_placement": "output"}, "mix_placement='output'"),
        ({"mix_allocation": "random"}, "mix_allocation='random'"),
        ({"mix_layers": "outer"}, "mix_layers='outer' is unknown; use one of all, inner"),
        ({"mix_layers": [0, 2]}, r"mix_layers=\[0, 2\] names a block outside 0 ... 1"),
        ({"mix_layers": "inner", "n_layer": 1}, "mix_layers='inner' leaves no block"),
        ({"mix_layers": [-1]}, r"mix_layers=\[-1\]"),
        ({"mix_fraction": 0.0}, "mix_fraction=0.0"),
        ({"mix_fraction": 1.5}, "mix_fraction=1.5"),
        ({"mix_fraction": 0.01}, "mix_fraction=0.01 must .* select a channel"),
        ({"mix_fraction": float("nan")}, "mix_fraction=nan"),
        ({"min_window": 3}, "min_window=3 is not a power of two"),
        ({"min_window": 0}, "min_window=0 is not a power of two"),
        ({"max_window": 12}, "max_window=12 is not a power of two"),
        ({"min_window": 8, "max_window": 4}, "max_window=4 is smaller than min_window=8"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"n_positions": 0, "max_window": None}, "n_positions=0 must be at least 1"),
        ({"n_embd": 18}, "n_embd=18 is not a multiple of n_head=4"),
        ({"n_kv_head": 3}, "n_head=4 is not a multiple of n_kv_head=3"),
        ({"n_embd": 12, "position_embedding": "rope"}, "even n_embd / n_head, got 12 / 4"),
        ({"mixing": "ema", "hidden_size": 18}, "n_embd=18"),
        ({"pooling": "max"}, "pooling='max' is unknown; use one of last, mean, attention"),
        ({"n_inputs": 3}, "n_inputs=3 must be 1 or 2"),
        ({"initializer_range": 0.0}, "initializer_range=0.0 must be greater than 0"),
        ({"frame_size": 0}, "frame_size=0 must be at least 1"),
        ({"frame_hidden": 0}, "frame_hidden=0 must be at least 1"),
    ],
)
def test_bad_values_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_defaults_follow_the_architecture() -> None:
    gpt2 = WaveletGPTConfig(n_embd=96, n_head=6, n_positions=500)
    assert (gpt2.position_embedding, gpt2.n_inner, gpt2.n_kv_head) == ("learned", 384, 6)
    assert gpt2.max_window == 256  # the largest power of two within the context
    llama = WaveletGPTConfig(architecture="llama", n_embd=96, n_head=6)
    assert (llama.position_embedding, llama.n_inner) == ("rope", 256)
    # 8/3 of the width, rounded up to 32: about as many weights as 4 times the width without a gate.
    assert WaveletGPTConfig(architecture="llama", n_embd=100, n_head=5).n_inner == 288


def test_the_usual_aliases() -> None:
    config = WaveletGPTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
        max_position_embeddings=64, architecture="llama",
    )  # fmt: skip
    assert (config.n_embd, config.n_layer, config.n_head, config.n_kv_head, config.n_inner) == (32, 3, 4, 2, 80)
    assert (config.n_positions, config.max_window) == (64, 64)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 3, 4)
    assert WaveletGPTConfig(n_ctx=128).n_positions == 128


@pytest.mark.parametrize(
    ("mix_layers", "expected"),
    [("all", [True] * 4), ("inner", [True] * 3 + [False]), ([1, 3], [False, True, False, True]), ([], [False] * 4)],
)
def test_mix_layers(mix_layers: str | list[int], expected: list[bool]) -> None:
    config = tiny_config(n_layer=4, mix_layers=mix_layers)
    assert [config.mixes(layer) for layer in range(4)] == expected
    assert not any(tiny_config(n_layer=4, mixing="none", mix_layers=mix_layers).mixes(layer) for layer in range(4))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixing": "none", "architecture": "llama", "tie_word_embeddings": False, "attn_pdrop": 0.1},
        {"mixing": "learnable", "mix_sharing": "level", "mix_edge": "partial", "mix_layers": [0], "min_window": 4},
        {"mixing": "ema", "mix_placement": "input", "mix_fraction": 0.25, "norm_position": "post"},
        # Equal to what the defaults would give for the default context, but not for this one.
        {"max_window": 1024, "n_positions": 32, "n_inner": 3072, "n_kv_head": 4},
        {"architecture": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"causal": False, "pooling": "mean", "n_inputs": 2, "id2label": {0: "no", 1: "yes", 2: "perhaps"}},
        {"frame_size": 400, "frame_hidden": 64, "problem_type": "multi_label_classification", "num_labels": 7},
    ],
)
def test_saved_and_loaded_it_is_the_same(settings: dict, tmp_path: Path) -> None:
    config = tiny_config(**settings)
    config.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text())  # no NaN, no tensors
    for loaded in (
        WaveletGPTConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        WaveletGPTConfig.from_dict(config.to_dict()),
        WaveletGPTConfig.from_json_file(tmp_path / "config.json"),
    ):
        assert type(loaded) is WaveletGPTConfig
        ours, theirs = config.to_dict(), loaded.to_dict()
        for bookkeeping in ("transformers_version", "_name_or_path"):
            ours.pop(bookkeeping, None), theirs.pop(bookkeeping, None)
        assert theirs == ours
        assert loaded.mix_windows() == config.mix_windows()
        assert [loaded.mixes(layer) for layer in range(2)] == [config.mixes(layer) for layer in range(2)]


def test_auto_config_knows_the_type() -> None:
    assert type(AutoConfig.for_model("waveletgpt", n_embd=64, n_head=4)) is WaveletGPTConfig


def test_what_a_classifier_is_set_to() -> None:
    config = tiny_config(num_labels=3, causal=False, pooling="attention", n_inputs=2, frame_size=400)
    assert (config.num_labels, config.frame_hidden) == (3, 2048)
    assert tiny_config(id2label={0: "cat", 1: "dog", 2: "bird"}).num_labels == 3
    default = tiny_config()
    assert (default.causal, default.pooling, default.n_inputs, default.frame_size) == (True, "last", 1, None)
