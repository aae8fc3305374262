"""The expressions are those of the Long Range Arena's grammar, and their values are right."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from waveletgpt.data import MODALITIES, NAMED, SPLITS, DataSettings, TokenStore, prepare
from waveletgpt.data.modalities.listops import (
    END,
    IDS,
    LISTOPS,
    OPERATORS,
    WORDS,
    Generated,
    evaluate,
    generate_listops,
)
from waveletgpt.errors import UserError

FUNCTIONS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def value_of(words: list[str]) -> int:
    """An evaluator of one's own: replace innermost operations by their values until one value is left."""
    words = list(words)
    while len(words) > 1:
        close = words.index("]")
        start = max(i for i in range(close) if words[i] in OPERATORS)
        words[start : close + 1] = [str(FUNCTIONS[words[start]]([int(word) for word in words[start + 1 : close]]))]
    return int(words[0])


def depth(words: list[str]) -> int:
    level, deepest = 1, 1
    for word in words:
        level += (word in OPERATORS) - (word == "]")
        deepest = max(deepest, level)
    return deepest


def arguments(words: list[str]) -> list[int]:
    """How many each operation has."""
    open_, found = [0], []
    for word in words:
        if word == "]":
            found.append(open_.pop())
        else:
            open_[-1] += 1
            if word in OPERATORS:
                open_.append(0)
    return found


def drawn_one_by_one(rng: random.Random, level: int, max_depth: int, max_args: int) -> list[str]:
    """The Long Range Arena's recipe, as published."""
    if level >= max_depth or rng.random() > 0.25:
        return [str(rng.randrange(10))]
    parts = [drawn_one_by_one(rng, level + 1, max_depth, max_args) for _ in range(rng.randint(2, max_args))]
    return [rng.choice(OPERATORS), *(word for part in parts for word in part), "]"]


def test_values_lengths_and_grammar() -> None:
    for length, depth_limit, args in (((500, 2000), 10, 10), ((1, 30), 4, 3), ((20, 60), 10, 10)):
        found = list(generate_listops(1, 60, *length, depth_limit, args))
        assert len({expression for expression, _ in found}) == 60
        for expression, value in found:
            words = expression.split(" ")
            assert length[0] <= len(words) <= length[1]
            assert set(words) <= set(WORDS) - {"="}
            assert value == value_of(words) == evaluate(words)
            assert depth(words) <= depth_limit
            assert all(2 <= count <= args for count in arguments(words))


def test_the_same_seed_gives_the_same() -> None:
    first = list(generate_listops(7, 20, 10, 50))
    assert list(generate_listops(7, 40, 10, 50))[:20] == first
    assert list(generate_listops(8, 20, 10, 50)) != first
    assert first[0] == ("[MAX 7 [MED 5 3 0 8 4 ] ]", 7)


def test_the_distribution_is_that_of_the_recipe() -> None:
    """Lengths, operators, digits and values against expressions that are drawn one by one."""
    rng = random.Random(0)
    wanted: list[list[str]] = []
    while len(wanted) < 3000:
        words = drawn_one_by_one(rng, 1, 5, 6)
        if 15 <= len(words) <= 200:
            wanted.append(words)
    found = [expression.split(" ") for expression, _ in generate_listops(0, 3000, 15, 200, 5, 6)]
    for measure in (len, depth, value_of, lambda words: words.count("[MED"), lambda words: words.count("7")):
        a, b = np.array([measure(w) for w in wanted], float), np.array([measure(w) for w in found], float)
        error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4 * error, measure
        assert a.std() == pytest.approx(b.std(), rel=0.12)


def test_too_many_are_an_error() -> None:
    assert sorted(generate_listops(0, 10, 1, 1)) == [(str(digit), digit) for digit in range(10)]
    with pytest.raises(UserError, match="found only 10 of 11 different expressions of 1 to 1 tokens"):
        list(generate_listops(0, 11, 1, 1))
    with pytest.raises(UserError, match="max_args 1"):
        next(generate_listops(0, 1, max_args=1))


@pytest.mark.parametrize(
    "text", ["", "]", "[MAX ]", "[MAX 1 2", "1 2", "[MAX 1 ] ]", "[FIRST 1 2 ]", "12", "[MAX 1 = ]"]
)
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        evaluate(text.split())


def listops(data: Path | str, cache: DataSettings, **changes: Any) -> TokenStore:
    chosen = DataSettings(**{"cache_dir": cache.cache_dir, "listops_count": 200, "listops_length": "10-40", **changes})
    return prepare(str(data), None if data == "listops" else "listops", chosen, progress=False)


def texts(store: TokenStore, split: str) -> list[str]:
    return [text.strip() for text in store.load_tokenizer().decode(store.split(split)).split("<|endoftext|>")[:-1]]


def test_the_named_set(settings: DataSettings) -> None:
    store = listops("listops", settings)
    assert (store.modality, store.vocab_size, store.meta["split"]) == ("listops", 17, "hash")
    found = {split: texts(store, split) for split in SPLITS}
    everything = [text for split in SPLITS for text in found[split]]
    assert sorted(everything) == sorted(f"{e} = {v}" for e, v in generate_listops(0, 200, 10, 40))
    assert all(found.values())
    again = listops("listops", settings)
    assert again.path == store.path
    for changes in ({"listops_seed": 1}, {"listops_count": 199}, {"listops_length": "10-41"}):
        assert listops("listops", settings, **changes).fingerprint != store.fingerprint


