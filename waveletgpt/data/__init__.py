"""Data: files, folders, archives, data sets by name -> a token store on disk.

    store = prepare("my-texts/", "bytes")
    store.split("train")            # tokens, memory-mapped
    prepare(["a/=0.7", "b/=0.3"])   # a mixture

A further kind of data is one file in this package, with a class like `Modality`, one line in `MODALITIES`, and its name
in `settings.ModalityName`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from waveletgpt.data.mixture import Mixture, Part, parse_mixture
from waveletgpt.data.modalities.acoustic import ACOUSTIC
from waveletgpt.data.modalities.audio import AUDIO
from waveletgpt.data.modalities.images import IMAGES
from waveletgpt.data.modalities.listops import LISTOPS
from waveletgpt.data.modalities.modality import Modality, SampleFile
from waveletgpt.data.modalities.music import MUSIC
from waveletgpt.data.modalities.text import TEXT, TextModality, shared_tokenizer
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.files import Document, Files, Source
from waveletgpt.data.sources.hub import PREFIX, Hub
from waveletgpt.data.sources.named import NAMED, NamedSet, fetch
from waveletgpt.data.sources.remote import at_address, is_address
from waveletgpt.data.store import FORMAT, SPLITS, StoreWriter, TokenStore, disk_errors, made_once
from waveletgpt.errors import UserError, suggest, tell

__all__ = [
    "MODALITIES", "NAMED", "SPLITS", "DataSettings", "Document", "Mixture", "Modality", "NamedSet", "SampleFile",
    "Source", "StoreWriter", "TokenStore", "detect", "find", "prepare",
]  # fmt: skip

MODALITIES: dict[str, Modality] = {
    modality.name: modality for modality in (*TEXT, AUDIO, ACOUSTIC, IMAGES, MUSIC, LISTOPS)
}
DEFAULT_MODALITY = "chars"
READING = 3
"""How files, archives and tables become documents: raised when the same files give other documents than before, so that
older stores are not used. Modalities have a number of their own for what they make of a file."""
MAJORITY = 2 / 3
"""The share of files of one kind from which on a folder is taken to be of that kind."""


@overload
def prepare(
    data: str | os.PathLike[str],
    modality: str | None = None,
    settings: DataSettings | None = None,
    progress: bool = True,
    begun: Iterable[str | os.PathLike[str]] = (),
) -> TokenStore: ...


@overload
def prepare(
    data: str | os.PathLike[str] | Sequence[str],
    modality: str | None = None,
    settings: DataSettings | None = None,
    progress: bool = True,
    begun: Iterable[str | os.PathLike[str]] = (),
) -> TokenStore | Mixture: ...


def prepare(
    data: str | os.PathLike[str] | Sequence[str],
    modality: str | None = None,
    settings: DataSettings | None = None,
    progress: bool = True,
    begun: Iterable[str | os.PathLike[str]] = (),
) -> TokenStore | Mixture:
    """The tokens of `data`: made once, and found again as long as neither its content nor the settings change.

    `data` is a file, a folder, a name in `NAMED`, `hf:owner/name`, or an address (`https://`, `s3://`, ...); or several
    of these, each with a weight: `["a/=0.7", "b/=0.3"]` (see `Mixture`). `modality` is a name in `MODALITIES` (default:
    that of the named set, else what `detect` finds). With `progress`, bars and what was taken are shown on standard
    error. `begun` are stores that runs have begun with: one of the same data and settings is kept, even if this version
    reads the data in another way than the one that made it. Any number of processes may ask at once. Raises UserError
    for what cannot be used.
    """
    settings = settings or DataSettings()
    if modality is not None and modality not in MODALITIES:
        raise UserError(f'no modality "{modality}": there are {", ".join(MODALITIES)}{suggest(modality, MODALITIES)}')
    with disk_errors(settings.cache):
        if not isinstance(data, str | os.PathLike):
            return _mixture(parse_mixture(data), modality, settings, progress, list(begun))
        source = find(str(data), settings, progress)
        chosen = _chosen(str(data), source, modality, settings, progress)
        return _prepare(str(data), source, chosen, settings, progress, begun)


def _mixture(
    sources: list[tuple[str, float]],
    modality: str | None,
    settings: DataSettings,
    progress: bool,
    begun: Sequence[str | os.PathLike[str]],
) -> Mixture:
    """The stores of several sources, each as `prepare` would make it, but for the vocabulary, which they share."""
    found = [find(name, settings, progress) for name, _ in sources]
    kinds = [_chosen(n, source, modality, settings, progress) for (n, _), source in zip(sources, found, strict=True)]
    for (name, _), other in zip(sources, kinds, strict=True):
        if other != kinds[0]:
            raise UserError(
                f"{sources[0][0]} is taken as {kinds[0]}, {name} as {other}, and a mixture has one kind of tokens: "
                f"choose it for all, `modality={kinds[0]}`"
            )
    kind = MODALITIES[kinds[0]]
    if isinstance(kind, TextModality) and kind.learned and not settings.tokenizer:
        weights = [weight for _, weight in sources]
        settings = replace(settings, tokenizer=str(shared_tokenizer(kind, found, weights, settings, progress)))
    return Mixture(
        [
            Part(name, weight, _prepare(name, source, kinds[0], settings, progress, begun))
            for (name, weight), source in zip(sources, found, strict=True)
        ]
    )


def _chosen(data: str, source: Source, modality: str | None, settings: DataSettings, progress: bool) -> str:
    """The modality to take `data` in, said where nobody named it; what its folders and files say of splits is, too."""
    named = NAMED.get(source.name)
    chosen = modality or ("bpe" if settings.tokenizer else named.modality if named else "")
    if not chosen:
        chosen = detect(source, settings)
        others = ", ".join(name for name in MODALITIES if name != chosen)
        _say(progress, f"{data}: taken as {chosen}; `modality` changes that: {others}")
    if isinstance(source, Files) and source.folders:
        beside = f"; left out beside them: {_some(source.beside)}" if source.beside else ""
        _say(progress, f"{data}: its folders {', '.join(source.folders)} are the splits{beside}")
    if isinstance(source, Files) and source.split_files:
        beside = f"; left out beside them: {_some(source.beside)}" if source.beside else ""
        _say(progress, f"{data}: the names of its files, {_some(list(source.split_files))}, say the splits{beside}")
    if isinstance(source, Files) and source.unclear and not source.own_splits:
        names = _some(source.unclear)
        _say(progress, f"{data}: {names} may be splits, but others beside them are none: all is divided anew")
    return chosen


def _prepare(
    data: str,
    source: Source,
    chosen: str,
    settings: DataSettings,
    progress: bool,
    begun: Iterable[str | os.PathLike[str]],
) -> TokenStore:
    kind = MODALITIES[chosen]
    identity = {
        "format": FORMAT,
        "modality": chosen,
        "content": source.key(settings.cache),
        "gives_splits": isinstance(source, Files) and bool(source.own_splits),
        **{
            name: getattr(settings, name)
            for name in ("column", "include", "exclude", "validation_fraction", "test_fraction")
        },
        **({"reading": READING} if isinstance(source, Files) else {}),
        # Only where it is given: stores made before there was this setting stay what they are.
        **({"encoding": settings.encoding} if settings.encoding else {}),
        **kind.identity(settings),
    }
    for place in begun:
        with contextlib.suppress(UserError):
            there = TokenStore.open(place)
            if _but_reading(there.meta.get("identity") or {}) == _but_reading(identity):
                if there.meta["identity"] != json.loads(json.dumps(identity)):
                    _say(progress, f"{data}: going on with the tokens of {place}, though it would be read anew now")
                return there
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(data).name.split(".")[0])[:40].strip("-") or "data"
    path = settings.cache / "stores" / f"{name}-{chosen}-{fingerprint[:16]}"

    def make() -> None:
        with StoreWriter(path, modality=chosen, fingerprint=fingerprint, identity=identity) as writer:
            kind.prepare(source, settings, writer, progress)

    return made_once(path, TokenStore.open, make)


def _but_reading(identity: dict[str, Any]) -> dict[str, Any]:
    """What identifies a store's data and settings, as JSON has them, in every version."""
    whole: dict[str, Any] = json.loads(json.dumps(identity))
    return {name: value for name, value in whole.items() if not name.endswith("reading")}


