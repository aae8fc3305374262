"""Damaged files of every kind that is read: each must be read or told, in one line, never a traceback or a crash.

    python benchmarks/fuzz.py [--seconds 300] [--readers midi audio ...] [--seed 0] [--keep FOLDER]

Whole files made here are damaged at random (bytes, numbers, lengths, parts cut, joined, repeated), a reader at a time,
each in a process of its own. What escapes that is no UserError (for a medium: not its `Unusable`) is a finding, and so
are a process that dies, an input that takes over 20 seconds, and more than 1 GB of memory. The inputs that found
something are kept in --keep. Exit code 1 if anything was found.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import io
import json
import lzma
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from waveletgpt.errors import UserError

SLOW = 20
"""Seconds of a processor that one input may take."""
MOST = 1 << 30
"""Bytes that a process may take."""

Reader = tuple[list[bytes], Callable[[bytes], None]]
"""Whole files, and what reads one: it raises what escapes."""

_NUMBERS = [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xff" * 8, b"\0\0\0\1", b"\1\0\0\0"]
_WORDS = [
    b'"',
    b"\n",
    b"\r\n",
    b"\0",
    b",",
    b"\t",
    b"[",
    b"{",
    b"]",
    b"}",
    b"null",
    b"1e999",
    b"-1",
    b"\xff\xfe",
    b"&a ",
]


def damaged(whole: list[bytes], rng: random.Random) -> bytes:
    """One of the files after one to eight accidents."""
    data = bytearray(rng.choice(whole))
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        size = len(data)
        at, length = rng.randrange(size + 1), rng.choice([1, 2, 4, 16, 256, 4096])
        kind = rng.randrange(9)
        if kind == 0 and size:
            data[at % size] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            data[at % size] = rng.randrange(256)
        elif kind == 2:
            number = rng.choice(_NUMBERS)
            data[at : at + len(number)] = number
        elif kind == 3:
            data[at:at] = rng.choice(_WORDS)
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = data[at : at + length] * rng.choice([1, 2, 50])
        elif kind == 6:
            data[at:at] = rng.randbytes(length % 300)
        elif kind == 7:
            other = rng.choice(whole)
            data[at:] = other[rng.randrange(len(other) + 1) :]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


# What is read


def midi(folder: Path) -> Reader:
    from waveletgpt.data.modalities.events import to_tokens
    from waveletgpt.data.modalities.midi import Unusable, read_midi

    def track(*events: bytes) -> bytes:
        body = b"".join(events) + b"\0\xff\x2f\0"
        return b"MTrk" + len(body).to_bytes(4, "big") + body

    notes = [
        b"\0\x90\x3c\x40\x60\x80\x3c\0",
        b"\0\xb0\x40\x7f\x81\0\x91\x40\x50\x10\x41\x20",
        b"\0\xff\x51\3\7\xa1\x20",
    ]
    whole = []
    for form, ticks in ((0, 96), (1, 480), (2, 96), (1, 0xE728)):
        tracks = [track(*notes), track(*reversed(notes), b"\0\xf0\5abcd\xf7")][: 1 + bool(form)]
        whole.append(b"MThd\0\0\0\6" + bytes([0, form, 0, len(tracks)]) + ticks.to_bytes(2, "big") + b"".join(tracks))
    whole.append(b"RIFF" + (len(whole[0]) + 12).to_bytes(4, "little") + b"RMIDdata"
                 + len(whole[0]).to_bytes(4, "little") + whole[0])  # fmt: skip

    def read(data: bytes) -> None:
        with contextlib.suppress(Unusable):
            to_tokens(read_midi(data))

    return whole, read


def audio(folder: Path) -> Reader:
    import soundfile

    from waveletgpt.data.modalities.audio import Unusable, recording

    whole = []
    sound = np.sin(np.arange(3000) / 7) * 0.5
    for form, subtype, channels in (
        ("WAV", "PCM_16", 1), ("WAV", "FLOAT", 2), ("WAV", "IMA_ADPCM", 1), ("WAVEX", "PCM_24", 2),
        ("RF64", "PCM_16", 1), ("W64", "PCM_16", 1), ("FLAC", "PCM_16", 2), ("OGG", "VORBIS", 1), ("OGG", "OPUS", 1),
        ("MP3", "MPEG_LAYER_III", 1), ("AIFF", "PCM_16", 1), ("AU", "ULAW", 1), ("CAF", "ALAC_16", 1),
        ("NIST", "PCM_16", 1),
    ):  # fmt: skip
        with contextlib.suppress(Exception):  # builds of libsndfile differ
            buffer = io.BytesIO()
            soundfile.write(buffer, np.stack([sound] * channels, 1), 16_000, format=form, subtype=subtype)
            whole.append(buffer.getvalue())
    whole += [whole[-1] * 2, whole[0][:4] + b"\xff" * 4 + whole[0][8:40] + b"\xff" * 4 + whole[0][44:]]

    def read(data: bytes) -> None:
        (folder / "sound").write_bytes(data)
        with contextlib.suppress(Unusable):
            for block in recording(folder / "sound", 16_000):
                assert np.isfinite(block).all()

    return whole, read


def pictures(folder: Path) -> Reader:
    import warnings

    from PIL import Image

    from waveletgpt.data.modalities.images import Shape, Unusable, load, load_cifar

    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    grey, colours = rng.integers(0, 256, (20, 24), np.uint8), rng.integers(0, 256, (24, 20, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    coloured = Image.fromarray(colours)
    whole = []
    for picture, form, more in (
        (coloured, "PNG", {}), (coloured, "JPEG", {"exif": exif}),
        (Image.fromarray(grey), "GIF", {}), (coloured, "BMP", {}), (coloured, "WEBP", {}),
        (coloured, "TIFF", {"compression": "tiff_lzw", "exif": exif}), (Image.fromarray(grey), "PPM", {}),
        (coloured, "TGA", {}), (coloured, "JPEG2000", {}),
        (coloured, "AVIF", {}), (Image.fromarray(grey.astype(np.uint16) << 4), "PNG", {}),
        (Image.fromarray((grey / 255).astype(np.float32)), "TIFF", {}), (Image.fromarray(grey).convert("P"), "PNG", {}),
        (Image.fromarray(grey.astype(np.int32) << 20), "TIFF", {}), (Image.fromarray(grey).convert("1"), "TIFF", {}),
    ):  # fmt: skip
        with contextlib.suppress(Exception):  # builds of Pillow differ
            buffer = io.BytesIO()
            picture.save(buffer, form, **more)
            whole.append(buffer.getvalue())

    def read(data: bytes) -> None:
        for shape in (Shape(8, 1), Shape(16, 3)):
            with contextlib.suppress(Unusable):
                assert len(load(data, shape)) == shape.values
        with contextlib.suppress(Unusable):
            load_cifar(data[: len(data) // 3073 * 3073], Shape(8, 1))

    return whole, read


def _texts(path: Path, **settings: Any) -> None:
    from waveletgpt.data import DataSettings, find

    with contextlib.suppress(UserError):
        for document in find(str(path), DataSettings(**settings)).documents(binary=False):
            for chunk in document.chunks:
                chunk.decode()


def tables(folder: Path) -> Reader:
    import pyarrow
    from pyarrow import parquet

    rows = [{"id": i, "text": f"line {i} café, “quoted”\n and more"} for i in range(9)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    separated = "id,text\n" + "\n".join(f'{row["id"]},"{row["text"]}"' for row in rows)
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    texts = [lines, json.dumps(rows, indent=1), separated, separated.replace(",", "\t"), "plain text\n" * 9]
    whole = [buffer.getvalue()]
    whole += [text.encode(encoding) for text in texts for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32")]
    whole += [text.encode("cp1252") for text in texts]

    def read(data: bytes) -> None:
        for suffix in ("parquet",) if b"PAR1" in data else ("jsonl", "json", "csv", "tsv", "txt"):
            path = folder / f"table.{suffix}"
            path.write_bytes(data or b" ")
            for settings in ({}, {"column": "1"}, {"encoding": "cp1252"}):
                _texts(path, **settings)

    return whole, read


def archives(folder: Path) -> Reader:
    import zstandard

    members = {"a.txt": b"some text " * 9, "b/c.jsonl": b'{"text": "more"}\n' * 9, "d.bin": bytes(range(256))}
    tar, zipped, packed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(fileobj=tar, mode="w", format=form) as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(("é" * 60 if name == "d.bin" else "") + name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    for target, way in ((zipped, zipfile.ZIP_STORED), (packed, zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(target, "w", way) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    tars, whole = tar.getvalue(), {}
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
                         (".zst", zstandard.ZstdCompressor().compress)):  # fmt: skip
        whole[pack(tars)] = f".tar{suffix}"
        whole[pack(members["a.txt"]) * 2] = f".txt{suffix}"
    whole |= {tars: ".tar", zipped.getvalue(): ".zip", packed.getvalue(): ".zip", packed.getvalue() * 2: ".zip"}
    names = list(dict.fromkeys(whole.values()))
    starts = {content[:2]: suffix for content, suffix in whole.items()}

    def read(data: bytes) -> None:
        likely = starts.get(data[:2], names[len(data) % len(names)])
        for suffix in {likely, likely.replace(".txt", ".tar")}:
            path = folder / f"x{suffix}"
            path.write_bytes(data or b" ")
            _texts(path)

    return list(whole), read


def labels(folder: Path) -> Reader:
    """Tables of labels beside recordings, and of MAESTRO's splits."""
    from waveletgpt.classify.clips import find_layout
    from waveletgpt.data import DataSettings
    from waveletgpt.data.modalities.music import _table
    from waveletgpt.data.sources.files import Files

    names = ("dev.csv", "eval.csv", "vocabulary.csv", "esc50.csv", "UrbanSound8K.csv", "testing_list.txt", "any.csv")
    whole = [
        b"fname,labels,split\n1,\"Dog,Cat\",train\n2,Dog,val\n", b"0,Dog,/m/1\n1,Cat,/m/2\n",
        b"filename,fold,target,category\na.wav,1,0,dog\nb.wav,2,1,cat\n",
        b"slice_file_name,fsID,start,end,salience,fold,classID,class\na.wav,1,0,1,1,1,0,dog\nb.wav,1,0,1,1,2,1,cat\n",
        b"dog/a.wav\ncat/b.wav\n", b"midi_filename,split\na.mid,train\nb.mid,test\n",
    ]  # fmt: skip
    for name in ("dog/a.wav", "cat/b.wav", "a.mid"):
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_bytes(b"x")

    def read(data: bytes) -> None:
        for name in names:
            (folder / "data" / name).write_bytes(data or b" ")
            others = (
                ["eval.csv"] if name == "dev.csv" else ["validation_list.txt"] if name == "testing_list.txt" else []
            )
            for other in others:
                (folder / "data" / other).write_bytes(data)
            source = Files(folder / "data", DataSettings())
            with contextlib.suppress(UserError):
                layout = find_layout(source, 1)
                layout.label("dog/a.wav")
            with contextlib.suppress(UserError):
                _table(source, DataSettings())
            for made in (name, *others):
                (folder / "data" / made).unlink()

    return whole, read


