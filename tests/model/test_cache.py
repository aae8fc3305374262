"""Mixing states follow whatever is done to a cache, and what cannot be right is one ValueError, never a crash."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.tiny import tiny_model, tokens
from waveletgpt.model.mixing import MIXERS
from waveletgpt.ops import cpp

MIXINGS = list(MIXERS)
PROMPT, LATER = 19, 4


def by_token(model: torch.nn.Module, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(1, 1)], 1)


def repeat(cache: DynamicCache) -> list[int]:
    cache.batch_repeat_interleave(3)
    return [0, 0, 0, 1, 1, 1]


def select(cache: DynamicCache) -> list[int]:
    cache.batch_select_indices(torch.tensor([1]))
    return [1]


def reorder(cache: DynamicCache) -> list[int]:
    cache.reorder_cache(torch.tensor([1, 1]))
    return [1, 1]


@pytest.mark.parametrize("change", [repeat, select, reorder])
@pytest.mark.parametrize("mixing", MIXINGS)
@torch.no_grad()
def test_rows_of_a_cache_take_their_states_along(mixing: str, change: Callable[[DynamicCache], list[int]]) -> None:
    model, prompt = tiny_model(mixing=mixing), tokens(2, PROMPT)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    rows = change(cache)
    later = tokens(len(rows), LATER, seed=2)
    expected = model(torch.cat([prompt[rows], later], 1), use_cache=False).logits[:, PROMPT:]
    torch.testing.assert_close(by_token(model, later, cache), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("mixing", MIXINGS)
@torch.no_grad()
def test_a_copy_of_a_cache_is_independent(mixing: str, copied: Callable[[DynamicCache], DynamicCache]) -> None:
    model, prompt = tiny_model(mixing=mixing), tokens(2, PROMPT)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    twin = copied(cache)
    for ids, one in ((tokens(2, LATER, seed=2), cache), (tokens(2, LATER, seed=3), twin)):
        expected = model(torch.cat([prompt, ids], 1), use_cache=False).logits[:, PROMPT:]
        torch.testing.assert_close(by_token(model, ids, one), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixing", MIXINGS)
@torch.no_grad()
def test_a_reset_cache_is_new(mixing: str) -> None:
    model = tiny_model(mixing=mixing)
    cache = DynamicCache(config=model.config)
    model(tokens(2, PROMPT), past_key_values=cache)
    cache.reset()
    ids = tokens(3, PROMPT, seed=2)  # of another batch size, too
    found = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-4)


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    mixing=st.sampled_from(MIXINGS),
    cuts=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=5),
)
@torch.no_grad()
def test_tokens_taken_back_were_never_there(mixing: str, cuts: list[tuple[int, int]]) -> None:
    """Feed some tokens, take some back, again and again: the next logits are those of what is left, or no."""
    model = tiny_model(mixing=mixing, max_window=4)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    kept = tokens(1, 7)
    model(kept, past_key_values=cache)
    for i, (more, back) in enumerate(cuts):
        ids = tokens(1, more, seed=i)
        expected = model(torch.cat([kept, ids], 1), use_cache=False).logits[:, -more:]
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-4)
        kept = torch.cat([kept, ids], 1)
        if kept.shape[1] + 6 > model.config.n_positions:
            return
        try:
            cache.crop(-back)
        except ValueError:
            assert back > more  # what was fed last can always be taken back
            return
        kept = kept[:, : kept.shape[1] - back]


@pytest.mark.parametrize("mixing", MIXINGS)
@torch.no_grad()
def test_taking_back_what_was_not_recorded_is_refused(mixing: str) -> None:
    model = tiny_model(mixing=mixing)
    cache = DynamicCache(config=model.config)
    model(tokens(), past_key_values=cache)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)


@pytest.mark.parametrize("other", [{"max_window": 4}, {"mix_fraction": 1.0}, {"n_layer": 1}])
@pytest.mark.parametrize("mixing", ["fixed", "learnable", "wavelet", "ema", "conv", "shift"])
@torch.no_grad()
def test_a_cache_of_another_model_or_batch_is_refused(mixing: str, other: dict[str, float]) -> None:
    model = tiny_model(mixing=mixing)
    for foreign, batch in ((tiny_model(mixing=mixing, **other), 2), (model, 3)):
        cache = DynamicCache(config=foreign.config)
        foreign(tokens(batch), past_key_values=cache)
        same = batch == 2 and all(
            cache.layers[-1].conv_states[i] is not None
            and len(cache.layers) == 2
            and foreign.config.mix_windows() == model.config.mix_windows()
            and foreign.config.n_mixed == model.config.n_mixed
            for i in range(1)
        )
        if same:  # "conv" and "shift" have windows of their own
            continue
        for ids in (tokens(2, 1), tokens(2, 3)):
            with pytest.raises(ValueError, match="new"):
                model(ids, past_key_values=copy.deepcopy(cache))


@pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))
@hypothesis_settings(max_examples=300, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_native_steps_take_nothing_that_does_not_fit(data: st.DataObject) -> None:
    """Any shapes: the right result, or a ValueError; never memory of others."""
    windows = tuple(data.draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=5).map(sorted)))
    batch, size = data.draw(st.integers(1, 3)), st.integers(0, 9)
    fits = data.draw(st.booleans())
    hidden = torch.randn(batch, 1 if fits else data.draw(size), len(windows) + 2)
    row = torch.zeros(batch if fits else data.draw(size), sum(windows) if fits else data.draw(st.integers(0, 40)))
    sums = torch.zeros(*((batch, len(windows)) if fits else (data.draw(size), data.draw(size))), dtype=torch.float64)
    try:
        y = cpp.step_mean(hidden, windows, row, sums, 0)
    except ValueError:
        assert not fits
        return
    expected = hidden[:, 0, : len(windows)] / torch.tensor(windows)
    torch.testing.assert_close(y[:, 0, : len(windows)], expected)
