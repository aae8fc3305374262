"""Nested operations on digits: the modality `listops`, and the data set of that name, generated from a seed.

    [MAX 2 9 [MIN 4 7 ] 0 ] = 9

The grammar, the values and the lengths are those of the Long Range Arena (Tay et al. 2020,
https://arxiv.org/abs/2011.04006, after Nangia and Bowman 2018, https://arxiv.org/abs/1804.06028): an expression is a
digit with probability 3/4, and at the greatest depth always; else one of 4 operators with 2 to 10 expressions, all
equally likely. Whole expressions are drawn until one has a permitted length. Here many are drawn at once, level by
level, and only those of a permitted length are written out.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from waveletgpt.data import encoders
from waveletgpt.data.modality import SampleFile
from waveletgpt.data.progress import bar
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources import Document, Source, report_skipped
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
"""How often an expression is an operation, above the greatest depth."""
OFFICIAL = {"basic_train.tsv": "train", "basic_val.tsv": "validation", "basic_test.tsv": "test"}
"""The files of the Long Range Arena, and the splits they are."""

_TREES = 1024
"""Expressions drawn at a time."""
_FRUITLESS = 20_000
"""Draws of so many expressions without a new one of a permitted length end in an error."""


def generate_listops(
    seed: int,
    count: int,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_args: int = 10,
) -> Iterator[tuple[str, int]]:
    """`count` different expressions and their values, the same for the same seed and settings.

    An expression is a text of words separated by blanks, `min_length` to `max_length` of them (the brackets of
    operators are part of their words), such as `[MAX 2 9 ]` with 4. Raises UserError if there aren't that many.
    """
    random = np.random.default_rng(seed)
    seen: set[bytes] = set()
    words = np.array(WORDS, object)
    while count:
        fruitless = 0
        for tokens, value in _draw(random, min_length, max_length, max_depth, max_args):
            ...
