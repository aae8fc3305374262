"""Mixtures: several token stores, each with a weight, that are read as one.

    store = prepare(["novels/=0.7", "letters/=0.3"], "bytes")

Each source has its own store and splits; all share one vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from waveletgpt.data.store import SPLITS, TokenStore
from waveletgpt.errors import UserError


@dataclass(frozen=True)
class Part:
    """A source of a mixture, and the share of all tokens that are read from it."""

    name: str
    weight: float
    store: TokenStore


class Mixture:
    """Token stores of one vocabulary, each with a weight. It has the methods of a `TokenStore`, but no single array."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Raises UserError if tokens have different meanings in two stores, or if two hold the same data."""
        self.parts = list(parts)
        first = self.parts[0]
        for i, part in enumerate(self.parts):
            for what, found, there in zip(_SHARED, _shared(part.store), _shared(first.store), strict=True):
                if found != there:
                    told = f": {found} and {there}" if len(f"{found}{there}") < 40 else ""
                    raise UserError(f"{part.name} and {first.name} cannot be mixed, their {what} differ{told}")
            same = next((other for other in self.parts[:i] if other.store.fingerprint == part.store.fingerprint), None)
            if same is not None:
                raise UserError(f"{part.name} and {same.name} hold the same data: name one, with the sum of weights")
        self.modality, self.vocab_size = first.store.modality, first.store.vocab_size
        identity = [[part.store.fingerprint, round(part.weight, 12)] for part in self.parts]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        """SHA-256 over the stores' fingerprints and the weights."""

    @property
    def meta(self) -> dict[str, Any]:
        """The entries of a store's meta.json for all stores together: counts are sums."""
        splits = [part.store.meta["splits"] for part in self.parts]
        total = {
            split: {name: sum(int(one[split].get(name) or 0) for one in splits) for name in splits[0][split]}
            for split in SPLITS
        }
        return {"splits": total, "record": self.parts[0].store.meta.get("record")}

    def bytes_per_token(self, split: str) -> float | None:
        """UTF-8 bytes per token, averaged by weight; None if one of the sources is not text."""
        sizes = [part.store.bytes_per_token(split) for part in self.parts]
        if None in sizes:
            return None
        return sum(part.weight * (size or 0) for part, size in zip(self.parts, sizes, strict=True))

    def load_tokenizer(self) -> Any:
        """The tokenizer that all stores share; None for a modality without one."""
        return self.parts[0].store.load_tokenizer()

    def describe(self) -> dict[str, dict[str, Any]]:
        """The sources by name, as run.json records them; the inverse is `opened`."""
        return {
            part.name: {
                "weight": part.weight,
                "fingerprint": part.store.fingerprint,
                "store": str(part.store.path),
                "tokens": {split: part.store.meta["splits"][split]["tokens"] for split in SPLITS},
            }
            for part in self.parts
        }

    @classmethod
    def opened(cls, described: dict[str, dict[str, Any]]) -> Mixture:
        """The mixture from the result of `describe`. Raises UserError if a store is gone."""
        return cls([Part(name, float(one["weight"]), TokenStore.open(one["store"])) for name, one in described.items()])


_SHARED = ("kinds of tokens", "vocabularies", "tokens of a record", "tokenizers")


def _shared(store: TokenStore) -> tuple[Any, ...]:
    file = store.path / "tokenizer" / "tokenizer.json"
    content = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    return store.modality, store.vocab_size, store.meta.get("record"), content


def parts_of(store: TokenStore | Mixture) -> list[Part]:
    """The parts of a mixture; a single store is one part of weight 1."""
    return store.parts if isinstance(store, Mixture) else [Part(store.path.name, 1.0, store)]


def said(data: str | os.PathLike[str] | Sequence[str]) -> str:
    """Data as text; a mixture as `a=0.7 b=0.3`."""
    return str(data) if isinstance(data, str | os.PathLike) else " ".join(data)


def parse_mixture(sources: Sequence[str]) -> list[tuple[str, float]]:
    """`["a=7", "b=3"]` -> [("a", 0.7), ("b", 0.3)]: names and shares, in proportion to the weights.

    The weight is the text after the last "=". Raises UserError if a weight is not a positive number, or a source is
    given twice.
    """
    found: list[tuple[str, float]] = []
    places: dict[str, str] = {}
    for source in sources:
        name, equals, text = source.rpartition("=")
        if not equals or not name:
            raise UserError(f'of several sources each needs a weight, "{source}" has none: write {source}=0.5')
        try:
            weight = float(text)
        except ValueError:
            raise UserError(f'"{source}": the weight "{text}" is no number: write {name}=0.5') from None
        if not 0 < weight < math.inf:
            raise UserError(f'"{source}": the weight {text} is not above 0 and finite: write {name}=0.5')
        place = os.path.realpath(name) if os.path.exists(name) else name
        if place in places:
            raise UserError(f"{name} is in the mixture twice{_as(places[place], name)}: name it once")
        places[place] = name
        found.append((name, weight))
    if len(found) == 1:
        raise UserError(f"a mixture has two sources or more, this is one: leave the weight of {found[0][0]} out")
    total = sum(weight for _, weight in found)
    return [(name, weight / total) for name, weight in found]


def _as(first: str, second: str) -> str:
    return "" if first == second else f", once as {first}"
