"""A codec's codes become tokens and sound again, with each of the three codecs, small and random, offline."""

from __future__ import annotations

import contextlib
import io
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    DacConfig,
    DacFeatureExtractor,
    DacModel,
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecModel,
    GPT2Config,
    MimiConfig,
    MimiModel,
)

from waveletgpt.data import SPLITS, DataSettings, TokenStore, prepare
from waveletgpt.data.modalities import acoustic
from waveletgpt.data.modalities.acoustic import ACOUSTIC, Codec, codec, to_codes, to_tokens
from waveletgpt.errors import UserError

SIZE = 64
BOOKS = 3
HOPS = {"encodec": 320, "mimi": 1920, "dac": 512}


def make(kind: str) -> Any:
    """A codec of few weights, with codebooks that hear something: two come with zeros."""
    torch.manual_seed(0)
    if kind == "dac":
        sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 32, "n_codebooks": 4, "codebook_dim": 4}
        return DacModel(DacConfig(codebook_size=SIZE, **sizes))
    if kind == "mimi":
        small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
        books = {"codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 4}
        model = MimiModel(
            MimiConfig(
                num_filters=4, hidden_size=16, codebook_size=SIZE, upsample_groups=16, head_dim=8, **small, **books
            )
        )
        for name, buffer in model.named_buffers():
            if name.endswith("embed_sum"):
                buffer.normal_()
        return model
    other = EncodecModel(
        EncodecConfig(num_filters=4, hidden_size=16, codebook_size=SIZE, target_bandwidths=[0.9, 1.8, 3.6])
    )
    with torch.inference_mode():
        rest = other.encoder(torch.from_numpy(sound(2, 24_000))[None, None])[0].T
        for layer in other.quantizer.layers:
            layer.codebook.embed.copy_(rest[torch.randperm(len(rest))[:SIZE]])
            rest = rest - layer.decode(layer.encode(rest.T[None]))[0].T
    return other


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each codec, as one downloads it."""
    found = {}
    for kind in HOPS:
        found[kind] = tmp_path_factory.mktemp(kind)
        make(kind).save_pretrained(found[kind])
        extractor = DacFeatureExtractor if kind == "dac" else EncodecFeatureExtractor
        extractor(sampling_rate=16_000 if kind == "dac" else 24_000).save_pretrained(found[kind])
    return found


@pytest.fixture(params=sorted(HOPS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def chosen(kind: str, folders: dict[str, Path], tmp_path: Path) -> DataSettings:
    return DataSettings(cache_dir=str(tmp_path / "cache"), codec=str(folders[kind]), codebooks=BOOKS)


def sound(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """Notes with a little noise, (samples,) float32."""
    random = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate)) / rate
    notes = 220 * 2 ** (random.integers(0, 24, 100) / 12)[(times * 4).astype(int)]
    noise = 0.05 * random.standard_normal(len(times))
    return (0.4 * np.sin(2 * np.pi * np.cumsum(notes) / rate) + noise).astype(np.float32)


def recordings(folder: Path, rate: int, count: int = 12, seconds: float = 0.7) -> Path:
    folder.mkdir()
    for index in range(count):
        soundfile.write(folder / f"{index:02}.wav", sound(seconds, rate, index), rate, subtype="FLOAT")
    return folder


def by_hand(model: Any, samples: np.ndarray) -> np.ndarray:
    """All codes (T, K) of a short sound, as each codec's documentation says to get them."""
    values = torch.from_numpy(samples)[None, None]
    with torch.inference_mode():
        if isinstance(model, EncodecModel):
            return model.encode(values, bandwidth=3.6).audio_codes[0, 0].T.numpy()
        if isinstance(model, MimiModel):
            return model.encode(values, num_quantizers=4).audio_codes[0].T.numpy()
        return model.encode(values).audio_codes[0].T.numpy()


def test_codes_are_the_codecs_own(kind: str, folders: dict[str, Path]) -> None:
    found = codec(str(folders[kind]))
    rate = 16_000 if kind == "dac" else 24_000
    assert (found.rate, found.hop, found.size) == (rate, HOPS[kind], SIZE)
    samples = sound(4, rate)[: 2 * HOPS[kind] * 10]
    expected = by_hand(make(kind).eval(), np.pad(samples, (0, max(0, rate - len(samples)))))[:20]
    codes = np.concatenate(list(found.encode([samples], BOOKS)))
    assert np.array_equal(codes, expected[:, :BOOKS])
    assert all(len(np.unique(book)) > 3 for book in codes.T)
    one = np.concatenate(list(found.encode([samples], 1)))
    assert np.array_equal(one, expected[:, :1])


def test_pieces_are_the_codecs_not_the_readers(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acoustic, "SECONDS", 1)
    found = codec(str(folders[kind]))
    samples = sound(3.3, found.rate)
    whole = np.concatenate(list(found.encode([samples], BOOKS)))
    assert len(whole) == -(-len(samples) // found.hop)
    parts = np.concatenate(list(found.encode(np.array_split(samples, 17), BOOKS)))
    assert np.array_equal(parts, whole)
    assert list(found.encode([], BOOKS)) == []


def test_tokens_in_the_store(kind: str, chosen: DataSettings, tmp_path: Path) -> None:
    found = codec(chosen.codec)
    folder = recordings(tmp_path / "in", found.rate)
    (folder / "notes.txt").write_text("Played by us.")
    store = prepare(folder, "acoustic", chosen, progress=False)
    assert store.vocab_size == BOOKS * SIZE
    assert store.meta["sample_rate"] == found.rate
    assert store.meta["skipped"] == {"count": 1, "names": ["notes.txt (Format not recognised)"]}
    assert store.meta["split"] in ("hash", "dealt")
    expected = set()
    for path in sorted(folder.glob("*.wav")):
        codes = np.concatenate(list(found.encode([soundfile.read(path, dtype="float32")[0]], BOOKS)))
        expected.add(to_tokens(codes, SIZE).tobytes())
    length = -(-int(0.7 * found.rate) // found.hop) * BOOKS
    pieces = []
    for split in SPLITS:
        tokens = store.split(split).astype(np.int64)
        assert np.array_equal(tokens // SIZE, np.arange(len(tokens)) % BOOKS)
        assert len(tokens) == length * store.meta["splits"][split]["documents"]
        pieces += [piece.tobytes() for piece in tokens.reshape(-1, length)]
    assert set(pieces) == expected
    assert len(pieces) == 12


def test_one_recording_is_cut_between_frames(chosen: DataSettings, tmp_path: Path) -> None:
    rate = codec(chosen.codec).rate
    soundfile.write(tmp_path / "long.wav", sound(20, rate), rate)
    store = prepare(tmp_path / "long.wav", "acoustic", chosen, progress=False)
    assert store.meta["split"] == "position"
    assert store.meta["gap"] % BOOKS == 0
    total = -(-20 * rate // codec(chosen.codec).hop) * BOOKS
    assert sum(len(store.split(split)) for split in SPLITS) == total - 2 * store.meta["gap"]
    for split in SPLITS:
        tokens = store.split(split)
        assert np.array_equal(tokens // SIZE, np.arange(len(tokens)) % BOOKS)


def test_tokens_to_wav_with_nothing_but_the_tokenizer(kind: str, chosen: DataSettings, tmp_path: Path) -> None:
    rate = codec(chosen.codec).rate
    store = prepare(recordings(tmp_path / "in", rate), "acoustic", chosen, progress=False)
    tokenizer = store.load_tokenizer()
    prompt = str(tmp_path / "in" / "03.wav")
    tokens = ACOUSTIC.encode_prompt(prompt, tokenizer)
    codes = np.array(tokens).reshape(-1, BOOKS) % SIZE
    assert tokens == to_tokens(codes, SIZE).tolist()
    sample = ACOUSTIC.write_sample(tokens, tokenizer, tmp_path / "again")
    found, found_rate = soundfile.read(sample.path)
    assert (sample.kind, found_rate, len(found)) == ("audio", rate, len(codes) * HOPS[kind])
    model = make(kind).eval()
    with torch.inference_mode():
        given = torch.from_numpy(codes.T.copy())[None]
        if kind == "encodec":
            expected = model.decode(given[None], [None]).audio_values
        else:
            expected = model.decode(audio_codes=given).audio_values
    np.testing.assert_allclose(found, expected.flatten().clip(-1, 1), atol=1e-4)
    half = ACOUSTIC.encode_prompt(f"{prompt}@0.35", tokenizer)
    assert len(half) == -(-int(0.35 * rate) // HOPS[kind]) * BOOKS
    assert len(ACOUSTIC.encode_prompt("", tokenizer)) == BOOKS


@pytest.mark.parametrize("tokens", [[], [5], [70, 5, 69], [5, 70, 140], [-1, 10**6, 5, 70, 140, 3]])
def test_any_tokens_are_a_sound(tokens: list[int], kind: str, chosen: DataSettings, tmp_path: Path) -> None:
    store = prepare(recordings(tmp_path / "in", codec(chosen.codec).rate, 3), "acoustic", chosen, progress=False)
    sample = ACOUSTIC.write_sample(tokens, store.load_tokenizer(), tmp_path / "sample")
    frames = int(5 in tokens and 140 in tokens)
    with wave.open(str(sample.path)) as file:
        assert file.getnframes() == frames * HOPS[kind]
    wrong = len(tokens) - frames * BOOKS
    assert sample.repaired == (f"{wrong} tokens in no whole frame left out" if wrong else "")


def test_what_suits_a_report(kind: str, chosen: DataSettings, tmp_path: Path) -> None:
    """A second in whole frames, from the beginning of one, and five more; a cut frame is completed first."""
    found = codec(chosen.codec)
    store = prepare(recordings(tmp_path / "in", found.rate, 3), "acoustic", chosen, progress=False)
    tokenizer = store.load_tokenizer()
    tokens = np.arange(50_000) % BOOKS
    second = round(found.rate / HOPS[kind])
    for prompt in ACOUSTIC.excerpts(tokens, 4, tokenizer):
        assert prompt == list(range(BOOKS)) * second
    assert ACOUSTIC.new_tokens([0] * (BOOKS + 1), tokenizer) == BOOKS - 1 + round(5 * found.rate / HOPS[kind]) * BOOKS


@given(st.lists(st.integers(-5, 40), max_size=60), st.integers(1, 4))
def test_repaired_frames(tokens: list[int], books: int) -> None:
    """What is whole stays, nothing is made up: the frames' tokens are in the sequence, in order, all counted."""
    codes, wrong = to_codes(tokens, books, 8)
    assert codes.shape[1] == books
    assert codes.size + wrong == len(tokens)
    assert ((codes >= 0) & (codes < 8)).all()
    rest = iter(tokens)
    assert all(token in rest for token in to_tokens(codes, 8).tolist())
    assert to_codes(to_tokens(codes, 8).tolist(), books, 8)[1] == 0


def test_repair_by_example() -> None:
    """A frame cut off at the start, one that another interrupts, one with a token too many, one unfinished."""
    tokens = [9, 17, 1, 9, 17, 2, 10, 3, 11, 19, 12, 4, 12, 20, 5, 13]
    codes, wrong = to_codes(tokens, 3, 8)
    assert codes.tolist() == [[1, 1, 1], [3, 3, 3], [4, 4, 4]]
    assert wrong == 7


def test_the_codec_is_part_of_the_fingerprint(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = recordings(tmp_path / "in", 24_000, seconds=0.3)

    def fingerprint(where: Path, books: int) -> str:
        chosen = DataSettings(cache_dir=str(tmp_path / "cache"), codec=str(where), codebooks=books)
        return prepare(folder, "acoustic", chosen, progress=False).fingerprint

    copy = shutil.copytree(folders["encodec"], tmp_path / "copy")
    first = fingerprint(folders["encodec"], 1)
    assert fingerprint(copy, 1) == first
    assert fingerprint(folders["encodec"], 2) != first
    model = make("encodec")
    next(model.parameters()).data += 1
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(copy)
    assert fingerprint(copy, 1) != first


def test_codecs_that_cannot_be(folders: dict[str, Path], tmp_path: Path) -> None:
    recordings(tmp_path / "in", 24_000, 3)
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    EncodecConfig(normalize=True, chunk_length_s=1.0, overlap=0.01).save_pretrained(tmp_path / "encodec48")
    (tmp_path / "nothing").mkdir()
    for name, books, message in (
        ("gpt2", 1, r"is of type gpt2: give one of encodec, mimi, dac"),
        ("encodec48", 1, r"scales or overlaps its pieces"),
        ("nothing", 1, r"cannot be loaded \(.*\): give a folder or a hub name"),
        ("nobody/no-such-codec", 1, r'codec "nobody/no-such-codec" cannot be loaded \(.*\): give a folder or a hub'),
        (str(folders["mimi"]), 5, r"codebooks is 5: codec .* has 4"),
    ):
        path = tmp_path / name
        chosen = DataSettings(cache_dir=str(tmp_path), codec=str(path) if path.is_dir() else name, codebooks=books)
        with pytest.raises(UserError, match=message) as error:
            prepare(tmp_path / "in", "acoustic", chosen, progress=False)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="codebooks must be greater than 0, got 0"):
        DataSettings(codebooks=0)


def test_a_tokenizer_of_something_else(tmp_path: Path, store_of_sound: TokenStore) -> None:
    with pytest.raises(UserError, match="give one of `modality=acoustic`"):
        ACOUSTIC.write_sample([1], store_of_sound.load_tokenizer(), tmp_path / "sample")


@pytest.fixture
def store_of_sound(tmp_path: Path, settings: DataSettings) -> TokenStore:
    return prepare(recordings(tmp_path / "sound", 16_000, 3), "audio", settings, progress=False)


def test_stereo_codec() -> None:
    """A codec of two channels hears the same in both, and gives their mean."""
    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig(num_filters=4, hidden_size=16, codebook_size=SIZE, audio_channels=2))
    found = Codec.__new__(Codec)
    found.type, found.rate, found.hop, found._channels, found._model = "encodec", 24_000, 320, 2, model.eval()
    codes = np.concatenate(list(found.encode([sound(0.5, 24_000)], 2)))
    assert codes.shape == (38, 2)
    assert found.decode(codes).shape == (38 * 320,)
