"""Tokenizers, each in two forms that agree: one that encodes in bulk, one that Hugging Face loads.

All have one special token, `<|endoftext|>`, which ends each document and is bos, eos, pad and unknown in one. It takes
the last id, so that characters and bytes count from 0.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from waveletgpt.data.parallel import in_order
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.hub import fail_soon
from waveletgpt.data.splits import Piece, Spool
from waveletgpt.errors import UserError

END = "<|endoftext|>"
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGITS = dict(zip("0123456789", _NUMBERS, strict=True))
TEXT8 = " abcdefghijklmnopqrstuvwxyz"
LONGEST = 1 << 24
"""A text without any space is cut anywhere after so many bytes."""
_CUT = re.compile(r"(?<=\S)[ \n](?=\S)")
TRAINING_BYTES = 200_000_000
"""The most text that byte-pair encoding is trained on."""


class Encoder(Protocol):
    """Turns pieces of UTF-8 (or of anything, for bytes) into tokens, in bulk, in several threads at once."""

    vocab_size: int
    end: int
    """The token that ends a document."""
    batch: int
    """Bytes of text that are best encoded at a time."""

    def cut(self, block: bytes) -> int:
        """How many bytes of an unfinished document can be encoded by themselves; 0 if more must be known first."""

    def encode(self, pieces: list[bytes]) -> list[np.ndarray]:
        """1-D integer tokens of each piece."""

    def tokenizer(self) -> Any:
        """The same as a `PreTrainedTokenizerFast`."""


def fast(tokenizer: Any, special: str = END, **settings: Any) -> Any:
    """Wrap a `tokenizers.Tokenizer`, with `special` as its one special token; `settings` are saved in `init_kwargs`."""
    from transformers import PreTrainedTokenizerFast

    # Without splitting, "<|endoftext|>" written in a text would end the document.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special, eos_token=special, pad_token=special, unk_token=special,
        clean_up_tokenization_spaces=False, split_special_tokens=True, **settings,
    )  # fmt: skip


def words(vocabulary: Sequence[str], special: str = END, **settings: Any) -> Any:
    """A tokenizer of the words of `vocabulary`, with blanks between them; `special`, the last id, is any other word.

    `settings` are saved with it, and found in its `init_kwargs`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: index for index, word in enumerate([*vocabulary, special])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(tokenizer, special, **settings)


