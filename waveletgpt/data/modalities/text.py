"""Text as tokens: the modalities `text8`, `chars`, `bytes` and `bpe`.

Documents are normalised onto a spool, split, and encoded from there in bulk; the tokenizer saved beside the tokens does
the same to a single string.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from waveletgpt.data import parallel, splits
from waveletgpt.data.modalities import encoders
from waveletgpt.data.modalities.modality import SampleFile, counted, evenly_spaced
from waveletgpt.data.progress import bar
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.files import Source
from waveletgpt.data.splits import HASHED, Piece, Spool, point_of, split_of
from waveletgpt.data.store import FORMAT, SPLITS, FolderWriter, StoreWriter, made_once, read_meta
from waveletgpt.errors import UserError

log = logging.getLogger(__name__)

BATCH = 1 << 18
"""Bytes of text in a block: it fits a core's cache, which halves the time."""
SAVED = 1 << 26
"""Bytes of text after which, again and again, it is noted how far the preparation is."""


class Normaliser(Protocol):
    """Brings one document into the form that is tokenised, in three steps for each block of it.

    `cut` and `join` see the blocks in order, in one thread, and must be quick. `work` may run in any thread, and on
    several blocks at once.
    """

    def cut(self, chunk: bytes, last: bool) -> bytes:
        """Append `chunk` to the document, and return the next block that needs nothing after it."""

    def work(self, block: bytes) -> bytes:
        """The block in its new form."""

    def join(self, text: bytes) -> bytes:
        """Fit what `work` returned for the next block to the block before it."""


class AsIs:
    """No change: for bytes."""

    def cut(self, chunk: bytes, last: bool) -> bytes:
        return chunk

    def work(self, block: bytes) -> bytes:
        return block

    def join(self, text: bytes) -> bytes:
        return text


class Utf8:
    """Valid UTF-8: wrong bytes become U+FFFD, a byte order mark at the start goes."""

    def __init__(self) -> None:
        self._rest = b""
        self._begun = False

    def __call__(self, chunk: bytes, last: bool) -> bytes:
        """All three steps at once."""
        return self.join(self.work(self.cut(chunk, last)))

    def cut(self, chunk: bytes, last: bool) -> bytes:
        block = self._rest + chunk if self._rest else chunk
        length = len(block) if last else encoders.last_character(block)
        block, self._rest = block[:length], block[length:]
        if block and not self._begun:
            self._begun = True
            return block.removeprefix(codecs.BOM_UTF8)
        return block

    def work(self, block: bytes) -> bytes:
        if block.isascii():
            return block
        try:
            block.decode()
        except UnicodeDecodeError:
            return block.decode(errors="replace").encode()
        return block

    def join(self, text: bytes) -> bytes:
        return text


class Text8(Utf8):
    """Lower-case a-z and single spaces, digits spelled out (http://mattmahoney.net/dc/textdata.html); accents go."""

    _small = bytes(byte if chr(byte).isalnum() and byte < 128 else 32 for byte in range(256)).lower()
    _digits = tuple((digit.encode(), f" {name} ".encode()) for digit, name in encoders.DIGITS.items())

    def __init__(self) -> None:
        super().__init__()
        self._after_space = False

    def work(self, block: bytes) -> bytes:
        if not block:
            return block
        data = _to_ascii(block).translate(self._small)
        for digit, name in self._digits:
            data = data.replace(digit, name)
        letters = np.frombuffer(data, np.uint8)
        space = letters == 32
        keep = np.ones(len(letters), bool)
        np.logical_and(space[1:], space[:-1], out=keep[1:])
        np.logical_not(keep[1:], out=keep[1:])
        return letters[keep].tobytes()

    def join(self, text: bytes) -> bytes:
        if self._after_space and text.startswith(b" "):
            text = text[1:]
        if text:
            self._after_space = text.endswith(b" ")
        return text