def test_expressions_as_text(settings: DataSettings) -> None:
    chosen = DataSettings(cache_dir=settings.cache_dir, listops_count=100, listops_length="10-40")
    store = prepare("listops", "chars", chosen, progress=False)
    text = store.load_tokenizer().decode(store.split("train"))
    assert all(f" {operator} " in text or f"{operator} " in text for operator in OPERATORS)
    assert isinstance(NAMED["listops"].made and NAMED["listops"].made(chosen), Generated)


def bracketed(words: list[str]) -> str:
    """As the Long Range Arena writes them: each operation as nested pairs in round brackets."""
    stack: list[list[str]] = [[]]
    for word in words:
        if word in OPERATORS:
            stack.append([word])
        elif word == "]":
            first, *rest = [*stack.pop(), "]"]
            for part in rest:
                first = f"( {first} {part} )"
            stack[-1].append(first)
        else:
            stack[-1].append(word)
    return stack[0][0]


def test_official_files(tmp_path: Path, settings: DataSettings) -> None:
    rows = list(generate_listops(3, 90, 10, 60))
    assert bracketed(["[MAX", "2", "9", "]"]) == "( ( ( [MAX 2 ) 9 ) ] )"
    for index, name in enumerate(("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")):
        lines = [f"{bracketed(e.split())}\t{v}\r\n" for e, v in rows[index * 30 : index * 30 + 30]]
        (tmp_path / name).write_text("Source\tTarget\r\n" + "".join(lines), newline="")
    store = listops(tmp_path, settings)
    assert store.meta["split"] == "given"
    for index, split in enumerate(SPLITS):
        assert texts(store, split) == [f"{e} = {v}" for e, v in rows[index * 30 : index * 30 + 30]]
    assert store.meta["skipped"]["count"] == 0


def test_wrong_rows_are_skipped_and_named(tmp_path: Path, settings: DataSettings) -> None:
    data = tmp_path / "data"
    data.mkdir()
    good = [f"{e}\t{v}\n" for e, v in generate_listops(4, 80, 5, 30)]
    (data / "mine.tsv").write_text("".join(good[:40]) + "[MAX 1 2 ]\t9\n\nnonsense\n" + "".join(good[40:]))
    (data / "noise.bin").write_bytes(np.random.default_rng(0).bytes(200_000))
    store = listops(data, settings)
    assert store.meta["source"]["documents"] == 80
    assert store.meta["skipped"]["count"] == 2
    assert store.meta["skipped"]["names"][0] == "mine.tsv: 2 wrong rows, the first in line 41 (is 2, not 9)"
    (data / "mine.tsv").unlink()
    with pytest.raises(UserError, match=r"no expressions in .* that can be used \(noise\.bin"):
        listops(data, settings)


def test_prompts() -> None:
    assert LISTOPS.encode_prompt("[MAX 2 ( 9 ) ] =", None) == [IDS[word] for word in ["[MAX", "2", "9", "]", "="]]
    assert LISTOPS.encode_prompt("", None) == [END]
    with pytest.raises(UserError, match='"hello" is no part of an expression'):
        LISTOPS.encode_prompt("hello", None)
    assert MODALITIES["listops"] is LISTOPS


def test_samples_say_what_is_right(tmp_path: Path) -> None:
    def ids(text: str) -> list[int]:
        return LISTOPS.encode_prompt(text, None)

    tokens = [*ids("[SM 7 8 ] = 5"), END, *ids("[MIN 7 8 ] = 5"), END, END, *ids("[MIN 7 8 ]"), END, *ids("[MIN")]
    sample = LISTOPS.write_sample(tokens, None, tmp_path / "0")
    assert sample.text == sample.path.read_text()
    assert sample.text is not None
    assert sample.text.splitlines() == [
        "[SM 7 8 ] = 5    # evaluates to 5, right",
        "[MIN 7 8 ] = 5    # evaluates to 7, wrong",
        "[MIN 7 8 ]    # evaluates to 7",
        "[MIN    # not one whole expression",
    ]

    @hypothesis_settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(-1, 20), max_size=40))
    def check(any_tokens: list[int]) -> None:
        sample = LISTOPS.write_sample(any_tokens, None, tmp_path / "any")
        unknown = sum(not 0 <= token <= END for token in any_tokens)
        assert sample.repaired == (f"{unknown} unknown tokens left out" if unknown else "")
        assert sample.text is not None
        said = [word for line in sample.text.splitlines() for word in line.partition("    #")[0].split()]
        assert said == [WORDS[token] for token in any_tokens if 0 <= token < END]

    check()


def test_reports_ask_for_values(settings: DataSettings) -> None:
    store = listops("listops", settings)
    for count in (1, 4, 50):
        found = LISTOPS.excerpts(store.split("validation"), count, None)
        assert len(found) == count
        for prompt in found:
            text = store.load_tokenizer().decode(prompt)
            assert any(whole.startswith(f"{text} ") for whole in texts(store, "validation"))
            assert LISTOPS.new_tokens(prompt, None) == 2  # the value and the end
    assert LISTOPS.new_tokens([END], None) == LISTOPS.new_tokens([IDS["[MAX"], 3], None) == 200


@pytest.mark.parametrize("length", ["", "50", "50-10", "0-9", "a-b", "-5-9"])
def test_wrong_lengths(length: str) -> None:
    with pytest.raises(UserError, match=f'listops_length is "{length}": give shortest and longest'):
        DataSettings(listops_length=length)
