"""Every kind of data goes the same road through the command line: files, comparison, report, samples, evaluation."""

from __future__ import annotations

import json
import re
import wave
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import write_text
from waveletgpt import cli
from waveletgpt.data import MODALITIES, NAMED

TINY = [
    *("--preset", "tiny", "--max-steps", "4", "--batch-size", "2", "--device", "cpu", "--training.threads", "1"),
    *("--model.n-positions", "32", "--model.n-embd", "16", "--model.n-head", "2", "--training.samples", "1"),
    *("--training.eval-windows", "4", "--training.eval-every", "2"),
]
RATE = 1000
SIDE = 8


def texts(folder: Path) -> str:
    return str(write_text(folder / "words.txt", 2000))


def tone(path: Path, hertz: float, seconds: float, rate: int = RATE) -> Path:
    """A WAV file of one tone."""
    levels = 12_000 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(levels.astype("<i2").tobytes())
    return path


def recordings(folder: Path) -> str:
    pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    for index in range(12):
        tone(folder / "sounds" / f"{index}.wav", 100 + 20 * index, 0.4)
    return str(folder / "sounds")


def codec(folder: Path) -> list[str]:
    """A small random EnCodec, as one downloads it."""
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    config = EncodecConfig(num_filters=4, hidden_size=16, codebook_size=64, num_lstm_layers=1, target_bandwidths=[0.9])
    EncodecModel(config).save_pretrained(folder / "codec")
    return ["--codec", str(folder / "codec"), "--codebooks", "2"]


def pixels(index: int) -> np.ndarray:
    """A slope of grey, (SIDE, SIDE) uint8."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return ((rows * (3 + index % 5) + columns * (7 - index % 3) + index) % 256).astype(np.uint8)


def pictures(folder: Path) -> str:
    image = pytest.importorskip("PIL.Image")
    (folder / "pictures").mkdir()
    for index in range(40):
        image.fromarray(pixels(index)).save(folder / "pictures" / f"{index}.png")
    return str(folder / "pictures")


def pieces(folder: Path) -> str:
    pytest.importorskip("symusic")
    from waveletgpt.data.modalities.midi import NOTES, write_midi

    (folder / "pieces").mkdir()
    for index in range(12):
        scale = [(step / 2, step / 2 + 0.4, 50 + index + step % 12, 60 + 2 * step) for step in range(30)]
        write_midi(np.array(scale, NOTES), folder / "pieces" / f"{index}.mid")
    return str(folder / "pieces")


def is_text(written: str, prompt: str) -> None:
    """The prompt and what follows, which may be nothing: a model of 4 steps may end a text at once."""
    assert written.startswith(prompt)
    assert written.endswith("\n")


def is_sound(written: str, prompt: str) -> None:
    """A WAV file; of `audio` the prompt's samples, as mu-law has them, and half a second more."""
    with wave.open(written.strip()) as file:
        found = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        assert file.getframerate() in (RATE, 24_000)
    if file.getframerate() == RATE:
        path, _, seconds = prompt.partition("@")
        given = 1
        if path:
            given = round(RATE * float(seconds))
            with wave.open(path) as file:
                expected = np.frombuffer(file.readframes(given), "<i2") / 32768
            assert np.abs(found[:given] - expected).max() < 0.02
        assert len(found) == given + RATE // 2