def _to_ascii(text: bytes) -> bytes:
    """Replaces what is not ASCII in UTF-8 as text8 does. Runs of spaces remain."""
    if text.isascii():
        return text
    far = np.frombuffer(text, np.uint8) > 127
    if np.count_nonzero(far) > len(text) // 8:  # replacing them one by one would take longer
        return _as_text8(text)
    edges = [0, *(np.flatnonzero(far[1:] != far[:-1]) + 1).tolist(), len(text)]
    runs = [text[start:stop] for start, stop in itertools.pairwise(edges)]
    first = int(not far[0])
    runs[first::2] = [_known(run) if len(run) < 32 else _as_text8(run) for run in runs[first::2]]
    return b"".join(runs)


def _as_text8(text: bytes) -> bytes:
    return text.decode(errors="replace").translate(encoders.text8_table()).encode()


_known = functools.lru_cache(1 << 14)(_as_text8)
"""Remembered for short runs: accents, dashes and quotation marks are repeated often."""


class Block(NamedTuple):
    """A part of a document on its way to the spool."""

    data: bytes
    normaliser: Normaliser
    document: int
    number: int
    """Number of the block in its document, from 1 on."""
    there: bool
    """Whether it is on the spool already. Then only the normaliser needs it, to go on with the document."""
    ending: tuple[str, float] | None
    """Split and point of the document if this block ends it, else None."""


def _normalised(blocks: list[Block]) -> list[bytes]:
    return [block.normaliser.work(block.data) for block in blocks]


