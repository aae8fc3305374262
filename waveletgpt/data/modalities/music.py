"""The modality `music`: MIDI files as tokens, from a folder of pieces to samples that can be heard."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from waveletgpt.data.modalities import encoders
from waveletgpt.data.modalities.events import END, EVENTS, OFF, SHIFT, VELOCITY, from_tokens, to_tokens
from waveletgpt.data.modalities.midi import FRAME, HOURS, NOTES, library, read_midi, render, write_midi
from waveletgpt.data.modalities.modality import SampleFile, Unusable, counted
from waveletgpt.data.progress import bar
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.encodings import begin, decoded
from waveletgpt.data.sources.files import Document, Source, TooLarge, report_skipped
from waveletgpt.data.splits import Spool, point_of, split_of
from waveletgpt.data.store import SPLITS, StoreWriter
from waveletgpt.errors import UserError

FILE_LIMIT = 64 << 20
"""Larger files, in bytes, are skipped."""
READ = {"music_reading": 2}
"""Part of a store's fingerprint. Raise it when the same files give other pieces than before."""
PROMPT = 5.0
"""Default length of a prompt in seconds."""


class MusicModality:
    """MIDI files: from files to tokens and back."""

    name = "music"
    description = "MIDI files as keys, velocities and 10 ms of real time, the events of the Music Transformer (388 + 1)"
    suffixes = frozenset((".mid", ".midi", ".kar", ".rmi"))
    suppress_tokens: tuple[int, ...] = ()

    def identity(self, settings: DataSettings) -> dict[str, Any]:
        """How training pieces are copied. Raises UserError for the tokenizer of another modality."""
        chosen = {"transpose": settings.semitones(), "tempo_scale": settings.tempos()}
        return encoders.no_settings(settings) | chosen | READ

    def prepare(self, source: Source, settings: DataSettings, writer: StoreWriter, progress: bool) -> None:
        """Write the events of all MIDI files, and changed copies of training pieces. Other files are skipped and named.

        A piece is in one split only: the one in MAESTRO's table, else one chosen by its notes. Raises UserError if
        symusic is missing, no file can be read, or there are too few different pieces.
        """
        library()
        table = _table(source, settings)
        own = source.own_splits or set(table.values())
        with Spool(writer.scratch) as spool:
            with bar(f"reading {source.name}", source.size, progress) as advance:
                for document in source.files():
                    if document.name.lower().endswith(".csv") and table:
                        continue
                    try:
                        notes = read_midi(_content(document))
                    except (Unusable, TooLarge) as error:
                        source.skipped.append(f"{document.name}: {error}")
                        continue
                    content = notes.tobytes()
                    split = document.split or table.get(document.name.rpartition("/")[2])
                    point = point_of(content)
                    spool.end_document(split_of(split, point, settings, own), spool.write(content), point)
                    advance(source.done)
            report_skipped(source, "MIDI files", spool.documents)
            spool.divide(settings, own, whole=True)
            if spool.method == "none":
                pieces = f"{spool.documents} piece{'s' * (spool.documents > 1)}"
                raise UserError(f"{source.name} has {pieces}, too few different ones for three splits: give 3 or more")
            writer.begin(END + 1)
            with bar(f"writing {source.name}", spool.size, progress) as advance:
                _write(spool, settings, writer, advance)
        encoders.words(EVENTS).save_pretrained(writer.tokenizer_folder)
        writer.finish(
            source={"name": source.name, "documents": spool.documents},
            split=spool.method,
            skipped={"count": len(source.skipped), "names": source.skipped[:100]},
        )

    def encode_prompt(self, prompt: str, tokenizer: Any) -> list[int]:
        """The start of the MIDI file `PATH` or `PATH@SECONDS`; for "", the token before a new piece.

        Raises UserError if the file is missing, not a MIDI file, or has no note in these seconds.
        """
        if not prompt:
            return [END]
        path, seconds = _excerpt(prompt)
        try:
            notes = read_midi(path.read_bytes())
        except Unusable as error:
            raise UserError(f"{path} cannot be used: {error}; give another MIDI file") from error
        tokens = to_tokens(notes)
        shifts = np.where((tokens >= SHIFT) & (tokens < VELOCITY), tokens.astype(np.int64) - SHIFT + 1, 0)
        tokens = tokens[np.cumsum(shifts) * FRAME < seconds]
        if not (tokens < OFF).any():
            raise UserError(f"{path} has no note in its first {seconds:g} seconds: write {path}@SECONDS for more")
        return [END, *tokens.tolist()]

    def excerpts(self, tokens: np.ndarray, count: int, tokenizer: Any) -> list[list[int]]:
        """The first 128 events of pieces, with the token before each piece."""
        ends = np.flatnonzero(tokens == END)[:-1]
        starts = np.append(-1, ends)  # the first piece has no token before it
        chosen = (starts[i * len(starts) // count] + 1 for i in range(count))
        return [[END, *tokens[start : start + 128].tolist()] for start in chosen]

    def new_tokens(self, prompt: Sequence[int], tokenizer: Any) -> int:
        """512, about 20 seconds of piano."""
        return 512

    def write_sample(self, tokens: Sequence[int], tokenizer: Any, stem: Path) -> SampleFile:
        """Write the notes of `tokens` as `stem`.mid, and as `stem`.wav if `render` can."""
        notes, repaired = from_tokens(tokens)
        path = stem.with_name(stem.name + ".mid")
        write_midi(notes, path)
        render(path)
        return SampleFile("music", path, repaired=counted(repaired))


def _table(source: Source, settings: DataSettings) -> dict[str, str]:
    """File name -> split, from a table among the files, such as MAESTRO's.

    Raises UserError if the table is broken, or in another encoding than that of the settings or UTF-8.
    """
    found: dict[str, str] = {}
    there: set[str] = set()
    for document in source.files():
        there.add(document.name.rpartition("/")[2])
        if document.name.lower().endswith(".csv"):
            try:
                content = document.read(FILE_LIMIT)
            except TooLarge:
                continue
            header = begin(content[:4000], settings.encoding).splitlines()[:1]
            if not all(column in "".join(header) for column in ("midi_filename", "split")):
                continue
            try:
                for row in csv.DictReader(io.StringIO(decoded(content, document.name, settings.encoding), newline="")):
                    if row.get("midi_filename") and row.get("split") in SPLITS:
                        found[row["midi_filename"].rpartition("/")[2]] = row["split"]
            except csv.Error as error:
                raise UserError(f"{document.name} is broken ({error}): get it again, or leave it out") from None
    return {name: split for name, split in found.items() if name in there}


def _content(document: Document) -> bytes:
    chunks = iter(document.chunks)
    start = next(chunks, b"")
    if not start.startswith((b"MThd", b"RIFF")):  # before reading the rest, which may be large
        raise Unusable("not a MIDI file")
    return start + Document(document.name, chunks).read(FILE_LIMIT)


def _write(spool: Spool, settings: DataSettings, writer: StoreWriter, advance: Callable[[int], None]) -> None:
    end = np.array([END], np.uint16)
    done = 0
    for piece in spool.pieces(lambda block: 0):
        notes = np.frombuffer(piece.data, NOTES)
        training = piece.split == "train"
        for transpose in settings.semitones() if training else [0]:
            for tempo in settings.tempos() if training else [1.0]:
                tokens = np.concatenate([to_tokens(notes, transpose, tempo), end])
                writer.append(piece.split, tokens, documents=1)
        done += len(piece.data)
        advance(done)


def _excerpt(prompt: str) -> tuple[Path, float]:
    path, seconds = Path(prompt).expanduser(), PROMPT
    if not path.is_file() and "@" in prompt:
        before, _, number = prompt.rpartition("@")
        try:
            path, seconds = Path(before).expanduser(), float(number)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= HOURS * 3600:
            raise UserError(f'"{prompt}": give the seconds after @ as a number above 0, such as {before}@5')
    if not path.is_file():
        raise UserError(f'no MIDI file "{path}": give the path of one, or PATH@SECONDS')
    return path, seconds


MUSIC = MusicModality()