def is_picture(written: str, prompt: str) -> None:
    """A whole picture, whose upper half is the prompt's; black is nowhere, as no pixel is missing."""
    from PIL import Image

    with Image.open(written.strip()) as file:
        found = np.asarray(file)[:: 256 // SIDE, :: 256 // SIDE]
    assert found.shape == (SIDE, SIDE)
    if prompt:
        with Image.open(prompt) as file:
            assert np.array_equal(found[: SIDE // 2], np.asarray(file)[: SIDE // 2])


def is_music(written: str, prompt: str) -> None:
    """A MIDI file whose first notes are the prompt's."""
    from waveletgpt.data.modalities.midi import read_midi

    found = read_midi(Path(written.strip()).read_bytes())
    if prompt:
        path, _, seconds = prompt.partition("@")
        given = read_midi(Path(path).read_bytes())
        given = given[given["start"] < float(seconds) - 0.5]
        assert len(given) > 2
        assert np.abs(found["start"][: len(given)] - given["start"]).max() <= 0.005
        assert found["pitch"][: len(given)].tolist() == given["pitch"].tolist()


@dataclass(frozen=True)
class Road:
    """What goes in, what is set, and how one tells what came out."""

    make: Callable[[Path], str]
    """Data in a folder -> what the command line calls it."""
    prompt: str
    """A text, or a path in that folder."""
    check: Callable[[str, str], None]
    """(what `generate` printed, prompt): that it is of the right form, and goes on from the prompt."""
    shown: str
    """What the report shows a sample by."""
    options: list[str] = field(default_factory=list)
    """For `compare`; `--modality` where the files don't tell it."""
    tokens: list[str] = field(default_factory=list)
    """`--tokens`, where what suits the modality would take long."""
    settings: Callable[[Path], list[str]] = lambda folder: []


def text(modality: str) -> Road:
    few = ["--training.sample-tokens", "8", "--vocab-size", "300"]
    told = [] if modality == "chars" else ["--modality", modality]
    return Road(texts, "the cat ", is_text, '<p class="text"><mark>', [*told, *few], ["--tokens", "12"])


ROADS = {
    **{modality: text(modality) for modality in ("text8", "chars", "bytes", "bpe")},
    "audio": Road(
        recordings, "sounds/3.wav@0.1", is_sound, 'src="data:audio/wav;base64,',
        ["--sample-rate", str(RATE), "--training.sample-tokens", "100"],
    ),
    "acoustic": Road(
        recordings, "sounds/3.wav@0.1", is_sound, 'src="data:audio/wav;base64,',
        ["--modality", "acoustic", "--training.sample-tokens", "8"], ["--tokens", "8"], codec,
    ),
    "images": Road(
        pictures, "pictures/7.png", is_picture, 'alt="generated picture"', ["--image-size", str(SIDE)]
    ),
    "music": Road(
        pieces, "pieces/7.mid@4", is_music, 'alt="piano roll"', ["--training.sample-tokens", "16"], ["--tokens", "24"]
    ),
    "listops": Road(
        lambda folder: "listops", "[MAX 2 9 [MIN 4 7 ] ] =", is_text, "# evaluates to ",
        ["--listops-count", "80", "--listops-length", "5-20"],
    ),
}  # fmt: skip


def test_no_modality_is_left_out() -> None:
    assert set(ROADS) == set(MODALITIES)


@pytest.mark.parametrize("name", ["maestro", "cifar10", *(name for name in NAMED if name.startswith("librispeech-"))])
def test_the_originals_can_be_verified(name: str) -> None:
    """YouTube-Mix, for which no checksum is published, is known by its first copy."""
    known = NAMED[name]
    assert known.url
    assert known.url.startswith("https://")
    assert known.url.endswith(known.file)
    assert known.size
    assert known.size > 10_000_000
    assert re.fullmatch("[0-9a-f]{64}", known.sha256 or "")
    assert known.licence


@pytest.mark.parametrize("modality", ROADS)
def test_from_files_to_samples(
    modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WAVELETGPT_CACHE", str(tmp_path / "cache"))
    road = ROADS[modality]
    data = road.make(tmp_path)
    out = tmp_path / "out"

    def run(*words: object) -> str:
        capsys.readouterr()
        cli.main([*map(str, words)])
        return capsys.readouterr().out

    run("compare", data, "--arms", "none", "fixed", "--out", out, *TINY, *road.options, *road.settings(tmp_path))
    one = out / "fixed-seed0"
    assert json.loads((one / "run.json").read_text())["data"]["modality"] == modality
    (sample,) = json.loads((one / "samples.json").read_text())
    assert sample["kind"] == {"audio": "audio", "acoustic": "audio", "images": "image", "music": "music"}.get(
        modality, "text"
    )
    assert (one / sample["file"]).is_file()
    page = (out / "report.html").read_text()
    assert page.count(road.shown) >= 2  # of each arm

    for given in ("", road.prompt):
        is_file = (tmp_path / given).is_file() or "@" in given
        prompt = str(tmp_path / given) if given and is_file else given
        told = ["--prompt", prompt] if prompt else []
        road.check(run("generate", one, "--device", "cpu", "--out", tmp_path / "made", *told, *road.tokens), prompt)

    value: dict[str, Any] = json.loads(
        run("evaluate", one, "--split", "test", "--windows", "2", "--json", "--device", "cpu")
    )
    assert 0 < value["nll"] < 20
    assert (value["bits_per_byte"] is not None) == (modality in ("text8", "chars", "bytes", "bpe"))