@dataclass(frozen=True)
class TextModality:
    """One way to turn text into tokens: how it is normalised, and how the tokenizer is found."""

    name: str
    description: str
    normaliser: Callable[[], Normaliser]
    fit: Callable[[encoders.Shares, DataSettings], encoders.Encoder]
    identity: Callable[[DataSettings], dict[str, Any]] = encoders.no_settings
    """The settings, beyond the shared ones, that change the tokens."""
    learned: bool = False
    """Whether the vocabulary is found from the data."""
    binary: bool = False
    """Whether any file will do."""
    suffixes: frozenset[str] = frozenset()
    """None: text is what is not something else."""
    suppress_tokens: tuple[int, ...] = ()

    def prepare(self, source: Source, settings: DataSettings, writer: StoreWriter, progress: bool) -> None:
        """Read the source and write tokens and tokenizer; bytes per split are those of the normalised text.

        Raises UserError if there is no text, or too little for the splits.
        """
        learned = self.learned and not settings.tokenizer
        if writer.saved and progress:
            print(f"{source.name}: going on with a preparation that was stopped", file=sys.stderr, flush=True)
        with Spool(writer.scratch, writer.saved.get("spool")) as spool:
            if "tokens" in writer.saved:  # all has been read, and encoded in part
                kept = replace(settings, tokenizer=str(writer.tokenizer_folder)) if learned else settings
                encoder, skipped = self.fit([(spool, 1.0)], kept), writer.saved["skipped"]
                writer.go_on(writer.saved["tokens"])
            else:
                skipped = self._read(source, settings, spool, progress, writer)
                encoder = self.fit([(spool, 1.0)], settings)
                encoder.tokenizer().save_pretrained(writer.tokenizer_folder)
                writer.begin(encoder.vocab_size)
            with bar(f"encoding {source.name}", spool.size, progress) as advance:
                self._encode(spool, encoder, writer, advance, skipped)
        require_splits(source.name, {split: writer.counts[split]["tokens"] for split in SPLITS}, settings, "tokens")
        writer.finish(source={"name": source.name, "documents": spool.documents}, split=spool.method, skipped=skipped)

    def _read(
        self, source: Source, settings: DataSettings, spool: Spool, progress: bool, writer: FolderWriter | None = None
    ) -> dict[str, Any]:
        """Normalise all documents onto the spool, and decide the splits; which files were passed over.

        With `writer`, what has been read is saved on the way, and reading continues where an earlier process stopped.
        """
        saved = writer.saved if writer else {}
        size, last = saved.get("size", 0), spool.written
        blocks = parallel.batches(self._blocks(source, settings, saved), BATCH)
        quick = self.normaliser is AsIs
        with bar(f"reading {source.name}", source.size, progress) as advance:
            for batch, texts in parallel.in_order(_normalised, blocks, quick):
                for block, text in zip(batch, texts, strict=True):
                    text = block.normaliser.join(text)
                    size += 0 if block.there else spool.write(text)
                    if block.ending:
                        spool.end_document(block.ending[0], size, block.ending[1])
                        size = 0
                advance(source.done)
                # What a source without a size gives (the hub's) may be something else next time.
                if writer and source.size and spool.written - last >= SAVED:
                    last = spool.written
                    at = (block.document + 1, 0) if block.ending else (block.document, block.number)
                    writer.save({"spool": spool.state(), "documents": at[0], "blocks": at[1], "size": size})
        if source.skipped:
            names = ", ".join(source.skipped[:3]) + (", ..." if len(source.skipped) > 3 else "")
            log.warning("skipped %d files that are not UTF-8 text: %s", len(source.skipped), names)
        spool.divide(settings, source.own_splits)
        require_splits(source.name, spool.sizes, settings, "bytes of text")
        return {"count": len(source.skipped), "names": source.skipped[:100]}

    def _blocks(self, source: Source, settings: DataSettings, saved: dict[str, Any]) -> Iterator[Block]:
        """The blocks of all documents, at least one each, without documents that `saved` says are on the spool."""
        own = source.own_splits
        first = saved.get("documents", 0)
        for number, document in enumerate(source.documents(binary=self.binary)):
            if number < first:
                continue
            normaliser = self.normaliser()
            there = saved.get("blocks", 0) if number == first else 0
            start, before, count = b"", b"", 0
            parts = (chunk[at : at + BATCH] for chunk in document.chunks for at in range(0, len(chunk), BATCH))
            for count, part in enumerate(parts, 1):
                if len(start) < HASHED:
                    start += part[: HASHED - len(start)]
                block = normaliser.cut(part, False)
                before = block or before
                if count == there:  # the normaliser goes on from the last block that is not empty
                    yield Block(before, normaliser, number, count, True, None)
                elif count > there:
                    yield Block(block, normaliser, number, count, False, None)
            point = point_of(start)
            # Without splits of its own, text is never dealt out whole: all documents share a point.
            ending = (split_of(document.split, point, settings, own), point if own else 0.0)
            yield Block(normaliser.cut(b"", True), normaliser, number, count, False, ending)

    def _encode(
        self,
        spool: Spool,
        encoder: encoders.Encoder,
        writer: StoreWriter,
        advance: Callable[[int], None],
        skipped: dict[str, Any],
    ) -> None:
        end = np.array([encoder.end], writer.dtype)
        none = end[:0]  # gives the result of `concatenate` the dtype that is written

        def encode(batch: list[Piece]) -> list[tuple[str, np.ndarray, int, int]]:
            """(split, tokens, documents, bytes) of the splits in a batch."""
            found = []
            tokens = encoder.encode([piece.data for piece in batch])
            for split in SPLITS:
                mine = [(ids, piece) for ids, piece in zip(tokens, batch, strict=True) if piece.split == split]
                if mine:
                    parts = [part for ids, piece in mine for part in ((ids, end) if piece.ends_document else (ids,))]
                    size = sum(len(piece.data) for _, piece in mine)
                    documents = sum(piece.ends_document for _, piece in mine)
                    found.append((split, np.concatenate([none, *parts]), documents, size))
            return found

        since = tuple(writer.saved.get("encoded", (0, 0)))
        done = sum(counts["bytes"] for counts in writer.counts.values())
        last = since[0]
        # Text stays on the disk until its tokens are noted. So note often, but not for texts too small to matter.
        step = SAVED if spool.size <= SAVED else min(SAVED, max(splits.SEGMENT, spool.size // 64))
        quick = isinstance(encoder, encoders.Bytes)
        for batch, found in parallel.in_order(encode, spool.batches(encoder.cut, encoder.batch, since), quick):
            for split, tokens, documents, size in found:
                writer.append(split, tokens, documents=documents, size=size)
                done += size
            advance(done)
            place = batch[-1].place
            if place[0] - last >= step:
                last = place[0]
                state = {"spool": spool.state(), "tokens": writer.state(), "encoded": place, "skipped": skipped}
                writer.save(state)
                spool.free(place[0])

    def encode_prompt(self, prompt: str, tokenizer: Any) -> list[int]:
        """Tokens of `prompt`; of an empty one, the token between documents, so that a new document begins."""
        return tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]

    def unknown(self, prompt: str, tokenizer: Any) -> list[str]:
        """The characters of `prompt`, each once, that the tokenizer has no token for."""
        nothing = {tokenizer.eos_token_id, tokenizer.unk_token_id} - {None}
        characters = dict.fromkeys(prompt.replace(str(tokenizer.eos_token), ""))
        return [c for c in characters if nothing & set(tokenizer(c, add_special_tokens=False)["input_ids"])]

    def excerpts(self, tokens: np.ndarray, count: int, tokenizer: Any) -> list[list[int]]:
        """32 tokens each."""
        return evenly_spaced(tokens, count, 32)

    def new_tokens(self, prompt: Sequence[int], tokenizer: Any) -> int:
        """200: some lines."""
        return 200

    def write_sample(self, tokens: Sequence[int], tokenizer: Any, stem: Path) -> SampleFile:
        """Write the text of `tokens` as `stem`.txt; bytes that are not UTF-8 become U+FFFD."""
        known = [token for token in tokens if 0 <= token < len(tokenizer)]
        text = tokenizer.decode(known, skip_special_tokens=False)
        path = stem.with_name(stem.name + ".txt")
        path.write_text(text, encoding="utf-8", errors="replace")
        return SampleFile("text", path, text, counted(Counter({"unknown tokens left out": len(tokens) - len(known)})))


def shared_tokenizer(
    kind: TextModality, sources: Sequence[Source], weights: Sequence[float], settings: DataSettings, progress: bool
) -> Path:
    """The folder of one tokenizer for several sources, that of their characters or trained on them by weights."""
    identity = {
        "format": FORMAT,
        "modality": kind.name,
        "content": [source.key(settings.cache) for source in sources],
        "weights": [round(weight, 12) for weight in weights] if kind.name != "chars" else None,
        **{name: getattr(settings, name) for name in ("column", "include", "exclude", "encoding")},
        **{name: getattr(settings, name) for name in ("validation_fraction", "test_fraction")},
        **kind.identity(settings),
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = settings.cache / "tokenizers" / f"{kind.name}-{fingerprint[:16]}"

    def opens(folder: Path) -> Path:
        read_meta(folder, "tokenizer", FORMAT, lambda meta: meta["tokenizer_files"])
        return folder / "tokenizer"

    def make() -> None:
        with FolderWriter(path, fingerprint, identity) as writer, contextlib.ExitStack() as spools:
            shares = []
            for i, (source, weight) in enumerate(zip(sources, weights, strict=True)):
                (writer.scratch / str(i)).mkdir()
                spool = spools.enter_context(Spool(writer.scratch / str(i)))
                kind._read(source, settings, spool, progress)
                shares.append((spool, weight))
            kind.fit(shares, settings).tokenizer().save_pretrained(writer.folder / "tokenizer")
            files = sorted((writer.folder / "tokenizer").iterdir())
            sizes = {f"tokenizer/{file.name}": file.stat().st_size for file in files}
            writer.publish({"format": FORMAT, "tokenizer_files": sizes}, opens, files)

    return made_once(path, opens, make)


def require_splits(name: str, sizes: dict[str, int], settings: DataSettings, unit: str, least: int = 2) -> None:
    """Raises UserError unless each split that is asked for has at least `least` of what is counted."""
    needed = [split for split in SPLITS if split != "test" or settings.test_fraction]
    if any(sizes[split] < least for split in needed):
        counts = ", ".join(f"{split} {sizes[split]}" for split in SPLITS)
        total = sum(sizes.values())
        raise UserError(f"{name} is too short: {total} {unit} give {counts}; each split needs {least} or more")


TEXT = (
    TextModality("text8", "lower-case a-z and space, digits spelled out (27 + 1)", Text8, encoders.fit_text8),
    TextModality("chars", "the characters of the training data", Utf8, encoders.fit_chars,
                 encoders.chars_settings, learned=True),
    TextModality("bytes", "the 256 bytes, of text or of any file (256 + 1)", AsIs, encoders.fit_bytes, binary=True),
    TextModality("bpe", "byte-pair encoding trained on the data, or a tokenizer that is named", Utf8, encoders.fit_bpe,
                 encoders.bpe_settings, learned=True),
)  # fmt: skip
