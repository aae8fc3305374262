"""Loss by kind of token and by position, near attention: against counting by hand, and models that are known."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import make_store, tiny_recipe
from tests.tiny import tiny_model, tokens
from waveletgpt.runs.breakdown import break_down, near_attention, position_bins, seen_pairs
from waveletgpt.training.trainer import train


@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.lists(st.integers(0, 3), min_size=2, max_size=30))
def test_seen_pairs_are_those_that_counting_finds(one: list[int], two: list[int]) -> None:
    length = min(len(one), len(two))
    rows = torch.tensor([one[:length], two[:length]])
    found = seen_pairs(rows[:, :-1], rows[:, 1:])
    for row, answers in zip(rows.tolist(), found.tolist(), strict=True):
        pairs = list(itertools.pairwise(row))
        assert answers == [pair in pairs[:t] for t, pair in enumerate(pairs)]


@pytest.mark.parametrize("context", [1, 2, 3, 16, 100])
def test_bins_cover_the_context_once(context: int) -> None:
    bins = position_bins(context)
    assert [t for a, b in bins for t in range(a, b + 1)] == list(range(1, context + 1))
    assert all(b <= 2 * a for a, b in bins)


def batches(model: torch.nn.Module, count: int = 3, context: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = [tokens(2, context + 1, seed) for seed in range(count)]
    return [{"input_ids": row[:, :-1], "shift_labels": row[:, 1:].contiguous()} for row in ids]


@pytest.mark.parametrize("settings", [{"mixing": "none"}, {"mixing": "fixed", "architecture": "llama"}])
def test_parts_add_up_to_the_loss(settings: dict[str, object]) -> None:
    model = tiny_model(**settings)
    data = batches(model)
    found = break_down(model, data, attention_windows=3)
    with torch.no_grad():
        whole = sum(float(model(**batch).loss) for batch in data) / len(data)
    for parts in (found["pairs"].values(), found["positions"]):
        counted = [part for part in parts if part["tokens"]]
        assert sum(part["tokens"] for part in counted) == 3 * 2 * 16
        assert sum(part["nll"] * part["tokens"] for part in counted) / 96 == pytest.approx(whole, rel=1e-5)
    assert found["near_attention"]["windows"] == 3
    assert 0 < found["near_attention"]["share"] < 1
    assert model.config._attn_implementation == "sdpa"


class Attends:
    """A model of two blocks and three heads with the attention weights that it is given, for whatever tokens."""

    def __init__(self, *blocks: torch.Tensor):
        self.blocks = blocks
        self.config = SimpleNamespace(_attn_implementation="sdpa")

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def __call__(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        eager = self.config._attn_implementation == "eager"
        weights = tuple(block.expand(len(input_ids), 3, -1, -1) for block in self.blocks)
        return SimpleNamespace(attentions=weights if eager else None)


def test_attention_that_is_even_and_on_the_token_itself() -> None:
    T = 16
    even, itself = torch.ones(T, T).tril(), torch.eye(T)
    model = Attends(even / even.sum(-1, keepdim=True), itself)
    found = near_attention(model, tokens(2, T))
    assert found is not None
    # Three of t + 1 tokens are near, for the tokens 8 ... 15.
    assert found["by_block"] == pytest.approx([sum(3 / (t + 1) for t in range(8, T)) / 8, 1.0])
    assert found["share"] == pytest.approx(sum(found["by_block"]) / 2)
    far = Attends(torch.roll(itself, -3, dims=1), torch.roll(itself, -2, dims=1))
    assert near_attention(far, tokens(2, T))["by_block"] == [0.0, 1.0]  # type: ignore[index]
    assert far.config._attn_implementation == "sdpa"


def test_a_run_records_it(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    recipe = tiny_recipe(max_steps=60, n_positions=32, lr=1e-2, samples=0, eval_every=1000, save_every=1000)
    run = train(recipe, store, tmp_path / "run", data="words.txt", show_progress=False)
    found = run.info["result"]["breakdown"]
    total = sum(part["nll"] * part["tokens"] for part in found["positions"])
    assert total / sum(part["tokens"] for part in found["positions"]) == pytest.approx(
        run.info["result"]["final_nll"], rel=1e-5
    )
    # Words come again, so what was seen is known better than what was not.
    assert found["pairs"]["seen"]["nll"] < found["pairs"]["new"]["nll"]
