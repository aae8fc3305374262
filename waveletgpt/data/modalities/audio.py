"""Raw audio as tokens: the modality `audio`, one token per sample, 16 kHz mono, 8-bit mu-law.

Every recording is decoded, mixed down, resampled and encoded block by block, so that memory does not depend on its
length. The modality `acoustic` uses this module too, to read recordings and to write their tokens by split.
"""

from __future__ import annotations

import io
import math
import wave
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from waveletgpt.data.modalities import encoders, mulaw
from waveletgpt.data.modalities.containers import streams
from waveletgpt.data.modalities.modality import SampleFile, Unusable, counted, evenly_spaced
from waveletgpt.data.modalities.text import require_splits
from waveletgpt.data.progress import bar
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.files import Document, Source, report_skipped
from waveletgpt.data.splits import HASHED, Spool, point_of, split_of
from waveletgpt.data.store import StoreWriter
from waveletgpt.errors import UserError

FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "NIST")
"""The formats that are read. libsndfile knows more, some of which are tables of numbers and not sound."""
SUFFIXES = frozenset(
    (".wav", ".wave", ".w64", ".rf64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au",
     ".snd", ".caf")
)  # fmt: skip
"""Suffixes of files in these formats."""
READ = {"audio_reading": 2}
"""Part of a store's fingerprint. Raise it when the same files give other sound than before."""
RATES = (1000, 1_000_000)
"""Allowed sample rates per second; a header with another rate is broken."""
LOUDEST = 1e6
"""Samples beyond this multiple of full scale count as silence, as NaN and infinity do."""
BLOCK = 1 << 20
"""Number of values (samples times channels) decoded at a time."""
GAP = 1.0
"""Seconds left out between splits that are parts of one recording."""
PROMPT = 1.0
"""Default length of a prompt in seconds."""
SAMPLE = 0.5
"""Default seconds of validation sound at the beginning of a report's sample, and of generated sound after it."""


def libraries() -> tuple[Any, Any]:
    """The modules soundfile and soxr; raises UserError if they are not installed."""
    try:
        import soundfile
        import soxr
    except (ImportError, OSError):  # OSError: soundfile without its libsndfile
        raise UserError("audio needs the libraries soundfile and soxr: pip install 'waveletgpt[audio]'") from None
    return soundfile, soxr


def recording(path: Path, rate: int) -> Iterator[np.ndarray]:
    """A file's sound, the mean of its channels, in blocks (samples,), float32, at `rate` samples per second.

    Raises Unusable for a file that is not in `FORMATS`, is broken, or has a rate outside `RATES`.
    """
    for stream in streams(path):
        yield from _stream(stream, rate)


