"""The commands for classifiers, as a user types them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.helpers import waveletgpt

TINY = [
    *("--max-steps", "4", "--batch-size", "4", "--model.n-layer", "1", "--model.n-embd", "16", "--model.n-head", "2"),
    *("--device", "cpu", "--training.threads", "1", "--training.eval-windows", "10", "--training.eval-every", "2"),
]
EXAMPLES = ["--train-examples", "60", "--validation-examples", "20", "--test-examples", "20"]


@pytest.fixture(scope="module")
def listops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison on short expressions."""
    out = tmp_path_factory.mktemp("lra") / "out"
    done = waveletgpt("lra", "listops", "--length", 40, "--min-length", 5, *EXAMPLES, *TINY, "--out", out,
                      "--arms", "none", "fixed", "--cache-dir", out.parent / "cache")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    return out


def test_lra_leaves_a_report_with_published_results(listops: Path) -> None:
    page = (listops / "report.html").read_text()
    assert "36.37" in page  # the benchmark's Transformer
    assert "published" in page.lower()
    summary = json.loads((listops / "summary.json").read_text())
    assert set(summary["arms"]) == {"none", "fixed"}
    assert summary["data"]["splits"]["train"]["examples"] == 60


def test_resume_keeps_what_is_finished(listops: Path) -> None:
    before = (listops / "fixed-seed0" / "model.safetensors").stat().st_mtime_ns
    words = ["lra", "listops", "--length", 40, "--min-length", 5, *EXAMPLES, *TINY, "--out", listops,
             "--arms", "none", "fixed", "--cache-dir", listops.parent / "cache"]  # fmt: skip
    again = waveletgpt(*words)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    assert waveletgpt(*words, "--resume").returncode == 0
    assert (listops / "fixed-seed0" / "model.safetensors").stat().st_mtime_ns == before


