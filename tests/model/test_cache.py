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


@hypothesis_settings(max_examples=200, deadline=None)
@given(
    mixing=st.sampled_from(MIXINGS),
    cuts=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=5),
)
@torch.no_grad()
def test_tokens_taken_back_were_never_there(mixing: str, cuts: list[tuple[int, int]]) -> None:
    """Feed some tokens, take some back, again and again: the next logits are those of what is left, or no."""
    model = tiny_model(mixing=mixing, max_window=4)
    cache = DynamicCache(config=model.config)
    kept = tokens(1, 7)
    model(kept, past_key_values=cache)
    cache.activate_past_recording()
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
        shapes = [(m.config.n_layer, m.config.n_mixed, m.config.mix_windows()) for m in (foreign, model)]
        if batch == 2 and shapes[0] == shapes[1]:
            continue  # "conv" and "shift" have windows of their own
        for ids in (tokens(2, 1), tokens(2, 3)):
            with pytest.raises(ValueError, match="new"):
                model(ids, past_key_values=copy.deepcopy(cache))


WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float16": lambda x: x.half(),
    "float64": lambda x: x.double(),
    "narrow": lambda x: x[..., :-1],
    "fewer": lambda x: x[:-1],
    "flat": lambda x: x.flatten(),
    "more dimensions": lambda x: x[None],
    "strided": lambda x: torch.cat([x, x], -1)[..., ::2],
}


@pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))
@pytest.mark.parametrize("taps", [False, True])
@hypothesis_settings(max_examples=300, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_a_native_step_takes_nothing_that_does_not_fit(taps: bool, data: st.DataObject) -> None:
    """What fits gives the sum written out; one tensor or window that does not is left to the general way."""
    windows = tuple(sorted(data.draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=40))))
    groups = [(w, windows.count(w)) for w in sorted(set(windows))]
    batch, earlier = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 12))
    hidden, state = torch.randn(batch, 1, len(windows) + 3), torch.randn(batch, earlier, 2 * len(windows))
    tensors = {"x": hidden[..., : len(windows)], "state": state[..., : len(windows)]}
    tensors |= {f"taps {w}": torch.randn(n, w) for w, n in groups} if taps else {}

    def run() -> torch.Tensor | None:
        kernels = [tensors[f"taps {w}"] for w, _ in groups] if taps else None
        return cpp.newest(tensors["x"], windows, kernels, tensors["state"])

    whole, expected = torch.cat([tensors["state"], tensors["x"]], 1).double(), []
    for c, w in enumerate(windows):
        h = tensors[f"taps {w}"][c - windows.index(w)].double() if taps else torch.full((w,), 1 / w).double()
        past = whole[:, -w:, c].flip(1)
        expected.append((past * h[: past.shape[1]]).sum(1))
    torch.testing.assert_close(run()[:, 0].double(), torch.stack(expected, 1), atol=1e-6, rtol=1e-5)

    kind = data.draw(st.sampled_from([*WRONG, "window", "order"]))
    if kind == "window":
        windows = (data.draw(st.sampled_from([0, -1, *(() if taps else (3,))])), *windows[1:])
        groups = [(w, windows.count(w)) for w in sorted(set(windows))]
        tensors |= {f"taps {w}": torch.randn(n, max(0, w)) for w, n in groups} if taps else {}
    elif kind == "order":
        windows = windows[::-1]
        if len(groups) == 1:
            return
    else:
        name = data.draw(st.sampled_from(list(tensors)))
        changed = WRONG[kind](tensors[name])
        if changed.shape == tensors[name].shape and changed.dtype == tensors[name].dtype and changed.shape[-1] == 1:
            return  # of a single value every stride is dense
        if name.startswith("taps") and kind == "flat" and (len(groups) == 1 or groups[0][1] == 1):
            return  # one channel's taps are as good as a vector
        tensors[name] = changed
    assert run() is None


@pytest.mark.parametrize(
    ("mixing", "other"), [("fixed", "learnable"), ("learnable", "fixed"), ("ema", "fixed"), ("fixed", "none")]
)
@torch.no_grad()
def test_a_cache_with_other_states_is_refused(mixing: str, other: str) -> None:
    model, foreign = tiny_model(mixing=mixing), tiny_model(mixing=other)
    for length in (1, 3):
        cache = DynamicCache(config=foreign.config)
        foreign(tokens(), past_key_values=cache)
        with pytest.raises(ValueError, match="start with a new"):
            model(tokens(2, length), past_key_values=cache)
