"""Audio as the tokens of a neural codec: the modality `acoustic`, from EnCodec, Mimi or DAC.

A codec turns each frame of sound (about 13 to 20 ms, 80 ms for Mimi) into one code from each of several codebooks,
coarse to fine. The codes of the first K codebooks become tokens, frame by frame. Code c of codebook k is token
k * codebook size + c, so that every token tells its codebook. T frames, K codebooks.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from waveletgpt.data.modalities import encoders
from waveletgpt.data.modalities.audio import READ, excerpt, tokenise, write_wav
from waveletgpt.data.modalities.modality import SampleFile, counted, evenly_spaced
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.files import Source
from waveletgpt.data.sources.hub import fail_soon
from waveletgpt.data.store import StoreWriter
from waveletgpt.errors import UserError

CODECS = ("encodec", "mimi", "dac")
"""Hugging Face's `model_type` of the known codecs."""
SECONDS = 20
"""Seconds of sound encoded at a time; the codec does not see the sound before."""


class Codec:
    """A Hugging Face codec: from sound to codes and back. Use `codec(name)`, which caches the last one.

    `rate` samples per second, `hop` samples per frame, `size` codes per codebook, at most `codebooks` codebooks.
    """

    def __init__(self, name: str) -> None:
        """Raises UserError if the model does not exist, is not a codec, or gives no tokens."""
        import torch
        from transformers import AutoConfig, AutoModel
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        if not Path(name).is_dir():
            fail_soon()
        try:
            config = AutoConfig.from_pretrained(name)
            self.type = config.model_type
            if self.type not in CODECS:
                raise UserError(f'codec "{name}" is of type {self.type}: give one of {", ".join(CODECS)}')
            if getattr(config, "normalize", False) or getattr(config, "chunk_length_s", None):
                raise UserError(
                    f'codec "{name}" scales or overlaps its pieces, which tokens cannot express: use another, '
                    "such as facebook/encodec_24khz"
                )
            model = AutoModel.from_pretrained(name)
        except UserError:
            raise
        except Exception as error:  # the library raises nearly any exception
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f'codec "{name}" cannot be loaded ({reason}): give a folder or a hub name') from error
        self.name = name
        self.rate = int(config.sampling_rate)
        self.size = int(config.codebook_size)
        self.hop = int(config.frame_size if self.type == "mimi" else config.hop_length)
        self.codebooks = int(config.n_codebooks if self.type == "dac" else config.num_quantizers)
        self._channels = int(getattr(config, "audio_channels", 1))
        self._model: Any = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def encode(self, blocks: Iterable[np.ndarray], codebooks: int) -> Iterator[np.ndarray]:
        """Codes (T, K) of a recording's blocks (samples,) at `rate`, `SECONDS` at a time; K = `codebooks`.

        The end is padded with silence to a whole frame.
        """
        length = max(1, SECONDS * self.rate // self.hop) * self.hop
        waiting = np.empty(0, np.float32)
        for block in blocks:
            waiting = np.concatenate([waiting, block])
            while len(waiting) >= length:
                yield self._encode(waiting[:length], codebooks)
                waiting = waiting[length:]
        if len(waiting):
            yield self._encode(waiting, codebooks)

    def frames(self, seconds: float) -> int:
        """Number of frames in `seconds`."""
        return max(1, round(seconds * self.rate / self.hop))

    def _encode(self, samples: np.ndarray, codebooks: int) -> np.ndarray:
        import torch

        frames = -(-len(samples) // self.hop)
        padded = np.pad(samples, (0, max(frames * self.hop, self.rate) - len(samples)))  # codecs fail on short inputs
        with torch.inference_mode():
            sound = torch.from_numpy(padded).to(self._model.device).expand(1, self._channels, -1)
            codes = self._model.encode(sound, **self._choice(codebooks)).audio_codes
        found: np.ndarray = codes.reshape(-1, codes.shape[-1]).T[:frames, :codebooks].cpu().numpy()
        return found

    def _choice(self, codebooks: int) -> dict[str, Any]:
        """The arguments that make each codec compute no more codebooks than needed."""
        if self.type == "dac":
            return {"n_quantizers": codebooks}
        if self.type == "mimi":
            return {"num_quantizers": max(codebooks, int(self._model.config.num_semantic_quantizers))}
        count = self._model.quantizer.get_num_quantizers_for_bandwidth
        return {"bandwidth": next(b for b in sorted(self._model.config.target_bandwidths) if count(b) >= codebooks)}

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The sound of codes (T, K): (samples,) float32."""
        import torch

        if not len(codes):
            return np.empty(0, np.float32)
        with torch.inference_mode():
            given = torch.from_numpy(codes.T.copy()).to(self._model.device)[None]
            if self.type == "encodec":
                out = self._model.decode(given[None], [None])
            else:
                out = self._model.decode(audio_codes=given)
        sound: np.ndarray = out.audio_values.reshape(-1, out.audio_values.shape[-1]).mean(0).float().cpu().numpy()
        return sound


@functools.lru_cache(maxsize=1)
def codec(name: str) -> Codec:
    """The codec with this name or in this folder; the last one is cached. Raises UserError as `Codec` does."""
    return Codec(name)


def to_tokens(codes: np.ndarray, size: int) -> np.ndarray:
    """Codes (T, K) in 0 .. `size` - 1 as tokens (T * K,)."""
    return (codes + size * np.arange(codes.shape[1])).ravel()


def to_codes(tokens: Sequence[int], codebooks: int, size: int) -> tuple[np.ndarray, int]:
    """Codes (T, K) of the complete frames in any sequence of tokens, and the number of tokens in no complete frame.

    A frame begins with a token of the first codebook, and those of the others follow in order. Tokens out of order and
    incomplete frames are left out.
    """
    frames: list[list[int]] = []
    frame: list[int] = []
    for token in tokens:
        book, code = divmod(int(token), size)
        if book == 0:
            frame = [code]
        elif 0 < book < codebooks and book == len(frame):
            frame.append(code)
        if len(frame) == codebooks:
            frames.append(frame)
            frame = []
    return np.array(frames, np.int64).reshape(-1, codebooks), len(tokens) - len(frames) * codebooks


@dataclass(frozen=True)
class AcousticModality:
    """`codebooks` tokens per frame of a neural codec."""

    name: str = "acoustic"
    description: str = "recordings as codes of EnCodec, Mimi or DAC (codec), the first codebooks of each frame"
    suffixes: frozenset[str] = frozenset()
    """Empty: recordings are `audio` unless the user chooses this modality."""
    suppress_tokens: tuple[int, ...] = ()

    def identity(self, settings: DataSettings) -> dict[str, Any]:
        """The codec (its name on the hub, or the content of its folder) and the number of codebooks."""
        codec_settings = {"codec": encoders.known_by(settings.codec), "codebooks": settings.codebooks}
        return encoders.no_settings(settings) | codec_settings | READ

    def prepare(self, source: Source, settings: DataSettings, writer: StoreWriter, progress: bool) -> None:
        """Read the recordings and write tokens and tokenizer. Other files are skipped, and named and counted.

        Raises UserError if there is no recording, too little sound for the splits, or no such codec.
        """
        folder = Path(settings.codec)
        name = str(folder.resolve()) if folder.is_dir() else settings.codec
        model, books = codec(name), settings.codebooks
        if books > model.codebooks:
            raise UserError(f'codebooks is {books}: codec "{name}" has {model.codebooks}, give at most that')
        tokenise(
            source, settings, writer, progress,
            rate=model.rate,
            encode=lambda blocks: (to_tokens(codes, model.size) for codes in model.encode(blocks, books)),
            tokenizer=encoders.numbers(
                books * model.size, codec=name, codebooks=books, codebook_size=model.size, sample_rate=model.rate
            ),
            width=books,
            frames_per_second=model.rate / model.hop,
        )  # fmt: skip

    def encode_prompt(self, prompt: str, tokenizer: Any) -> list[int]:
        """Tokens of the recording `PATH` or `PATH@SECONDS` (default: its first second); for "", a frame of silence."""
        name, books, size = _settings(tokenizer)
        model = codec(name)
        sound = excerpt(prompt, model.rate) if prompt else np.zeros(model.hop, np.float32)
        return [int(token) for codes in model.encode([sound], books) for token in to_tokens(codes, size)]

    def excerpts(self, tokens: np.ndarray, count: int, tokenizer: Any) -> list[list[int]]:
        """Excerpts of a second, in whole frames."""
        name, books, _ = _settings(tokenizer)
        return evenly_spaced(tokens, count, codec(name).frames(1) * books, books)

    def new_tokens(self, prompt: Sequence[int], tokenizer: Any) -> int:
        """The tokens that complete the last frame of `prompt`, and five seconds."""
        name, books, _ = _settings(tokenizer)
        return -len(prompt) % books + codec(name).frames(5) * books

    def write_sample(self, tokens: Sequence[int], tokenizer: Any, stem: Path) -> SampleFile:
        """Write the sound of `tokens` as `stem`.wav; tokens out of order are left out."""
        name, books, size = _settings(tokenizer)
        codes, wrong = to_codes(tokens, books, size)
        model = codec(name)
        repaired = counted(Counter({"tokens in no whole frame left out": wrong}))
        return write_wav(stem, model.decode(codes), model.rate, repaired)


def _settings(tokenizer: Any) -> tuple[str, int, int]:
    """The codec's name, the number of codebooks and their size, as saved with the tokens."""
    saved = tokenizer.init_kwargs
    try:
        return str(saved["codec"]), int(saved["codebooks"]), int(saved["codebook_size"])
    except KeyError as error:
        raise UserError(f"the tokenizer has no entry {error}: give one of `modality=acoustic`") from None


ACOUSTIC = AcousticModality()
