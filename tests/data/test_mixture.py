"""Mixtures: shares, one vocabulary, batches that depend on the seed and the index alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import tiny_recipe
from waveletgpt.cli.main import parse
from waveletgpt.data import DataSettings, prepare
from waveletgpt.data.mixture import Mixture, parse_mixture
from waveletgpt.data.modalities.encoders import _training_text
from waveletgpt.data.splits import Spool
from waveletgpt.data.windows import FixedWindows, MixedWindows, RandomWindows, fixed_mixture
from waveletgpt.errors import UserError
from waveletgpt.training.task import LanguageModeling

WEIGHTS = st.lists(st.floats(0.01, 10), min_size=2, max_size=5)


def mixed(weights: list[float], seed: int, length: int = 1 << 40) -> MixedWindows:
    """Source k holds nothing but the token k."""
    shares = [weight / sum(weights) for weight in weights]
    parts = [RandomWindows(np.full(100 + k, k, np.uint16), 7, length, seed) for k in range(len(weights))]
    return MixedWindows(parts, shares, seed)


@hypothesis.settings(max_examples=25)
@given(WEIGHTS, st.integers(0, 2**31), st.integers(0, 1 << 32), st.integers(1, 64))
def test_shares_are_the_weights_within_a_hundredth_from_wherever(
    weights: list[float], seed: int, start: int, step: int
) -> None:
    data = mixed(weights, seed)
    count = Counter(data.source(start + step * i) for i in range(2000))  # one of `step` processes' share of the batches
    for k, weight in enumerate(weights):
        assert abs(count[k] / 2000 - weight / sum(weights)) < 0.01


def test_a_batch_depends_on_the_seed_and_the_index_alone() -> None:
    data = mixed([0.7, 0.3], 5)
    assert len(data) == 1 << 40
    forward = [data[i]["input_ids"].tolist() for i in range(50)]
    again = mixed([0.7, 0.3], 5)
    assert [again[i]["input_ids"].tolist() for i in reversed(range(50))] == forward[::-1]
    assert all(set(row) == {data.source(i)} for i, row in enumerate(forward))
    assert [mixed([0.7, 0.3], 6).source(i) for i in range(50)] != [data.source(i) for i in range(50)]


@hypothesis.settings(max_examples=30)
@given(WEIGHTS, st.integers(1, 100), st.data())
def test_held_out_windows_are_shared_out_by_weight(weights: list[float], length: int, data: st.DataObject) -> None:
    shares = [weight / sum(weights) for weight in weights]
    there = [data.draw(st.integers(1, 150)) for _ in weights]
    sources = [np.full(8 * n + 1, k, np.uint16) for k, n in enumerate(there)]
    found = fixed_mixture(sources, shares, 8, length)
    count = Counter(int(found[i]["input_ids"][0]) for i in range(len(found)))
    assert 1 <= len(found) <= length
    for k, share in enumerate(shares):
        assert count[k] <= there[k]
        assert abs(count[k] - share * len(found)) <= 1 or count[k] == there[k]
    if all(n >= share * length for n, share in zip(there, shares, strict=True)):
        assert len(found) >= length - len(weights)


def test_one_source_is_what_it_was() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    one = fixed_mixture([tokens], [1.0], 10, 7)
    assert isinstance(one, FixedWindows)
    assert one.starts == FixedWindows(tokens, 10, 7).starts


@pytest.fixture
def files(tmp_path: Path, prose: Callable[[int, int], str]) -> list[str]:
    (tmp_path / "a.txt").write_text(prose(3000, 1).replace("a", "ä"), encoding="utf-8")
    (tmp_path / "b.txt").write_text("xyz! " + prose(2000, 2).upper() + " xyz!" * 200, encoding="utf-8")
    return [f"{tmp_path}/a.txt=7", f"{tmp_path}/b.txt=3"]


@pytest.mark.parametrize("modality", ["bytes", "text8", "chars", "bpe"])
def test_one_vocabulary_for_all_sources(modality: str, files: list[str], settings: DataSettings) -> None:
    settings = DataSettings(cache_dir=settings.cache_dir, vocab_size=300)
    store = prepare(files, modality, settings, progress=False)
    assert isinstance(store, Mixture)
    assert [part.weight for part in store.parts] == [0.7, 0.3]
    tokenizer = store.load_tokenizer()
    for part, letters in zip(store.parts, ("ä", "xyz!"), strict=True):
        tokens = part.store.split("train")
        assert tokens.max() < store.vocab_size
        text = tokenizer.decode([int(t) for t in tokens])
        assert letters.replace("!", "") in text or modality == "text8"
        # In characters nothing of the training data is unknown, whichever source it is of.
        assert tokenizer.eos_token_id not in tokens[:-1]
    if modality in ("bytes", "text8"):
        for part in store.parts:  # what a source by itself is prepared to
            assert prepare(part.name, modality, settings, progress=False).path == part.store.path
    again = prepare(files, modality, settings, progress=False)
    assert again.fingerprint == store.fingerprint
    other = prepare([file.replace("=3", "=4") for file in files], modality, settings, progress=False)
    assert other.fingerprint != store.fingerprint
    opened = Mixture.opened(json.loads(json.dumps(store.describe())))
    assert opened.fingerprint == store.fingerprint


def test_the_text_that_pairs_are_learned_from_has_the_weights(tmp_path: Path) -> None:
    shares = []
    for letter, size, weight in ((b"a", 1_000_000, 0.25), (b"b", 5_000_000, 0.75)):
        (tmp_path / letter.decode()).mkdir()
        spool = Spool(tmp_path / letter.decode())
        for _ in range(size // 10_000):
            spool.end_document("train", spool.write(letter * 10_000))
        for split in ("validation", "test"):
            spool.end_document(split, spool.write(b"?"))
        spool.divide(DataSettings(), own={"train", "validation", "test"})
        shares.append((spool, weight))
    count: Counter[str] = Counter()
    for text in _training_text(shares):
        count[text[0]] += len(text)
    # The small source several times over.
    assert count["a"] / count.total() == pytest.approx(0.25, abs=0.01)
    assert count.total() == pytest.approx(sum(spool.sizes["train"] for spool, _ in shares), rel=0.01)


def test_the_characters_of_another_run(files: list[str], settings: DataSettings) -> None:
    first = prepare(files[0].rpartition("=")[0], "chars", settings, progress=False)
    named = DataSettings(cache_dir=settings.cache_dir, tokenizer=str(first.path / "tokenizer"))
    second = prepare(files[1].rpartition("=")[0], "chars", named, progress=False)
    assert second.vocab_size == first.vocab_size
    assert (second.path / "tokenizer/tokenizer.json").read_bytes() == (
        first.path / "tokenizer/tokenizer.json"
    ).read_bytes()
    pairs = prepare(
        files[0].rpartition("=")[0], "bpe", DataSettings(cache_dir=settings.cache_dir, vocab_size=300), progress=False
    )
    with pytest.raises(UserError, match="is no alphabet"):
        prepare(
            files[1].rpartition("=")[0],
            "chars",
            DataSettings(cache_dir=settings.cache_dir, tokenizer=str(pairs.path / "tokenizer")),
            progress=False,
        )


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["a=0", "b=1"], '"a=0": the weight 0 is not above 0'),
        (["a=-1", "b=1"], "the weight -1 is not above 0"),
        (["a=nan", "b=1"], "the weight nan is not above 0"),
        (["a=inf", "b=1"], "the weight inf is not above 0 and finite"),
        (["a=much", "b=1"], 'the weight "much" is no number'),
        (["a=", "b=1"], 'the weight "" is no number'),
        (["a", "b=1"], '"a" has none: write a=0.5'),
        (["a=1", "b=1", "a=2"], "a is in the mixture twice"),
        (["tests=1", "./tests=2"], "./tests is in the mixture twice, once as tests"),
        (["a=1"], "a mixture has two sources or more"),
    ],
)
def test_weights_that_are_none(sources: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("./", r"\./")) as caught:
        parse_mixture(sources)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_mixed(tmp_path: Path, files: list[str], settings: DataSettings) -> None:
    copy = tmp_path / "copy" / "a.txt"
    copy.parent.mkdir()
    copy.write_bytes((tmp_path / "a.txt").read_bytes())
    with pytest.raises(UserError, match="hold the same data"):
        prepare([files[0], f"{copy}=1"], "bytes", settings, progress=False)
    for name in ("x.mid", "y.mid"):
        (tmp_path / "midi").mkdir(exist_ok=True)
        (tmp_path / "midi" / name).write_bytes(b"MThd")
    with pytest.raises(UserError, match=r"is taken as chars, .* as music, and a mixture has one kind of tokens"):
        prepare([files[0], f"{tmp_path}/midi=1"], None, settings, progress=False)


def test_a_mixture_is_trained_on_as_its_parts_say(files: list[str], settings: DataSettings) -> None:
    store = prepare(files, "bytes", settings, progress=False)
    task, recipe = LanguageModeling(store), tiny_recipe(eval_windows=20)
    model = task.build_model(recipe)
    assert len(task.eval_data(recipe, model)) == 20
    train = task.train_data(recipe, model, 100)
    assert isinstance(train, MixedWindows)
    assert abs(Counter(map(train.source, range(100)))[0] - 70) <= 2
    told = task.describe(files)
    assert told["name"] == " ".join(files)
    assert [part["weight"] for part in told["mixture"].values()] == [0.7, 0.3]
    size = task.store.bytes_per_token("train")
    assert size is not None
    assert math.isclose(size, sum(p.weight * (p.store.bytes_per_token("train") or 0) for p in task.parts))
    short = Mixture(store.parts)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"the validation split of .*a\.txt has"):
        LanguageModeling(short).build_model(tiny_recipe(n_positions=2000))


def test_the_command_line_takes_one_name_or_several(tmp_path: Path) -> None:
    assert parse("train", ["imdb"]).data == ("imdb",)
    assert parse("train", []).data == ("python-stdlib",)
    assert parse("train", ["--out", "x", "a=1", "b=2", "--seed", "3"]).data == ("a=1", "b=2")
    assert parse("compare", ["a=1", "b=2", "--arms", "none", "fixed"]).data == ("a=1", "b=2")
    recipe = tmp_path / "recipe.yaml"
    for text, data in (("imdb", ("imdb",)), ("[a=0.7, b=0.3]", ("a=0.7", "b=0.3"))):
        recipe.write_text(f"data: {text}\n")
        assert parse("ladder", ["--recipe", str(recipe)]).data == data
    assert parse("train", ["c", "--recipe", str(recipe)]).data == ("c",)
    recipe.write_text("data: [1, 2]\n")
    with pytest.raises(UserError, match="data is"):
        parse("train", ["--recipe", str(recipe)])
    from waveletgpt.cli.data import named

    there = tmp_path / "lr=1"
    there.touch()
    assert named((str(there),)) == str(there)
    assert named(("a=1",)) == ["a=1"]
    assert named(("https://host/file?version=1",)) == "https://host/file?version=1"
    assert named(("a=1", "b=2")) == ["a=1", "b=2"]