def recipes(folder: Path) -> Reader:
    from waveletgpt.cli.commands import COMMANDS
    from waveletgpt.cli.main import _defaults

    place = Path(__file__).parents[1] / "recipes"
    whole = [path.read_bytes() for path in sorted(place.glob("*.yaml"))]

    def read(data: bytes) -> None:
        (folder / "r.yaml").write_bytes(data)
        for command in ("train", "compare", "lra", "classify"):
            with contextlib.suppress(UserError):
                _defaults(COMMANDS[command], ["--recipe", str(folder / "r.yaml")])

    return whole, read


def checkpoints(folder: Path) -> Reader:
    """One damaged file in a run folder, then what asks it: evaluate, generate, report, info."""
    import logging

    import torch

    from waveletgpt import cli
    from waveletgpt.data import DataSettings, prepare
    from waveletgpt.training.recipe import Recipe
    from waveletgpt.training.trainer import train

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    (folder / "x.txt").write_text("the cat sat on the mat and the rain fell " * 200)
    store = prepare(folder / "x.txt", "chars", DataSettings(cache_dir=str(folder / "cache")), progress=False)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16, "device": "cpu", "sample_tokens": 4}
    recipe = Recipe().override({**sizes, "preset": "tiny", "max_steps": 2, "batch_size": 2, "eval_windows": 2}, "fuzz")
    run = train(recipe, store, folder / "run", data=str(folder / "x.txt"), show_progress=False)
    store_files = [store.path / "meta.json", store.path / "tokens-validation.bin"]
    files = [path for path in (*run.path.iterdir(), *store_files) if path.is_file()]
    contents = {path: path.read_bytes() for path in files}
    turn = iter(range(1 << 60))

    def read(data: bytes) -> None:
        # Each input begins with the number of the file that it replaces.
        path = files[data[0] % len(files)] if data else files[0]
        path.write_bytes(data[1:])
        asked = (
            ["evaluate", str(run.path), "--windows", "1", "--device", "cpu"],
            ["generate", str(run.path), "--tokens", "2", "--prompt", "the", "--device", "cpu"],
            ["report", str(run.path), "--out", str(folder / "report")],
            ["info", str(run.path)],
        )
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                for words in asked[:2] if path.suffix in (".safetensors", ".bin") else (asked[next(turn) % 4],):
                    with contextlib.suppress(SystemExit):
                        cli.main(words)
        finally:
            for file, content in contents.items():
                if not file.is_file() or file.stat().st_size != len(content) or file == path:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content)

    return [bytes([i]) + contents[file] for i, file in enumerate(files)], read


