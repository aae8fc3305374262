"""Nested operations on digits: the modality `listops`, and the data set of that name, generated from a seed.

    [MAX 2 9 [MIN 4 7 ] 0 ] = 9

The grammar, the values and the lengths are those of the Long Range Arena (Tay et al. 2020,
https://arxiv.org/abs/2011.04006, after Nangia and Bowman 2018, https://arxiv.org/abs/1804.06028): an expression is a
digit with probability 3/4, and always at the greatest depth; else one of 4 operators with 2 to 10 expressions, all
equally likely. Expressions are drawn until one has a permitted length. Here many are drawn at once, level by level, and
only those of a permitted length are written out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from waveletgpt.data.modalities import encoders
from waveletgpt.data.modalities.modality import SampleFile, counted
from waveletgpt.data.progress import bar
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.files import Document, Source, report_skipped
from waveletgpt.data.splits import Spool, point_of, split_of
from waveletgpt.data.store import SPLITS, StoreWriter
from waveletgpt.errors import UserError

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
"""Smallest, largest, median (of an even number the mean of the middle two, rounded down), sum modulo 10."""
CLOSE, EQUALS = "]", "="
WORDS = (*"0123456789", *OPERATORS, CLOSE, EQUALS)
IDS = {word: index for index, word in enumerate(WORDS)}
END = len(WORDS)
OPERATOR_SHARE = 0.25
"""Probability that an expression is an operation, above the greatest depth."""
OFFICIAL = {"basic_train.tsv": "train", "basic_val.tsv": "validation", "basic_test.tsv": "test"}
"""The files of the Long Range Arena and their splits."""

LONGEST_LINE = 1 << 24
"""Longest line, in bytes. Longer ones are cut, because the file may not be a table."""

_WRONG_ROWS = 1000
"""If this many rows at a file's start are not expressions, the rest is not read."""
_TREES = 4096
"""Number of expressions drawn at a time."""
_PATIENCE = 250
"""After this many draws without a new expression of a permitted length, the search ends."""


def generate_listops(
    seed: int,
    count: int,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_args: int = 10,
) -> Iterator[tuple[str, int]]:
    """`count` different expressions and their values, the same for the same seed and settings.

    An expression is a text of `min_length` to `max_length` words separated by blanks. `[MAX 2 9 ]` has 4, as an
    operator's bracket belongs to its word. (Those of the Long Range Arena have 501 to 1999.)
    Raises UserError if there are fewer than `count`.
    """
    if not (1 <= min_length <= max_length and max_depth >= 1 and max_args >= 2):
        raise UserError(
            f"listops: min_length {min_length}, max_length {max_length}, max_depth {max_depth}, max_args {max_args}: "
            "lengths and depth must be at least 1, in order, and args at least 2"
        )
    random = np.random.default_rng(seed)
    words = np.array(WORDS, object)
    seen: set[bytes] = set()
    fruitless = 0
    while len(seen) < count:
        before = len(seen)
        for tokens, value in _draw(random, min_length, max_length, max_depth, max_args):
            digest = hashlib.blake2b(tokens.data, digest_size=12).digest()
            if digest not in seen and len(seen) < count:
                seen.add(digest)
                yield " ".join(words[tokens]), value
        fruitless = 0 if len(seen) > before else fruitless + 1
        if fruitless == _PATIENCE:
            raise UserError(
                f"found only {before} of {count} different expressions of {min_length} to {max_length} tokens: "
                "ask for fewer, or for other lengths"
            )


