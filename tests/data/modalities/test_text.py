"""Round trips, and that tokens written in bulk are those of the saved tokenizer."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from waveletgpt.data import MODALITIES, DataSettings, TokenStore, prepare
from waveletgpt.data.modalities import encoders
from waveletgpt.data.modalities.encoders import END, Bytes, Characters, HuggingFace, fit_bpe, load, text8_normalizer
from waveletgpt.data.modalities.text import Block, Text8, Utf8
from waveletgpt.data.splits import Spool
from waveletgpt.errors import UserError

TEXT8 = set(string.ascii_lowercase + " ")
# Everything that UTF-8 can hold, with what matters here made likely: digits, blanks, accents, emoji, the special token.
LIKELY = [END, "  ", "👩‍👩‍👧", "e\u0301", "한국", "\0", "'ll"]
texts = st.lists(st.text() | st.text("aB 09\n\t.éß½ﬁ") | st.sampled_from(LIKELY), max_size=8).map("".join)
quick = hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def normalised(normaliser: Any, text: str, chunk: int) -> str:
    data = text.encode()
    pieces = [normaliser(data[start : start + chunk], False) for start in range(0, len(data), chunk)]
    return b"".join([*pieces, normaliser(b"", True)]).decode()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Any]:
    """saved(encoder): its tokenizer, saved and loaded as a model's would be."""
    from transformers import AutoTokenizer

    def reload(encoder: Any) -> Any:
        path = tmp_path_factory.mktemp("tokenizer")
        encoder.tokenizer().save_pretrained(path)
        return AutoTokenizer.from_pretrained(path)

    return reload


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    with Spool(tmp_path_factory.mktemp("spool")) as spool:
        sample = "Don't the waves of the small scale wave? They'll wave 1234 times, über alles.\n\n  Indented\n" * 50
        spool.end_document("train", spool.write(sample.encode()))
        spool.divide(DataSettings())
        encoder = fit_bpe([(spool, 1.0)], DataSettings(vocab_size=400))
    assert isinstance(encoder, HuggingFace)
    return encoder


def test_one_special_token_with_the_last_id(saved: Callable[[Any], Any], bpe: HuggingFace) -> None:
    for encoder, size in ((Characters(" ab"), 4), (Bytes(), 257), (bpe, bpe.vocab_size)):
        tokenizer = saved(encoder)
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        assert ends == {encoder.end} == {size - 1}
        assert len(tokenizer) == encoder.vocab_size == size
        assert tokenizer.all_special_tokens == [END]


def test_bytes_are_their_own_ids(saved: Callable[[Any], Any]) -> None:
    tokenizer = saved(Bytes())

    @quick
    @given(texts)
    def check(text: str) -> None:
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode()) == Bytes().encode([text.encode()])[0].tolist()
        assert tokenizer.decode(ids) == text

    check()


def test_any_tokens_decode_and_make_a_sample(saved: Callable[[Any], Any], tmp_path: Path) -> None:
    tokenizer = saved(Bytes())

    @quick
    @given(st.lists(st.integers(-2, 258), max_size=50))
    def check(any_tokens: list[int]) -> None:
        sample = MODALITIES["bytes"].write_sample(any_tokens, tokenizer, tmp_path / "sample")
        tokens = [token for token in any_tokens if 0 <= token <= 256]
        unknown = len(any_tokens) - len(tokens)
        assert sample.repaired == (f"{unknown} unknown tokens left out" if unknown else "")
        parts = [bytes(part).decode("utf-8", "replace") for part in _divided(tokens, 256)]
        assert sample.text == END.join(parts)
        assert sample.path.read_bytes().decode() == sample.text

    check()