def _stream(source: Path | BinaryIO, rate: int) -> Iterator[np.ndarray]:
    """`recording` for a single stream."""
    soundfile, soxr = libraries()

    class Forwards(soundfile.SoundFile):  # type: ignore[misc, name-defined]
        """Reads without seeking: soundfile seeks after every block, which fails if the length is unknown."""

        def seekable(self) -> bool:
            return False

    try:
        with Forwards(source) as file:
            if file.format not in FORMATS:
                raise Unusable(f"{file.format} is not read")
            if not RATES[0] <= file.samplerate <= RATES[1]:
                raise Unusable(f"{file.samplerate} samples a second")
            same = file.samplerate == rate
            resampler = None if same else soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32")
            frames = max(1, BLOCK // file.channels)
            while len(block := file.read(frames, dtype="float32", always_2d=True)):
                block[~(np.abs(block) <= LOUDEST)] = 0
                mono = block.mean(axis=1) if file.channels > 1 else block[:, 0]
                yield resampler.resample_chunk(mono) if resampler else mono
            if resampler:
                yield resampler.resample_chunk(np.empty(0, np.float32), last=True)
    except soundfile.SoundFileError as error:
        raise Unusable(getattr(error, "error_string", str(error)).strip().rstrip(".")) from None


def excerpt(prompt: str, rate: int) -> np.ndarray:
    """The start of the recording `PATH` or `PATH@SECONDS` (default: one second), (samples,) float32.

    Raises UserError if the file is missing or cannot be read, or if the seconds are not a positive number.
    """
    path, seconds = Path(prompt), PROMPT
    if not path.exists() and "@" in prompt:
        name, _, number = prompt.rpartition("@")
        try:
            path, seconds = Path(name), float(number)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise UserError(f'prompt "{prompt}": "{number}" is no number of seconds; write PATH or PATH@SECONDS')
    if not path.is_file():
        raise UserError(f'prompt "{prompt}": there is no file {path}; give the path of a recording, or PATH@SECONDS')
    wanted = max(1, round(seconds * rate))
    blocks: list[np.ndarray] = []
    try:
        for block in recording(path, rate):
            blocks.append(block)
            if sum(map(len, blocks)) >= wanted:
                break
    except Unusable as error:
        raise UserError(f"prompt {path} cannot be read as a recording ({error}): try another format") from None
    found = np.concatenate(blocks)[:wanted] if blocks else np.empty(0, np.float32)
    if not len(found):
        raise UserError(f"prompt {path} is a recording without samples: give another")
    return found


def tokenise(
    source: Source,
    settings: DataSettings,
    writer: StoreWriter,
    progress: bool,
    *,
    rate: int,
    encode: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]],
    tokenizer: Any,
    width: int = 1,
    frames_per_second: float | None = None,
) -> None:
    """Write the tokens of every recording in `source`, and `tokenizer`, whose length is the size of the vocabulary.

    `encode` turns the blocks of one recording, at `rate` samples per second, into tokens, `width` per frame.
    `frames_per_second` is `rate` by default. Raises UserError if there is no recording or too little sound for the
    splits.
    """
    libraries()
    dtype = np.dtype(np.uint8 if len(tokenizer) <= 1 << 8 else np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    unit = width * dtype.itemsize
    with Spool(writer.scratch) as spool:
        with bar(f"reading {source.name}", source.size, progress) as advance:
            for document in source.files():
                point = point_of(_save(document, writer.scratch / "recording"))
                try:
                    blocks = encode(recording(writer.scratch / "recording", rate))
                    size = sum(spool.write(tokens.astype(dtype).tobytes()) for tokens in blocks)
                    if not size:
                        raise Unusable("no samples")
                except Unusable as error:
                    spool.drop_document()
                    source.skipped.append(f"{document.name.encode('utf-8', 'replace').decode()} ({error})")
                else:
                    split = split_of(document.split, point, settings, source.own_splits)
                    spool.end_document(split, size, point)
                advance(source.done)
        report_skipped(source, "recordings", spool.documents)
        gap = round(GAP * (frames_per_second or rate))
        spool.divide(settings, source.own_splits, unit=unit, gap=gap)
        tokens = {split: size // dtype.itemsize for split, size in spool.sizes.items()}
        require_splits(source.name, tokens, settings, "tokens")
        writer.begin(len(tokenizer))
        with bar(f"writing {source.name}", spool.size, progress) as advance:
            done = 0
            for piece in spool.pieces(lambda block: len(block) // unit * unit):
                writer.append(piece.split, np.frombuffer(piece.data, dtype), documents=piece.ends_document)
                done += len(piece.data)
                advance(done)
        tokenizer.save_pretrained(writer.tokenizer_folder)
    writer.finish(
        source={"name": source.name, "documents": spool.documents},
        split=spool.method,
        gap=spool.gap * width,
        sample_rate=rate,
        skipped={"count": len(source.skipped), "names": source.skipped[:100]},
    )


def _save(document: Document, path: Path) -> bytes:
    """Write a document's bytes to `path`, for a reader that has to seek. Returns the first `HASHED` bytes."""
    start = b""
    with path.open("wb") as file:
        for chunk in document.chunks:
            if len(start) < HASHED:
                start += chunk[: HASHED - len(start)]
            file.write(chunk)
    return start


@dataclass(frozen=True)
class AudioModality:
    """One token per sample: 256 mu-law codes."""

    name: str = "audio"
    description: str = "WAV, FLAC, OGG, MP3, AIFF as 16 kHz mono, 8-bit mu-law (256)"
    suffixes: frozenset[str] = SUFFIXES
    suppress_tokens: tuple[int, ...] = ()

    def identity(self, settings: DataSettings) -> dict[str, Any]:
        """The sample rate."""
        return encoders.no_settings(settings) | {"sample_rate": settings.sample_rate, **READ}

    def prepare(self, source: Source, settings: DataSettings, writer: StoreWriter, progress: bool) -> None:
        """Read the recordings and write tokens and tokenizer. Other files are skipped, and named and counted.

        Raises UserError if there is no recording or too little sound for the splits.
        """
        tokenise(
            source, settings, writer, progress,
            rate=settings.sample_rate,
            encode=lambda blocks: map(mulaw.encode, blocks),
            tokenizer=encoders.numbers(mulaw.CODES, sample_rate=settings.sample_rate),
        )  # fmt: skip

    def encode_prompt(self, prompt: str, tokenizer: Any) -> list[int]:
        """Tokens of the recording `PATH` or `PATH@SECONDS` (default: its first second); for "", silence."""
        if not prompt:
            return [mulaw.SILENCE]
        return mulaw.encode(excerpt(prompt, sample_rate(tokenizer))).tolist()

    def excerpts(self, tokens: np.ndarray, count: int, tokenizer: Any) -> list[list[int]]:
        """Excerpts of half a second."""
        return evenly_spaced(tokens, count, round(SAMPLE * sample_rate(tokenizer)))

    def new_tokens(self, prompt: Sequence[int], tokenizer: Any) -> int:
        """Half a second."""
        return round(SAMPLE * sample_rate(tokenizer))

    def write_sample(self, tokens: Sequence[int], tokenizer: Any, stem: Path) -> SampleFile:
        """Write the sound of `tokens` as `stem`.wav; tokens that are not mu-law codes are left out."""
        codes = np.asarray(tokens, np.int64)
        known = codes[(codes >= 0) & (codes < mulaw.CODES)]
        repaired = counted(Counter({"tokens that are no samples left out": len(codes) - len(known)}))
        return write_wav(stem, mulaw.decode(known), sample_rate(tokenizer), repaired)


def sample_rate(tokenizer: Any) -> int:
    """The sample rate, per second, of a tokenizer's tokens."""
    return int(tokenizer.init_kwargs.get("sample_rate", DataSettings.sample_rate))


def write_wav(stem: Path, samples: np.ndarray, rate: int, repaired: str = "") -> SampleFile:
    """Write samples in [-1, 1] as `stem`.wav, 16 bits mono. Samples outside are clipped; NaN becomes silence."""
    path = stem.with_name(stem.name + ".wav")
    levels = np.round(np.clip(np.nan_to_num(samples), -1, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, len(levels), "NONE", ""))
        file.writeframes(levels.tobytes())
    return SampleFile("audio", path, repaired=repaired)


def picture(path: Path) -> bytes:
    """Waveform and spectrogram, as PNG, of a WAV file from `write_sample` (16 bits mono)."""
    from matplotlib.figure import Figure

    with wave.open(str(path), "rb") as file:
        rate = file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    seconds = max(len(samples), 1) / rate
    figure = Figure(figsize=(8, 3.4), dpi=110, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    columns = np.array_split(samples, min(len(samples), 1500)) if len(samples) else [np.zeros(1)]
    times = (np.arange(len(columns)) + 0.5) * seconds / len(columns)
    low, high = [column.min() for column in columns], [column.max() for column in columns]
    top.fill_between(times, low, high, color="#3060a0", linewidth=0.6)
    reach = max(1e-3, float(np.abs(samples).max(initial=0)))
    top.set(ylim=(-reach, reach), ylabel="amplitude")
    bottom.imshow(
        _decibels(samples), origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0,
        extent=(0, seconds, 0, rate / 2000), interpolation="nearest",
    )  # fmt: skip
    bottom.set(xlim=(0, seconds), xlabel="seconds", ylabel="kHz")
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _decibels(samples: np.ndarray, size: int = 512) -> np.ndarray:
    """Short-time spectrum (frequencies, times) in decibels below its maximum, with Hann windows of `size` samples."""
    step = max(size // 4, len(samples) // 1500)
    padded = np.pad(samples, (size // 2, size))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[: len(samples) + 1 : step]
    power = np.abs(np.fft.rfft(windows * np.hanning(size))) ** 2
    return 10 * np.log10(np.maximum(power / max(float(power.max()), 1e-12), 1e-9)).T


AUDIO = AudioModality()