def _draw(
    random: np.random.Generator, min_length: int, max_length: int, max_depth: int, max_args: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Draws `_TREES` expressions; yields those of a permitted length: tokens (T,) uint8, value.

    One array holds the nodes of all trees at one depth, in order. The next array holds their children: `arguments[d]`
    is the number of children of each node, 0 for a digit.
    """
    tree = np.arange(_TREES)
    length = np.zeros(_TREES, np.int64)
    trees, arguments = [], []
    for depth in range(1, max_depth + 1):
        share = OPERATOR_SHARE if depth < max_depth else 0.0
        operator = random.random(len(tree)) < share
        count = np.where(operator, random.integers(2, max_args + 1, len(tree)), 0)
        length += np.bincount(tree, 1 + operator, _TREES).astype(np.int64)
        trees.append(tree)
        arguments.append(count)
        tree = np.repeat(tree, count)
        fits = length + np.bincount(tree, minlength=_TREES) <= max_length  # a tree that is too long stops growing
        tree = tree[fits[tree]]
        length[~fits] = max_length + 1
    good = (length >= min_length) & (length <= max_length)
    arguments = [count[good[tree]] for tree, count in zip(trees, arguments, strict=True)]
    if not good.any():
        return

    # From the leaves up: how long each node's expression is, and its value.
    sizes: list[np.ndarray] = []
    nodes: list[np.ndarray] = []
    size = value = np.empty(0, np.int64)
    for count in reversed(arguments):
        node = random.integers(0, 10, len(count))
        below_size, below_value = size, value
        size, value = np.ones(len(count), np.int64), node.copy()
        operator = count > 0
        if operator.any():
            kind = random.integers(0, len(OPERATORS), int(operator.sum()))
            node[operator] = 10 + kind
            starts = np.cumsum(count[operator]) - count[operator]
            size[operator] = 2 + np.add.reduceat(below_size, starts)
            value[operator] = _apply(kind, below_value, starts, count[operator])
        sizes.append(size)
        nodes.append(node)
    sizes.reverse()
    nodes.reverse()

    # From the roots down: where each node stands.
    ends = np.cumsum(sizes[0])
    tokens = np.empty(ends[-1], np.uint8)
    place = ends - sizes[0]
    for depth, (count, size, node) in enumerate(zip(arguments, sizes, nodes, strict=True)):
        operator = count > 0
        tokens[place] = node
        tokens[(place + size - 1)[operator]] = IDS[CLOSE]
        if operator.any():
            below = sizes[depth + 1]
            starts = np.cumsum(count[operator]) - count[operator]
            offset = np.cumsum(below) - below
            place = offset + np.repeat(place[operator] + 1 - offset[starts], count[operator])
        else:
            break
    yield from zip(np.split(tokens, ends[:-1]), value.tolist(), strict=True)


def _apply(kind: np.ndarray, values: np.ndarray, starts: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The value of each operation: operator `kind` on the `count` values from `starts` on in `values`."""
    ordered = values[np.lexsort((values, np.repeat(np.arange(len(count)), count)))]
    return np.choose(
        kind,
        [
            ordered[starts],
            ordered[starts + count - 1],
            (ordered[starts + (count - 1) // 2] + ordered[starts + count // 2]) // 2,
            np.add.reduceat(values, starts) % 10,
        ],
    )


def evaluate(words: Sequence[str]) -> int:
    """The value of an expression, given as words. Raises ValueError if it is not an expression."""
    open_: list[tuple[str, list[int]]] = [("", [])]
    for word in words:
        if word in OPERATORS:
            open_.append((word, []))
        elif word == CLOSE:
            operator, values = open_.pop()
            if not operator or not values:
                raise ValueError(f'"{CLOSE}" without an operation of one value or more')
            open_[-1][1].append(_operate(operator, values))
        elif len(word) == 1 and word in "0123456789":
            open_[-1][1].append(int(word))
        else:
            raise ValueError(f'"{word}" is no part of an expression')
    if len(open_) > 1 or len(open_[0][1]) != 1:
        raise ValueError("not one whole expression")
    return open_[0][1][0]


def _operate(operator: str, values: list[int]) -> int:
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[SM":
        return sum(values) % 10
    ordered = sorted(values)
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) // 2


@dataclass
class Generated:
    """The data set `listops`: a `Source` that makes its expressions as they are read."""

    settings: DataSettings
    name: str = "listops"
    size: int = 0
    done: int = 0
    own_splits: Set[str] = frozenset()

    def __post_init__(self) -> None:
        self.skipped: list[str] = []

    def key(self, cache: Path) -> str:
        """The settings that determine the expressions."""
        chosen = self.settings
        return f"listops 1, seed {chosen.listops_seed}, {chosen.listops_count} of {chosen.listops_lengths()} tokens"

    def _rows(self) -> Iterator[tuple[str, int]]:
        return generate_listops(
            self.settings.listops_seed, self.settings.listops_count, *self.settings.listops_lengths()
        )

    def files(self) -> Iterator[Document]:
        """One table, like those of the Long Range Arena."""
        yield Document("listops.tsv", (f"{source}\t{value}\n".encode() for source, value in self._rows()))

    def documents(self, *, binary: bool) -> Iterator[Document]:
        """Each expression with its value, as text."""
        for index, (source, value) in enumerate(self._rows()):
            yield Document(f"listops/{index}", [f"{source} {EQUALS} {value}\n".encode()])


class ListOpsModality:
    """Expressions: from text to tokens and back."""

    name = "listops"
    description = "nested operations on digits and their values, the Long Range Arena's ListOps (16 + 1)"
    suffixes: frozenset[str] = frozenset()
    suppress_tokens: tuple[int, ...] = ()

    def identity(self, settings: DataSettings) -> dict[str, Any]:
        """Nothing to set; raises UserError for the tokenizer of another modality."""
        return encoders.no_settings(settings)

    def prepare(self, source: Source, settings: DataSettings, writer: StoreWriter, progress: bool) -> None:
        """Write `expression = value` for each row of the source's TSV files. Wrong rows are skipped.

        The three files of the Long Range Arena are its splits. Raises UserError if there are no or too few expressions.
        """
        official = {document.name.rpartition("/")[2] for document in source.files()} >= set(OFFICIAL)
        own = set(SPLITS) if official else source.own_splits
        with Spool(writer.scratch) as spool:
            with bar(f"reading {source.name}", source.size, progress) as advance:
                for document in source.files():
                    given = OFFICIAL.get(document.name.rpartition("/")[2]) if official else document.split
                    for tokens in expressions(document, source.skipped):
                        content = bytes(tokens)
                        point = point_of(content)
                        spool.end_document(split_of(given, point, settings, own), spool.write(content), point)
                        if not spool.documents % 100:
                            advance(source.done)
            report_skipped(source, "expressions", spool.documents)
            spool.divide(settings, own, whole=True)
            if spool.method == "none":
                raise UserError(f"{source.name} has too few expressions for three splits: give 3 or more")
            writer.begin(END + 1)
            with bar(f"writing {source.name}", spool.size, progress) as advance:
                _write(spool, writer, advance)
        encoders.words(WORDS).save_pretrained(writer.tokenizer_folder)
        writer.finish(
            source={"name": source.name, "documents": spool.documents},
            split=spool.method,
            skipped={"count": len(source.skipped), "names": source.skipped[:100]},
        )

    def encode_prompt(self, prompt: str, tokenizer: Any) -> list[int]:
        """Tokens of an expression or its beginning, with or without `=`; for "", the token between documents.

        Raises UserError for a word that is not part of expressions.
        """
        words = _words(prompt)
        if unknown := [word for word in words if word not in IDS]:
            word = json.dumps(unknown[0][:20])
            raise UserError(f"{word} is no part of an expression: use digits, {' '.join(OPERATORS)}, ] and =")
        return [IDS[word] for word in words] or [END]

    def excerpts(self, tokens: np.ndarray, count: int, tokenizer: Any) -> list[list[int]]:
        """Expressions with their `=`."""
        ends = np.append(-1, np.flatnonzero(tokens == END))
        chosen = [i * (len(ends) - 1) // count for i in range(count)]
        pieces = [tokens[ends[i] + 1 : ends[i + 1]].tolist() for i in chosen]
        return [piece[: piece.index(IDS[EQUALS]) + 1] for piece in pieces]

    def new_tokens(self, prompt: Sequence[int], tokenizer: Any) -> int:
        """Two tokens, a value and the end, if the prompt is an expression; else 200."""
        return 2 if prompt[-1] == IDS[EQUALS] else 200

    def write_sample(self, tokens: Sequence[int], tokenizer: Any, stem: Path) -> SampleFile:
        """Write `stem`.txt: one expression per line, with its true value after it."""
        documents: list[list[str]] = [[]]
        for token in tokens:
            if 0 <= token < END:
                documents[-1].append(WORDS[token])
            elif token == END:
                documents.append([])
        unknown = sum(not 0 <= token <= END for token in tokens)
        text = "\n".join(_judged(words) for words in documents if words) + "\n"
        path = stem.with_name(stem.name + ".txt")
        path.write_text(text, encoding="utf-8")
        return SampleFile("text", path, text, counted(Counter({"unknown tokens left out": unknown})))


def _judged(words: list[str]) -> str:
    """An expression with its true value, and whether that is the value after the `=`."""
    where = words.index(EQUALS) if EQUALS in words else len(words)
    try:
        value = evaluate(words[:where])
    except ValueError as error:
        return " ".join(words) + f"    # {error}"
    verdict = "" if where >= len(words) - 1 else ", right" if words[where + 1 :] == [str(value)] else ", wrong"
    return " ".join(words) + f"    # evaluates to {value}{verdict}"


def _words(text: str) -> list[str]:
    """The words of an expression, without the round brackets of the Long Range Arena, which only nest pairs."""
    return text.replace("(", " ").replace(")", " ").split()


def expressions(document: Document, skipped: list[str]) -> Iterator[list[int]]:
    """The tokens of each row of a table `Source`, `Target`, with the value after `=`. Wrong rows go to `skipped`."""
    wrong = first = 0
    reason = ""
    for number, line in enumerate(_lines(document), 1):
        source, _, target = line.partition("\t")
        words = _words(source)
        if not words or (number == 1 and source.strip() == "Source"):
            continue
        try:
            value = evaluate(words)
            if target.strip() not in ("", str(value)):
                raise ValueError(f"is {value}, not {target.strip()[:20]}")
        except ValueError as error:
            wrong += 1
            if wrong == 1:
                first, reason = number, str(error)[:100]
            if wrong == number == _WRONG_ROWS:
                break
            continue
        yield [*(IDS[word] for word in words), IDS[EQUALS], value]
    if wrong:
        skipped.append(f"{document.name}: {wrong} wrong rows, the first in line {first} ({reason})")


def _lines(document: Document) -> Iterator[str]:
    """The lines of a text, in bounded memory: longer lines than `LONGEST_LINE` bytes are cut."""
    rest = b""
    for chunk in document.chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in lines)
        if len(rest) > LONGEST_LINE:
            yield rest.decode("utf-8", "replace")
            rest = b""
    if rest:
        yield rest.decode("utf-8", "replace")


def _write(spool: Spool, writer: StoreWriter, advance: Callable[[int], None]) -> None:
    done = 0
    for batch in spool.batches(lambda block: 0, 1 << 20):
        for split in SPLITS:
            mine = [piece.data + bytes([END]) for piece in batch if piece.split == split]
            if mine:
                writer.append(split, np.frombuffer(b"".join(mine), np.uint8), documents=len(mine))
        done += sum(len(piece.data) for piece in batch)
        advance(done)


LISTOPS = ListOpsModality()