def _divided(tokens: list[int], end: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_bpe_round_trip_and_bulk(saved: Callable[[Any], Any], bpe: HuggingFace) -> None:
    tokenizer = saved(bpe)

    @quick
    @given(texts)
    def check(text: str) -> None:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert ids == bpe.encode([text.encode()])[0].tolist()

    check()


@given(text=texts)
@quick
def test_bpe_pieces_add_up_to_the_whole(text: str, bpe: HuggingFace) -> None:
    data = text.encode()
    length = bpe.cut(data)
    pieces = bpe.encode([data[:length], data[length:]])
    assert np.concatenate(pieces).tolist() == bpe.encode([data])[0].tolist()


def test_text8_convention() -> None:
    def convert(text: str) -> str:
        return normalised(Text8(), text, 1 << 20)

    assert convert("The 42nd,  Café—Noël!\n") == "the four two nd cafe noel "
    assert convert("naïve Ⅷ ½ ﬁn") == "naive viii one two fin"
    assert convert("already plain text") == "already plain text"


@given(text=texts, chunk=st.integers(1, 7))
@quick
def test_text8_in_chunks_is_the_normalizer_of_the_tokenizer(text: str, chunk: int) -> None:
    result = normalised(Text8(), text.lstrip("\ufeff"), chunk)
    assert result == text8_normalizer().normalize_str(text.lstrip("\ufeff"))
    assert set(result) <= TEXT8
    assert "  " not in result


ALPHABET = "".join(sorted(set("abc é한😀\n<|>endoftx")))


@pytest.mark.parametrize(
    ("encoder", "normalise"),
    [(Characters(" " + string.ascii_lowercase, text8_normalizer()), Text8), (Characters(ALPHABET), Utf8)],
    ids=["text8", "chars"],
)
def test_text8_and_chars_tokens(encoder: Characters, normalise: Any, saved: Callable[[Any], Any]) -> None:
    tokenizer = saved(encoder)

    @quick
    @given(texts)
    def check(text: str) -> None:
        text = text.lstrip("\ufeff")  # a byte order mark goes before the tokenizer sees it
        form = normalised(normalise(), text, 1 << 20)
        ids = tokenizer(text)["input_ids"]
        assert ids == encoder.encode([form.encode()])[0].tolist()
        known = [character if character in encoder.alphabet else END for character in form]
        assert tokenizer.decode(ids) == "".join(known)

    check()


@given(data=st.binary(max_size=60), chunk=st.integers(1, 5))
@example(data=b"\xef", chunk=1)
@example(data=b"\xef\xbb\xbf\xef\xbb\xbfa", chunk=2)
@quick
def test_wrong_utf8_is_replaced_and_chunks_do_not_matter(data: bytes, chunk: int) -> None:
    normaliser = Utf8()
    pieces = [normaliser(data[start : start + chunk], False) for start in range(0, len(data), chunk)]
    assert b"".join([*pieces, normaliser(b"", True)]).decode() == data.decode("utf-8-sig", "replace")


@given(
    text=st.text("aB 09\n\t.éß½ﬁ東\u0301", max_size=60),
    wrong=st.binary(max_size=6),
    lengths=st.lists(st.integers(0, 9), min_size=1),
)
@quick
@pytest.mark.parametrize("kind", [Utf8, Text8])
def test_blocks_are_worked_on_in_any_order(kind: type[Utf8], text: str, wrong: bytes, lengths: list[int]) -> None:
    """A document cut at any places, its blocks done backwards, is the document as a whole; wrong bytes, too."""
    data = b"plain words " * (len(text) % 3) + text.encode()[: len(text)] + wrong + text.encode()
    cut = kind()
    blocks, rest = [], data
    for length in lengths * 20:
        blocks.append(Block(cut.cut(rest[:length], False), cut, 0, 0, False, None))
        rest = rest[length:]
    blocks.append(Block(cut.cut(rest, True), cut, 0, 0, False, None))
    done = [block.normaliser.work(block.data) for block in reversed(blocks)]
    assert b"".join(map(cut.join, reversed(done))) == kind()(data, True)


@given(text=texts)
@quick
def test_text8_of_few_letters_beyond_ascii(text: str) -> None:
    """Where they are so few that they are looked for one by one."""
    text = f"Of ordinary words there are {len(text)} times more. " * (1 + len(text)) + text
    assert normalised(Text8(), text, len(text) + 9) == text8_normalizer().normalize_str(text)


@pytest.mark.parametrize("modality", ["text8", "chars", "bytes", "bpe"])
def test_store_is_what_the_tokenizer_says(modality: str, folder: Path, settings: DataSettings) -> None:
    store = prepare(folder, modality, DataSettings(cache_dir=settings.cache_dir, vocab_size=300), progress=False)
    tokenizer = store.load_tokenizer()
    assert len(tokenizer) == store.vocab_size
    documents = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))]
    expected = sorted(tuple(tokenizer(text)["input_ids"]) for text in documents)
    found = []
    for split in ("train", "validation", "test"):
        tokens = store.split(split)
        ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
        assert ends[-1] == len(tokens) - 1
        found += [tuple(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]
        assert len(ends) == store.meta["splits"][split]["documents"]
    if modality == "chars":  # a character that only held-out text has is unknown, which looks like an end
        assert len(found) >= len(expected)
    else:
        assert sorted(found) == expected
    text = "".join(documents)
    size = len(text.encode()) if modality != "text8" else sum(len(normalised(Text8(), d, 1 << 20)) for d in documents)
    assert sum(store.meta["splits"][split]["bytes"] for split in store.meta["splits"]) == size
    counts = store.meta["splits"]["validation"]
    assert store.bytes_per_token("validation") == pytest.approx(counts["bytes"] / counts["tokens"])


def test_chars_knows_the_training_split_only(tmp_path: Path, settings: DataSettings) -> None:
    file = tmp_path / "book.txt"
    file.write_text("abc " * 1000 + "z" * 200 + "é" * 10, encoding="utf-8")
    store = prepare(file, None, settings, progress=False)
    assert store.modality == "chars"
    assert store.vocab_size == len(" abc") + 1
    tokenizer = store.load_tokenizer()
    assert tokenizer("aéz")["input_ids"] == [1, tokenizer.eos_token_id, tokenizer.eos_token_id]
    assert int(store.split("test").max()) == tokenizer.unk_token_id


def test_bpe_is_trained_on_the_training_split_only(tmp_path: Path, settings: DataSettings) -> None:
    file = tmp_path / "book.txt"
    file.write_text("abab cdcd " * 1000 + "zqzqzq " * 100, encoding="utf-8")
    chosen = DataSettings(cache_dir=settings.cache_dir, vocab_size=300, validation_fraction=0.1, test_fraction=0.1)
    vocabulary = prepare(file, "bpe", chosen, progress=False).load_tokenizer().get_vocab()
    assert "Ġcdcd" in vocabulary
    assert not any("zq" in word for word in vocabulary)


def test_a_tokenizer_by_folder(tmp_path: Path, folder: Path, settings: DataSettings, bpe: HuggingFace) -> None:
    where = tmp_path / "own-tokenizer"
    bpe.tokenizer().save_pretrained(where)
    chosen = DataSettings(cache_dir=settings.cache_dir, tokenizer=str(where))
    store = prepare(folder, None, chosen, progress=False)
    assert store.modality == "bpe"
    assert store.vocab_size == bpe.vocab_size
    assert store.load_tokenizer()("They'll wave")["input_ids"] == bpe.encode([b"They'll wave"])[0].tolist()
    with pytest.raises(UserError, match="goes with `modality=bpe`"):
        prepare(folder, "text8", chosen, progress=False)


def test_a_tokenizer_that_adds_tokens_and_has_no_end(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[CLS]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", cls_token="[CLS]").save_pretrained(tmp_path)
    encoder = HuggingFace(load(str(tmp_path)))
    assert encoder.encode([b"a b [CLS]"])[0].tolist()[:2] == [2, 3]
    assert 0 not in encoder.encode([b"a b [CLS]"])[0]
    assert encoder.end == 4
    assert encoder.vocab_size == 5


def test_prompts_and_samples(tmp_path: Path, folder: Path, settings: DataSettings) -> None:
    store = prepare(folder, "text8", settings, progress=False)
    tokenizer = store.load_tokenizer()
    kind = MODALITIES["text8"]
    tokens = kind.encode_prompt("The 1st", tokenizer)
    assert tokenizer.decode(tokens) == "the one st"
    assert kind.encode_prompt("", tokenizer) == [tokenizer.eos_token_id]
    sample = kind.write_sample([*tokens, tokenizer.eos_token_id], tokenizer, tmp_path / "sample.0")
    assert (sample.kind, sample.path) == ("text", tmp_path / "sample.0.txt")
    assert sample.text == sample.path.read_text() == "the one st<|endoftext|>"


def test_no_token_beyond_the_characters_that_end_a_document(tmp_path: Path, settings: DataSettings) -> None:
    file = tmp_path / "book.txt"
    file.write_text(("write <|endoftext|> here " * 400), encoding="utf-8")
    for modality in ("chars", "bytes", "bpe"):
        store: TokenStore = prepare(file, modality, settings, progress=False)
        end = store.load_tokenizer().eos_token_id
        assert sum(int((store.split(split) == end).sum()) for split in ("train", "validation", "test")) == 1


def test_large_document_in_pieces_is_the_whole(
    tmp_path: Path, settings: DataSettings, prose: Callable[[int, int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from waveletgpt.data import splits
    from waveletgpt.data.modalities import text

    monkeypatch.setattr(splits, "BLOCK", 1000)
    monkeypatch.setattr(text, "BATCH", 1500)
    file = tmp_path / "book.txt"
    content = prose(6000)
    file.write_text(content, encoding="utf-8")
    for modality in ("chars", "bpe"):
        store = prepare(file, modality, DataSettings(cache_dir=settings.cache_dir, vocab_size=300), progress=False)
        tokenizer = store.load_tokenizer()
        whole = np.concatenate([store.split(split) for split in ("train", "validation", "test")])
        assert tokenizer.decode(whole[:-1].tolist()) == content
        train = store.split("train").tolist()
        assert tokenizer(tokenizer.decode(train))["input_ids"] == train


def test_pairs_are_the_same_however_the_text_is_grouped(prose: Callable[[int, int], str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    sample = prose(2000, 0)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([sample], trainer)
    tokenizer.add_special_tokens([END])
    # Of a few bytes and of more than a group has, in no order.
    pieces = [prose(words, seed) for seed, words in enumerate((3, 1, 180_000, 0, 2, 60_000, 60_000, 60_000, 5))]
    found = HuggingFace(encoders.fast(tokenizer)).encode([piece.encode() for piece in pieces])
    assert [ids.tolist() for ids in found] == [tokenizer.encode(piece).ids for piece in pieces]