def test_evaluate_tells_the_test_accuracy_of_the_run(listops: Path) -> None:
    run = listops / "fixed-seed0"
    done = waveletgpt("evaluate", run, "--split", "test", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["accuracy"] == json.loads((run / "run.json").read_text())["result"]["test"]["accuracy"]


def test_predict_names_classes(listops: Path, tmp_path: Path) -> None:
    run, file = listops / "fixed-seed0", tmp_path / "expression.txt"
    file.write_text("[MAX 2 9 [MIN 4 7 ] 0 ]")
    done = waveletgpt("predict", run, file, "--device", "cpu", "--json", "--top", 10)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert set(row["classes"]) == set("0123456789")
    assert sum(row["classes"].values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[MAX two ]", '"two"'),
        ("", "or is empty"),
        ("9 " * 60, "60 words"),
        ("[MAX 2 9 ] = 9", "= or is empty"),
        ("[MAX 2 9", "not one whole expression"),
        ("] 3", "without an operation"),
        (None, "is no part of an expression"),
    ],
)
def test_predict_tells_what_is_no_expression(listops: Path, tmp_path: Path, content: str | None, message: str) -> None:
    """None: a terabyte of nothing."""
    file = tmp_path / "expression.txt"
    file.write_text(content or "")
    if content is None:
        os.truncate(file, 1 << 40)
    done = waveletgpt("predict", listops / "fixed-seed0", file)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_predict_takes_pairs_of_texts(tmp_path: Path) -> None:
    table = tmp_path / "lra_release"
    table.mkdir()
    for part, rows in (("train", 16), ("eval", 8), ("test", 8)):
        lines = [f"{i % 2}\tA-{i}\tB-{i}\ta text of {part} {i}\tanother of {i}\n" for i in range(rows)]
        (table / f"new_aan_pairs.{part}.tsv").write_text("".join(lines))
    done = waveletgpt("lra", "retrieval", "--data", table, "--length", 30, *TINY, "--arms", "fixed", "--out",
                      tmp_path / "out", "--cache-dir", tmp_path / "cache")  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out" / "fixed-seed0"
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for file in files:
        file.write_text(f"what {file.stem} says, up to thirty bytes of it")
    done = waveletgpt("predict", run, files[0], files[1], files[0], files[2], "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["file"] for row in json.loads(done.stdout)] == [f"{files[0]} {files[1]}", f"{files[0]} {files[2]}"]
    assert all(set(row["classes"]) == {"unrelated", "related"} for row in json.loads(done.stdout))
    done = waveletgpt("predict", run, *files)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("compares 2 files at a time, but 3 are named: name both files of each pair")


def test_report_reads_classifiers(listops: Path, tmp_path: Path) -> None:
    done = waveletgpt("report", listops, "--out", tmp_path / "page")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "page" / "summary.json").read_text())["score"] == "accuracy"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lra"], "listops, text, retrieval"),
        (["lra", "listop"], 'did you mean "listops"'),
        (["lra", "retrieval"], "retrieval"),
        (["lra", "image", "--preset", "clips", "--data", "{pictures}"], "--preset clips does not fit"),
        (["lra", "listops", "--arms", "none", "fixt"], "fixt"),
        (["lra", "listops", "--modality", "text"], '--modality: no "text"'),
        (["lra", "listops", "--modality", "chars"], "modality of its own"),
        (["classify"], "name a folder"),
        (["predict", "{run}"], "name at least one file"),
        (["predict", "{run}", "no-such.txt"], "no-such.txt"),
        (["predict", "{pictures}", "x"], "not a run folder"),
        (["generate", "{run}"], "waveletgpt predict"),
    ],
)
def test_mistakes_are_told_in_one_line(listops: Path, tmp_path: Path, words: list[str], message: str) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(12):
                pixels = np.random.default_rng([i, name == "cat", split == "test"]).integers(0, 255, (32, 32))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    fill = {"run": listops / "fixed-seed0", "pictures": tmp_path / "pictures"}
    where = ["--out", tmp_path / "out", "--cache-dir", tmp_path / "cache"] if words[0] in ("lra", "classify") else []
    done = waveletgpt(*(word.format(**fill) for word in words), *where)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_pictures_and_predict(tmp_path: Path) -> None:
    """Light against dark pictures, through the whole road."""
    for split, count in (("train", 30), ("test", 6)):
        for name, level in (("dark", 40), ("light", 200)):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i + 1000 * level + (split == "test")).integers(
                    level - 30, level + 30, (8, 8)
                )
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    words = ["--data", tmp_path / "pictures", "--length", 64, "--max-steps", 60, "--lr", 0.01, "--arms", "none"]
    where = ["--out", tmp_path / "out", "--cache-dir", tmp_path / "cache"]
    done = waveletgpt("lra", "image", *TINY, *words, *where)
    assert done.returncode == 0, done.stderr
    told = waveletgpt("predict", tmp_path / "out" / "none-seed0", tmp_path / "pictures" / "test" / "light" / "0.png")
    assert told.returncode == 0, told.stderr
    assert ": light " in told.stdout


def test_recordings_and_predict(tmp_path: Path) -> None:
    """A folder per class, in which silence and noise are told apart."""
    for kind, level in (("loud", 0.5), ("quiet", 0.001)):
        folder = tmp_path / "sounds" / kind
        folder.mkdir(parents=True)
        for i in range(30):
            wave = np.random.default_rng([i, kind == "loud"]).uniform(-level, level, 1600)
            soundfile.write(folder / f"{i}.wav", wave, 8000)
    words = ["--model.frame-size", 100, "--model.frame-hidden", 16, "--sample-rate", 8000, "--clip-seconds", 0.1]
    where = ["--out", tmp_path / "out", "--cache-dir", tmp_path / "cache"]
    done = waveletgpt("classify", tmp_path / "sounds", *TINY, "--max-steps", 40, "--lr", 0.01, *words, *where)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out" / "fixed-seed0"
    assert json.loads((run / "run.json").read_text())["result"]["test"]["recordings"] == 6
    told = waveletgpt("predict", run, *(tmp_path / "sounds" / kind / "0.wav" for kind in ("loud", "quiet")), "--top", 1)
    assert told.returncode == 0, told.stderr
    assert [line.split(": ")[1].split()[0] for line in told.stdout.splitlines()] == ["loud", "quiet"]
    (tmp_path / "noise.wav").write_bytes(b"no sound")
    told = waveletgpt("predict", run, tmp_path / "noise.wav")
    assert told.returncode == 2
    assert "cannot be read as a recording" in told.stderr