def detect(source: Source, settings: DataSettings) -> str:
    """The modality that most files of a source are of, told by their names; text, of whatever kind, is `chars`.

    Raises UserError if no kind has `MAJORITY` of the files.
    """
    endings = source.suffixes(settings.cache) if isinstance(source, Files) else Counter[str]()
    counts = Counter({modality.name: sum(endings[s] for s in modality.suffixes) for modality in MODALITIES.values()})
    counts[DEFAULT_MODALITY] = endings.total() - counts.total()
    name, count = counts.most_common(1)[0]
    if endings and count < MAJORITY * endings.total():
        found = " and ".join(f"{number:,} for {name}" for name, number in counts.most_common() if number)
        names = [ending for ending, _ in endings.most_common() if ending]
        raise UserError(
            f"{source.name} holds files of several kinds, by their names {found} ({_some(names)}): choose one with "
            f"`modality={name}`, and its files with `include='*{names[0]}'` or the like"
        )
    return name if endings else DEFAULT_MODALITY


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _say(shown: bool, line: str) -> None:
    if shown:
        tell(line)


def find(data: str, settings: DataSettings, progress: bool = True) -> Source:
    """What `data` names: a path that exists, else a named set (downloaded if need be), an address, or a set of the hub.

    Raises UserError if it names nothing.
    """
    if Path(data).exists():
        return Files(Path(data), settings, split_folders=True)
    if data in NAMED:
        return fetch(NAMED[data], settings, progress)
    if is_address(data):
        return at_address(data, settings, progress)
    if data.startswith(PREFIX):
        return Hub(data, settings)
    raise UserError(
        f'"{data}" is no file, folder or named data set: see waveletgpt data list, or write hf:owner/name'
        f"{suggest(data, NAMED)}"
    )