def numbers(size: int, **settings: Any) -> Any:
    """A tokenizer of the numbers 0 .. `size` - 1 in decimal, with blanks between them, and without special tokens.

    `settings` are saved with it, and found in its `init_kwargs`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(size)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **settings)


def last_character(block: bytes) -> int:
    """The length of `block` without a character cut off at its end."""
    for back in range(1, min(4, len(block)) + 1):
        if block[-back] & 0xC0 != 0x80:
            width = 1 if block[-back] < 0x80 else 2 if block[-back] < 0xE0 else 3 if block[-back] < 0xF0 else 4
            return len(block) if width <= back else len(block) - back
    return len(block)


class Characters:
    """One token a character of `alphabet`; a character that is not in it becomes `END`."""

    def __init__(self, alphabet: str, normalizer: Any = None) -> None:
        self.alphabet = alphabet
        self.normalizer = normalizer
        self.end = len(alphabet)
        self.vocab_size = len(alphabet) + 1
        self._table = np.full(0x110000, self.end, np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self._table[[ord(character) for character in alphabet]] = np.arange(len(alphabet))

    batch = 1 << 18  # fits a core's cache, which halves the time
    cut = staticmethod(last_character)

    def encode(self, pieces: list[bytes]) -> list[np.ndarray]:
        return [self._table[codes(piece)] for piece in pieces]

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, decoders, models

        vocabulary = {character: index for index, character in enumerate(self.alphabet)} | {END: self.end}
        # Byte-pair encoding without pairs is one token a character, whatever the text's length.
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=END))
        if self.normalizer is not None:
            tokenizer.normalizer = self.normalizer
        tokenizer.decoder = decoders.Fuse()
        return fast(tokenizer)


def codes(text: bytes) -> np.ndarray:
    """Code points of UTF-8 text, (characters,) integers."""
    if text.isascii():
        return np.frombuffer(text, np.uint8)
    return np.frombuffer(text.decode().encode("utf-32-le"), np.uint32)


Shares = Sequence[tuple[Spool, float]]
"""The data that a vocabulary is found from: spools, and how much each counts."""


def fit_text8(shares: Shares, settings: DataSettings) -> Encoder:
    return Characters(TEXT8, text8_normalizer())


def fit_chars(shares: Shares, settings: DataSettings) -> Encoder:
    """The alphabet of the training data, in the order of code points, or that of the tokenizer the settings name."""
    if settings.tokenizer:
        known = load(settings.tokenizer).get_vocab()
        alphabet = sorted(known.keys() - {END}, key=known.__getitem__)
        if any(len(character) > 1 for character in alphabet) or known.get(END) != len(alphabet):
            raise UserError(f"tokenizer {settings.tokenizer} is no alphabet: name the folder of a model of characters")
        return Characters("".join(alphabet))
    seen = np.zeros(0x110000, bool)

    def note(piece: Piece) -> None:
        found = codes(piece.data)
        if not seen[found].all():  # looking is quicker than writing
            seen[found] = True

    for spool, _ in shares:
        for _ in in_order(note, spool.pieces(last_character, "train", size=Characters.batch)):
            pass
    return Characters("".join(map(chr, np.flatnonzero(seen))))


@functools.cache
def text8_normalizer() -> Any:
    """The convention of text8 as a `tokenizers` normalizer: the definition that the bulk form follows."""
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Replace(Regex("[^A-Za-z0-9]"), " "),
            normalizers.Lowercase(),
            *(normalizers.Replace(digit, f" {name} ") for digit, name in DIGITS.items()),
            normalizers.Replace(Regex(" +"), " "),
        ]
    )


class _Table(dict[int, str]):
    """Code point -> what the normalizer makes of it, found when first met."""

    def __missing__(self, code: int) -> str:
        self[code] = result = text8_normalizer().normalize_str(chr(code))
        return result


@functools.cache
def text8_table() -> dict[int, str]:
    """For `str.translate`; runs of spaces remain to be collapsed."""
    return _Table()


class Bytes:
    """Token = byte."""

    vocab_size = 257
    end = 256
    batch = 1 << 20

    def cut(self, block: bytes) -> int:
        return len(block)

    def encode(self, pieces: list[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(piece, np.uint8) for piece in pieces]

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {character: byte for byte, character in enumerate(byte_characters())} | {END: self.end}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return fast(tokenizer)


def byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself where it is visible, else from U+0100 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


def fit_bytes(shares: Shares, settings: DataSettings) -> Encoder:
    return Bytes()


class HuggingFace:
    """Any Hugging Face tokenizer. It needs fifty bytes of memory per byte of text, so batches are small."""

    batch = 1 << 20

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.end = tokenizer.eos_token_id
        self._one_thread = threading.Lock()

    def cut(self, block: bytes) -> int:
        """Before a lone space or after a lone line end: byte-level tokenizers cut there anyway, so the pieces add up.

        Others may differ from the whole by a token, once in `BLOCK` bytes.
        """
        end = last_character(block)
        for window in (1 << 14, end):
            start = max(0, end - window)
            start += next(i for i in range(4) if start + i == end or block[start + i] & 0xC0 != 0x80)
            text = block[start:end].decode()
            places = [match.start() + (match.group() == "\n") for match in _CUT.finditer(text)]
            if places:
                return start + len(text[: places[-1]].encode())
        return end if len(block) > LONGEST else 0

    def encode(self, pieces: list[bytes]) -> list[np.ndarray]:
        texts = [piece.decode() for piece in pieces]
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            with self._one_thread:  # those in Python are not made for several
                found = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            return [np.array(ids, np.uint32) for ids in found]
        return [np.array(one.ids, np.uint32) for one in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def tokenizer(self) -> Any:
        return self._tokenizer


def fit_bpe(shares: Shares, settings: DataSettings) -> Encoder:
    """Byte-level pairs learned from the training splits, or the tokenizer that the settings name."""
    if settings.tokenizer:
        return HuggingFace(load(settings.tokenizer))
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if settings.vocab_size < 257:
        raise UserError(f"vocab_size is {settings.vocab_size}: bpe needs 257 or more, for the bytes and {END}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size - 1, initial_alphabet=byte_characters(), special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(_training_text(shares), trainer)
    tokenizer.add_special_tokens([END])
    return HuggingFace(fast(tokenizer))


def _training_text(shares: Shares) -> Iterator[str]:
    """Text of each spool by its weight, a small one several times over."""
    total = min(TRAINING_BYTES, sum(spool.sizes["train"] for spool, _ in shares))
    for spool, weight in shares:
        times, rest = divmod(weight * total / max(1, spool.sizes["train"]), 1)
        for share in [1.0] * int(times) + [rest] * (rest > 0):
            seen = taken = 0
            for piece in spool.pieces(last_character, "train"):
                seen += len(piece.data)
                if taken <= share * seen:
                    taken += len(piece.data)
                    yield piece.data.decode()


def load(name: str) -> Any:
    """The Hugging Face tokenizer of this name or in this folder, with a token that ends documents."""
    from transformers import AutoTokenizer

    if not Path(name).is_dir():
        fail_soon()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'tokenizer "{name}" cannot be loaded ({reason}): give a folder or a hub name') from error
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": END})
    tokenizer.split_special_tokens = True
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def no_settings(settings: DataSettings) -> dict[str, Any]:
    """Nothing to set, and no tokenizer to name."""
    if settings.tokenizer:
        raise UserError(
            f'tokenizer "{settings.tokenizer}" goes with `modality=bpe` or `modality=chars` only: leave one of the two '
            "out"
        )
    return {}


def chars_settings(settings: DataSettings) -> dict[str, Any]:
    """The alphabet, where it is not that of the data."""
    return {"tokenizer": known_by(settings.tokenizer)} if settings.tokenizer else {}


def bpe_settings(settings: DataSettings) -> dict[str, Any]:
    """The size to train, or the tokenizer."""
    return {"tokenizer": known_by(settings.tokenizer)} if settings.tokenizer else {"vocab_size": settings.vocab_size}


def known_by(name: str) -> str:
    """What tells one Hugging Face model from another: its name on the hub, for a folder a hash of its files."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    content = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        content.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as handle:  # weights may lie beside the tokenizer
            while chunk := handle.read(1 << 20):
                content.update(chunk)
    return content.hexdigest()
