"""Generating with a cache gives what recomputing everything gives, for every mixing and every way to decode; samples
are continued with it, past the context too, and shown as they come."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from tests.helpers import make_store, tiny_recipe
from tests.tiny import PAD, VOCAB, tiny_model, tokens
from waveletgpt import WaveletGPTForCausalLM
from waveletgpt.data.modalities.encoders import Bytes
from waveletgpt.errors import UserError
from waveletgpt.model.mixing import MIXERS
from waveletgpt.runs.evaluation import generate_from_run, print_samples, streaming
from waveletgpt.runs.sampling import continue_prompts, generate_tokens
from waveletgpt.training.trainer import train

CLOSE = {"atol": 1e-5, "rtol": 1e-5}

VARIANTS = [
    {"mixing": "none"},
    *({"mixing": kind, "mix_placement": placement} for kind in MIXERS for placement in ("block", "input")),
    {"mixing": "fixed", "mix_edge": "partial", "position_embedding": "sinusoidal", "norm_position": "post"},
    {"mixing": "learnable", "mix_edge": "partial", "mix_placement": "input", "mix_sharing": "level"},
    {"mixing": "fixed", "mix_layers": "inner", "min_window": 1, "max_window": 1},
    {"mixing": "fixed", "mix_layers": [1], "position_embedding": "none", "mix_allocation": "geometric"},
    {"mixing": "learnable", "max_window": 64},  # longer than any text here
]
DECODED = [VARIANTS[0], *VARIANTS[1:9:2], VARIANTS[6], *VARIANTS[11:14]]


def name(settings: dict) -> str:
    return "-".join(str(value) for value in settings.values())


def model_for(settings: dict, architecture: str = "gpt2") -> WaveletGPTForCausalLM:
    # Untied: with the same matrix at both ends a random model repeats its input.
    return tiny_model(architecture=architecture, tie_word_embeddings=False, n_positions=64, **settings)


def generate(model: WaveletGPTForCausalLM, ids: torch.Tensor, **options: object) -> torch.Tensor:
    """New tokens only."""
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, **options}
    return model.generate(ids, **settings)[:, ids.shape[1] :]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("settings", VARIANTS, ids=name)
@torch.no_grad()
def test_logits_step_by_step_are_those_of_the_whole(settings: dict, architecture: str) -> None:
    model, ids = model_for(settings, architecture), tokens(2, 30)
    whole = model(ids).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=30)):
        parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 1, 5, 1, 1, 14], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    # A row that is padded on the left goes its own way, in chunks too, one of which is padding only.
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :10] = 0
    alone = model(ids[:1, 10:]).logits[0]
    cache, parts, start = DynamicCache(config=model.config), [], 0
    for part in ids.split([7, 8, 1, 14], dim=1):
        start += part.shape[1]
        parts.append(model(part, attention_mask=mask[:, :start], past_key_values=cache).logits)
    logits = torch.cat(parts, 1)
    torch.testing.assert_close(logits[0, 10:], alone, **CLOSE)
    torch.testing.assert_close(logits[1], whole[1], **CLOSE)


@pytest.mark.parametrize("settings", DECODED, ids=name)
def test_decoding_is_the_same_with_a_cache(settings: dict) -> None:
    architecture = "llama" if settings.get("mix_placement") == "input" else "gpt2"
    model, ids = model_for(settings, architecture), tokens()
    greedy = generate(model, ids, use_cache=False)
    assert len(greedy.unique()) > 2  # a model stuck on a token would agree with anything
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}):
        assert torch.equal(generate(model, ids, **options), greedy), options
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, ids, **beams), generate(model, ids, use_cache=False, **beams))
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        sampled.append(generate(model, ids, do_sample=True, temperature=0.7, top_k=8, use_cache=use_cache))
    assert torch.equal(*sampled)
    assert not torch.equal(sampled[0], greedy)


@pytest.mark.parametrize("settings", DECODED, ids=name)
def test_unequal_prompts_in_a_batch_are_each_prompt_alone(settings: dict) -> None:
    architecture = "llama" if settings.get("mix_placement") == "input" else "gpt2"
    model = model_for(settings, architecture)
    prompts = [tokens(1, length, seed=length) for length in (3, 12, 7)]
    alone = [generate(model, prompt)[0] for prompt in prompts]
    padded = torch.full((3, 12), PAD)
    for row, prompt in zip(padded, prompts, strict=True):
        row[12 - prompt.shape[1] :] = prompt[0]
    mask = (padded != PAD).long()
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"use_cache": False}):
        together = generate(model, padded, attention_mask=mask, **options)
        assert all(torch.equal(row, expected) for row, expected in zip(together, alone, strict=True)), options


@pytest.mark.parametrize("settings", DECODED, ids=name)
def test_speculation_changes_nothing(settings: dict) -> None:
    model = model_for(settings)
    # A prompt that repeats itself, so that looking up its continuation gets some tokens right and some wrong.
    ids = tokens(1, 5).repeat(1, 4)
    greedy = generate(model, ids, max_new_tokens=20)
    assert torch.equal(generate(model, ids, max_new_tokens=20, prompt_lookup_num_tokens=3), greedy)
    assistant = model_for(settings)
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.1 * torch.randn_like(assistant.lm_head.weight))
    assert torch.equal(generate(model, ids, max_new_tokens=20, assistant_model=assistant), greedy)


def test_a_conversation_goes_on_from_its_cache() -> None:
    model, ids = model_for({"mixing": "fixed"}), tokens()
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=PAD, return_dict_in_generate=True)
    longer = torch.cat([out.sequences, tokens(2, 4, seed=9)], 1)
    assert torch.equal(generate(model, longer, past_key_values=out.past_key_values), generate(model, longer))


def test_from_embeddings() -> None:
    model, ids = model_for({"mixing": "fixed"}), tokens()
    embeddings = model.get_input_embeddings()(ids)
    out = model.generate(inputs_embeds=embeddings, max_new_tokens=12, do_sample=False, pad_token_id=PAD)
    assert torch.equal(out, generate(model, ids))


@pytest.mark.parametrize("positions", ["rope", "sinusoidal", "none"])
def test_beyond_the_trained_context(positions: str) -> None:
    model = tiny_model(position_embedding=positions, n_positions=16, tie_word_embeddings=False)
    ids = tokens()
    longer = generate(model, ids, max_new_tokens=30)
    assert longer.shape == (2, 30)
    assert torch.equal(longer, generate(model, ids, max_new_tokens=30, use_cache=False))


def test_learned_positions_end_with_a_word() -> None:
    model, ids = tiny_model(n_positions=16), tokens()
    assert generate(model, ids, max_new_tokens=5).shape == (2, 5)  # the last token is not read again
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        with pytest.raises(ValueError, match="17 tokens exceed n_positions=16 of the learned positions; shorten"):
            generate(model, ids, max_new_tokens=6, **options)
    with pytest.raises(ValueError, match="20 tokens exceed n_positions=16"):
        model(tokens(1, 20))


@pytest.mark.parametrize("settings", [{}, {"mix_placement": "input"}, {"mix_layers": [1]}], ids=name)
def test_a_cache_without_mixing_states_is_refused(settings: dict) -> None:
    model, ids = tiny_model(**settings), tokens()
    plain = tiny_model(mixing="none")
    whole = model(ids).logits
    for cache in (DynamicCache(), DynamicCache(config=model.config), DynamicCache(config=plain.config)):
        parts = [model(part, past_key_values=cache).logits for part in (ids[:, :5], ids[:, 5:])]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        plain(ids[:, :5], past_key_values=cache)
        with pytest.raises(ValueError, match="start with a new one"):
            model(ids[:, 5:], past_key_values=cache)
    torch.testing.assert_close(plain(ids[:, 5:], past_key_values=cache).logits, plain(ids).logits[:, 5:], **CLOSE)


def test_continuous_batching_is_refused() -> None:
    # It has its own cache, for keys and values only.
    with pytest.raises(ValueError, match="keeps no mixing states: use generate"):
        tiny_model().generate_batch([[1, 2, 3]], GenerationConfig(max_new_tokens=2, eos_token_id=PAD, pad_token_id=PAD))


def test_decoding_compiles_into_one_graph() -> None:
    torch.compiler.reset()
    model, ids = model_for({"mixing": "fixed", "mix_edge": "partial", "n_layer": 1}), tokens()
    # aot_eager traces as inductor does, and leaves out the C++ compiler.
    compiling = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    compiling._compile_all_devices = True
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5}
    compiled = generate(model, ids, cache_implementation="static", compile_config=compiling, **options)
    assert torch.equal(compiled, generate(model, ids, use_cache=False, **options))


# --- generate_tokens ------------------------------------------------------------------------------------------------


def lengths_read(model: WaveletGPTForCausalLM) -> list[int]:
    """Filled with the number of tokens of each forward pass from now on."""
    found: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: found.append((args[0] if args else kwargs["input_ids"]).shape[1]), with_kwargs=True
    )
    return found


@pytest.mark.parametrize("settings", [VARIANTS[0], VARIANTS[1], {"architecture": "llama", "mixing": "fixed"}], ids=name)
def test_each_token_is_read_once(settings: dict) -> None:
    """With the cache a new token costs one token; only where the context is full its last half is read again."""
    model = tiny_model(n_positions=32, **settings)
    read = lengths_read(model)
    generate_tokens(model, [1, 2, 3], tokens=30, samples=2, stop=False)
    assert read == [3, *[1] * 29]
    read.clear()
    generate_tokens(model, [1, 2, 3], tokens=60, stop=False)
    assert read == [3, *[1] * 29, *[16, *[1] * 16], *[16, *[1] * 12]]


def test_the_whole_context_is_used() -> None:
    model = tiny_model(n_positions=16, tie_word_embeddings=False)
    ids = tokens(1, 20)[0].tolist()
    for length in (1, 7, 15, 16):
        expected = ids[:length]
        while len(expected) <= 16:  # what a model of 16 positions says after 16 tokens is the last it says of them
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
        (found,) = generate_tokens(model, ids[:length], tokens=17 - length, temperature=0, stop=False)
        assert ids[:length] + found == expected
    longer = generate_tokens(model, ids, tokens=1, temperature=0, stop=False)[0]
    assert longer == [int(model(torch.tensor([ids[-8:]])).logits[0, -1].argmax())]


def test_what_is_watched_is_what_comes() -> None:
    model = tiny_model(n_positions=16)
    for samples in (1, 3):
        seen: list[list[int]] = []
        rows = generate_tokens(model, [1, 2], tokens=40, samples=samples, seed=3, stop=False, watch=seen.append)
        assert [list(row) for row in zip(*seen, strict=True)] == rows
        assert rows == generate_tokens(model, [1, 2], tokens=40, samples=samples, seed=3, stop=False)
        assert rows != generate_tokens(model, [1, 2], tokens=40, samples=samples, seed=4, stop=False)


def test_prompts_side_by_side_are_continued_as_alone() -> None:
    model = tiny_model(n_positions=16)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    together = continue_prompts(model, prompts, tokens=40, temperature=0, stop=False)
    assert together == [generate_tokens(model, prompt, tokens=40, temperature=0, stop=False)[0] for prompt in prompts]


def test_suppressed_tokens_never_come() -> None:
    model = tiny_model(n_positions=16)
    few = set(range(0, VOCAB, 7))
    for options in ({"temperature": 0}, {"temperature": 5.0}, {"temperature": 5.0, "samples": 3}):
        rows = generate_tokens(model, [1], tokens=60, stop=False, suppress_tokens=sorted(few), **options)
        assert not few & {token for row in rows for token in row}
        assert all(len(row) == 60 for row in rows)


def test_a_sample_stops_at_the_end_token() -> None:
    model = tiny_model(n_positions=16, eos_token_id=5, pad_token_id=5)
    full = generate_tokens(model, [1], tokens=60, samples=4, temperature=2.0, stop=False)
    assert any(5 in row for row in full)
    short = generate_tokens(model, [1], tokens=60, samples=4, temperature=2.0)
    assert not any(5 in row for row in short)
    assert any(len(row) < 60 for row in short)


def test_a_temperature_that_is_too_small_is_named() -> None:
    with pytest.raises(UserError, match="temperature 1e-40 is too small"):
        generate_tokens(tiny_model(), [1, 2], tokens=3, temperature=1e-40)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"samples": 0}, {"tokens": 0}]
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be"):
        generate_tokens(tiny_model(), [1], **{"tokens": 1, **wrong})
    with pytest.raises(UserError, match="gives no token"):
        generate_tokens(tiny_model(), [], tokens=1)


# --- shown as it comes ----------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=100, deadline=None)
@given(prompt=st.binary(max_size=4), new=st.lists(st.integers(0, 255) | st.sampled_from(list("é한😀".encode()))))
def test_streamed_text_is_the_text(prompt: bytes, new: list[int]) -> None:
    """Any bytes, also those that are no characters: what was written adds up, and nothing was taken back."""
    tokenizer = Bytes().tokenizer()
    written: list[str] = []
    with streaming(tokenizer, list(prompt), [256], written.append) as watch:
        for token in [*new, 256]:
            watch([token])
    assert "".join(written) == tokenizer.decode([*prompt, *new])


def test_whole_characters_are_streamed_at_once() -> None:
    written: list[str] = []
    with streaming(Bytes().tokenizer(), list(b"a"), [], written.append) as watch:
        for token in "b한c".encode():
            watch([token])
    assert [text for text in written if text] == ["a", "b", "한", "c"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    store = make_store(folder, 1000)
    return train(tiny_recipe(max_steps=3), store, folder / "run", data="words", show_progress=False).path


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(run: Path, out: io.StringIO, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        print_samples(run, "the cat", device="cpu", tokens=30, stop=False, **settings)
    return out.getvalue()


def test_a_terminal_gets_the_same_text_piece_by_piece(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []

    class Noting(Terminal):
        def write(self, text: str) -> int:
            pieces.append(text)
            return super().write(text)

    (text,) = generate_from_run(run_folder, "the cat", device="cpu", tokens=30, stop=False)
    assert printed(run_folder, Noting(), monkeypatch) == f"{text}\n"
    assert len([piece for piece in pieces if piece]) > 20
    pieces.clear()
    assert printed(run_folder, io.StringIO(), monkeypatch) == f"{text}\n"
    rows = generate_from_run(run_folder, "the cat", device="cpu", tokens=30, stop=False, samples=2)
    expected = "".join(f"--- sample {i + 1}\n{row}\n" for i, row in enumerate(rows))
    for out in (Terminal(), io.StringIO()):
        assert printed(run_folder, out, monkeypatch, samples=2) == expected


def test_a_bar_on_a_terminal_only(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for out in (Terminal(), io.StringIO()):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", out)
            generate_from_run(run_folder, "the cat", device="cpu", tokens=30)
        assert ("generating" in out.getvalue()) == out.isatty()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", VARIANTS[:5], ids=name)
def test_on_an_accelerator(settings: dict) -> None:
    model, ids = model_for(settings).cuda(), tokens().cuda()
    greedy = generate(model, ids, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}):
        assert torch.equal(generate(model, ids, **options), greedy), options