READERS: dict[str, Callable[[Path], Reader]] = {
    "midi": midi, "audio": audio, "pictures": pictures, "tables": tables, "archives": archives, "labels": labels,
    "recipes": recipes, "checkpoints": checkpoints,
}  # fmt: skip


# The harness


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises TimeoutError in what takes longer than SLOW."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {SLOW} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SLOW)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(name: str, seconds: float, seed: int, folder: Path, inputs: int | None = None) -> dict[str, Any]:
    """Give damaged files to a reader, for so long or so many.

    Returns inputs, peak_bytes, findings ({what: (how often, one of the inputs)}).
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole, read = READERS[name](folder)
    rng = random.Random(seed)
    findings: dict[str, tuple[int, bytes]] = {}
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end and (inputs is None or count < inputs):
        data = whole[count] if count < len(whole) else damaged(whole, rng)
        if name == "checkpoints" and count >= len(whole):
            chosen = whole[rng.randrange(len(whole))]
            data = chosen[:1] + damaged([chosen[1:]], rng)
        (folder / "last").write_bytes(data)  # should the process die
        try:
            with limited():
                read(data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "waveletgpt" in frame.filename] or frames
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            what = f"{type(error).__name__} at {place}: {str(error)[:120]!r}"
            times, first = findings.get(what, (0, data))
            findings[what] = times + 1, min(first, data, key=len)
        count += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"inputs": count, "peak_bytes": peak, "findings": findings}


def _process(name: str, seconds: float, seed: int, folder: Path, results: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders talk
    results.put(fuzz(name, seconds, seed, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="of each reader")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=READERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz-findings"), help="folder for inputs that found something"
    )
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = 0
    for name in options.readers:
        spawn = multiprocessing.get_context("spawn")
        results = spawn.Queue()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            process = spawn.Process(target=_process, args=(name, options.seconds, options.seed, folder, results))
            process.start()
            result = None
            while result is None and (process.is_alive() or not results.empty()):
                with contextlib.suppress(Exception):
                    result = results.get(timeout=1)
            process.join()
            if result is None:
                print(f"{name}: the process died (exit code {process.exitcode})", flush=True)
                options.keep.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(OSError):
                    shutil.copy(folder / "last", options.keep / f"{name}-died")
                found += 1
                continue
        over = result["peak_bytes"] > MOST
        found += over + len(result["findings"])
        print(
            f"{name}: {result['inputs']:,} inputs in {options.seconds:g} s, {len(result['findings'])} findings, "
            f"peak {result['peak_bytes'] / 1e6:,.0f} MB{' (too much)' if over else ''}",
            flush=True,
        )
        for number, (what, (times, data)) in enumerate(sorted(result["findings"].items())):
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{name}-{number}").write_bytes(data)
            print(f"  {times:,} x {what}", flush=True)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
