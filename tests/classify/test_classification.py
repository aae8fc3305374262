"""Classifiers: what is measured is right, batches depend on seed and index alone, a run leaves what a report needs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waveletgpt.classify.examples import ExampleStore, ExampleWriter, prepare_once
from waveletgpt.classify.settings import CLASSIFIER_PRESETS, ClassifierRecipe
from waveletgpt.classify.task import (
    Augmentation,
    ShuffledExamples,
    by_recording,
    collate,
    confusion,
    measure,
    probabilities,
)
from waveletgpt.errors import UserError
from waveletgpt.report import write_results
from waveletgpt.runs.folder import RunFolder, find_runs
from waveletgpt.training.compare import compare
from waveletgpt.training.recipe import Recipe
from waveletgpt.training.trainer import task_of, train

SIZES = {"train": 120, "validation": 30, "test": 30}


def texts(writer: ExampleWriter) -> None:
    """The class is which of three letters stands somewhere in the first half."""
    random = np.random.default_rng(0)
    writer.begin(kind="tokens", modality="text", classes=["a", "b", "c"], vocab_size=257)
    for split, count in SIZES.items():
        for _ in range(count):
            label, ids = int(random.integers(3)), random.integers(60, 110, int(random.integers(8, 20)))
            ids[len(ids) // 3] = 200 + label
            writer.append(split, ids.astype(np.uint16), label)
    writer.finish(source={"name": "letters"})


def pairs(writer: ExampleWriter) -> None:
    random = np.random.default_rng(1)
    writer.begin(kind="tokens", modality="text", classes=["no", "yes"], n_inputs=2, vocab_size=257)
    for split, count in SIZES.items():
        for _ in range(count):
            both = [random.integers(60, 110, int(random.integers(4, 9))).astype(np.uint16) for _ in range(2)]
            writer.append(split, both, int(random.integers(2)))
    writer.finish(source={"name": "pairs"})


def waves(writer: ExampleWriter, multi_label: bool = False) -> None:
    """Recordings of one to three pieces; the class is the pitch."""
    random = np.random.default_rng(2)
    labels = ["low", "mid", "high"]
    writer.begin(kind="waveform", modality="audio", classes=labels, multi_label=multi_label, sample_rate=8000)
    for split, count in SIZES.items():
        for clip in range(count):
            label = int(random.integers(3))
            for piece in range(int(random.integers(1, 4))):
                time = np.arange(400 - 40 * piece) / 8000
                wave = np.sin(2 * np.pi * 300 * 2**label * time + random.uniform(0, 6)) * 9000
                also = [label, (label + 1) % 3] if multi_label and clip % 2 else [label]
                writer.append(split, wave.astype(np.int16), also if multi_label else label, clip=clip)
    writer.finish(source={"name": "waves"})


def store_of(folder: Path, name: str) -> ExampleStore:
    fill = {"texts": texts, "pairs": pairs, "waves": waves, "tags": lambda writer: waves(writer, multi_label=True)}[
        name
    ]
    return prepare_once(name, {"name": name}, folder, fill)


def tiny_recipe(**changes: object) -> ClassifierRecipe:
    base = {
        "max_steps": 8,
        "batch_size": 4,
        "device": "cpu",
        "n_layer": 2,
        "n_embd": 16,
        "n_head": 2,
        "eval_every": 4,
        "eval_windows": 20,
        "save_every": 4,
        "log_every": 2,
        "threads": 1,
    }
    return ClassifierRecipe().override({**base, **changes}, "test")


AUDIO = {"preset": "clips", "frame_size": 50, "frame_hidden": 16}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("texts", {}),
        ("texts", {"causal": False, "pooling": "attention", "mixing": "learnable"}),
        ("pairs", {"pooling": "last"}),
        ("waves", {**AUDIO, "gain": 6.0, "crop": 0.2}),
        ("waves", {**AUDIO, "mixup": 0.4}),
        ("tags", {**AUDIO, "mixup": 0.4}),
    ],
)
def test_a_run_trains_and_leaves_what_a_report_needs(tmp_path: Path, name: str, changes: dict) -> None:
    store = store_of(tmp_path, name)
    run = train(tiny_recipe(**changes), store, tmp_path / "run", data=name, show_progress=False)
    score = "map" if store.multi_label else "accuracy"
    curve = [row for row in run.metrics() if "nll" in row]
    assert [row["step"] for row in curve] == [0, 4, 8]
    assert all(0 <= row[score] <= 1 and math.isfinite(row["nll"]) for row in curve)
    result = run.info["result"]
    recordings = len(np.unique(store.split("test").clips))
    assert result["test"]["recordings"] == recordings
    found = json.loads((run.path / "predictions.json").read_text())
    assert found["test"] == result["test"]
    if not store.multi_label:
        counts = np.array(found["confusion"])
        assert counts.sum() == recordings
        assert np.trace(counts) / recordings == pytest.approx(result["test"]["accuracy"])
        first = np.unique(store.split("test").clips, return_index=True)[1]
        assert counts.sum(1).max() / recordings == result["test"]["majority_class"]
        assert (
            counts.sum(1).tolist()
            == np.bincount(store.split("test").labels[first], minlength=3)[: len(counts)].tolist()
        )
    for example in found["examples"]:
        assert len(example["said"]) == min(3, len(store.classes))
        if store.modality == "audio":
            assert (run.path / example["file"]).stat().st_size > 100


def test_it_learns(tmp_path: Path) -> None:
    """A class that is written in the input is found; guessing gives a third."""
    recipe = tiny_recipe(
        max_steps=250, batch_size=16, lr=1e-2, n_embd=32, eval_every=250, save_every=250, mixing="fixed"
    )
    run = train(recipe, store_of(tmp_path, "texts"), tmp_path / "run", data="texts", show_progress=False)
    assert run.info["result"]["validation"]["accuracy"] > 0.8


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    store, recipe = store_of(tmp_path, "waves"), tiny_recipe(**AUDIO, gain=3.0, crop=0.1)
    whole = train(recipe, store, tmp_path / "whole", data="waves", show_progress=False)
    import shutil

    shutil.copytree(whole.path, tmp_path / "part")
    part = RunFolder(tmp_path / "part")
    shutil.rmtree(part.path / "checkpoint-8")
    (part.path / "model.safetensors").unlink()
    part.update_info(status="running")
    train(recipe, store, part.path, data="waves", resume=True, show_progress=False)
    assert (part.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    assert (part.path / "predictions.json").read_text() == (whole.path / "predictions.json").read_text()


def test_compare_writes_summary_and_report(tmp_path: Path) -> None:
    store = store_of(tmp_path, "texts")
    summary = compare(tiny_recipe(), store, tmp_path / "out", data="texts", arms=["none", "fixed"], seeds=2)
    assert summary["score"] == "accuracy"
    assert summary["arms"]["fixed"]["extra_parameters"] == 0
    per_seed = [
        RunFolder(tmp_path / "out" / f"fixed-seed{seed}").info["result"]["test"]["accuracy"] for seed in range(2)
    ]
    assert summary["arms"]["fixed"]["test"]["per_seed"] == per_seed
    page = (tmp_path / "out" / "report.html").read_text()
    for heading in ("Learning curves", "Confusion", "Examples", "Set-up"):
        assert heading in page
    assert "nan" not in page.lower().replace("nano", "")
    header, *rows = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    assert header == "arm,seed,step,tokens,seconds,split,loss,accuracy,top5"
    (last,) = (row.split(",") for row in rows if row.startswith("fixed,1,8,") and ",validation," in row)
    run = RunFolder(tmp_path / "out" / "fixed-seed1")
    assert float(last[7]) == run.metrics()[-1]["accuracy"]
    # What somebody's editor or a crash left of its files is no reason not to report the rest.
    with run.metrics_path.open("a") as file:
        file.write('5\n{"nll": 2.0}\n{"step": 9, "nll"')
    for spoilt in ('{"examples": [{"kind": "text"}]}', "[]", "{"):
        (run.path / "predictions.json").write_text(spoilt)
        assert write_results(tmp_path / "out", list(find_runs(tmp_path / "out")), "none") == summary


@pytest.mark.parametrize(
    ("accuracies", "learned"),
    [((0.5, 0.62), False), ((0.5, 0.64), True)],  # of 100; a standard error is 5 points
)
def test_a_report_tells_that_the_baseline_only_guesses(
    tmp_path: Path, accuracies: tuple[float, float], learned: bool
) -> None:
    store = store_of(tmp_path, "texts")
    compare(tiny_recipe(max_steps=1), store, tmp_path / "out", data="texts", arms=["none", "fixed"], seeds=2)
    for seed, accuracy in enumerate(accuracies):
        run = RunFolder(tmp_path / "out" / f"none-seed{seed}")
        test = {"accuracy": accuracy, "top5": 1.0, "recordings": 100, "majority_class": 0.53}
        run.update_info(result={**run.info["result"], "test": test})
    summary = write_results(tmp_path / "out", list(find_runs(tmp_path / "out")), "none")
    told = [note for note in summary["notes"] if "most common class" in note]
    assert bool(told) is not learned
    assert ("most common class" in (tmp_path / "out" / "report.html").read_text()) is not learned


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("texts", AUDIO, "`preset=clips` does not fit this data"),
        ("waves", {}, "recordings need a preset with frames"),
        ("waves", {**AUDIO, "frame_size": -4}, "frame_size=-4 must be at least 1"),
        ("texts", {"n_positions": 5}, "too short for examples of"),
        ("texts", {"pooling": "max"}, "pooling"),
        ("texts", {"gain": 3.0}, "are for recordings, and this data has none"),
    ],
)
def test_settings_that_do_not_fit_are_told(tmp_path: Path, name: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_of(store_of(tmp_path, name)).build_model(tiny_recipe(**changes))


def test_settings_out_of_range_are_told() -> None:
    with pytest.raises(UserError, match="mixup"):
        tiny_recipe(mixup=-1)
    with pytest.raises(UserError, match="preset"):
        tiny_recipe(preset="lra-smal")


def test_examples_depend_on_seed_and_index_alone(tmp_path: Path) -> None:
    store = store_of(tmp_path, "waves")
    augment = Augmentation(6.0, 0.3, 0.2)
    forward = [ShuffledExamples(store, 400, 5, augment)[i] for i in range(400)]
    other = ShuffledExamples(store, 999, 5, augment)
    for i in reversed(range(0, 400, 7)):
        assert torch.equal(other[i]["input_values"], forward[i]["input_values"])
        assert torch.equal(other[i]["labels"], forward[i]["labels"])


def test_every_epoch_has_every_example_once(tmp_path: Path) -> None:
    store = store_of(tmp_path, "texts")
    rows, size = ShuffledExamples(store, 240, 0), SIZES["train"]
    epochs = [[rows._at(i) for i in range(start, start + size)] for start in (0, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_augmentation_is_what_it_says(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    wave = torch.linspace(-0.1, 0.1, 100)
    for _ in range(20):
        changed = Augmentation(6.0, 0.0, 0.0).change(wave, random)
        ratio = float(changed[-1] / wave[-1])
        assert 10 ** (-6 / 20) <= ratio <= 10 ** (6 / 20)
        assert torch.allclose(changed, wave * ratio)
        moved = Augmentation(0.0, 0.3, 0.0).change(wave, random)
        assert moved.shape == wave.shape
        shifts = [s for s in range(-30, 31) if torch.equal(_shifted(wave, s), moved)]
        assert len(shifts) == 1
    labels = torch.stack([ShuffledExamples(store_of(tmp_path, "waves"), 50, 0, Augmentation(0, 0, 1.0))[i]["labels"]
                          for i in range(50)])  # fmt: skip
    assert torch.allclose(labels.sum(1), torch.ones(50))
    assert ((labels > 0.01) & (labels < 0.99)).any()


def _shifted(wave: torch.Tensor, by: int) -> torch.Tensor:
    out = torch.zeros_like(wave)
    if by >= 0:
        out[by:] = wave[: len(wave) - by]
    else:
        out[:by] = wave[-by:]
    return out


def test_collate_masks_what_it_fills_up() -> None:
    rows = [{"input_ids": torch.arange(1, n + 1), "labels": torch.tensor(n)} for n in (2, 4)]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [2, 4]
    assert "attention_mask" not in collate(rows[:1])
    two = collate([{"input_ids": [torch.ones(2).long(), torch.ones(3).long()], "labels": torch.tensor(0)}] * 2)
    assert two["input_ids"].shape == two["attention_mask"].shape == (2, 2, 3)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """By definition: over thresholds from high to low, precision times the recall it adds."""
    found, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        recall = (taken & positive).sum() / positive.sum()
        found += (recall - before) * (taken & positive).sum() / taken.sum()
        before = recall
    return found


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 8), st.booleans())
def test_mean_average_precision_is_the_area_under_the_steps(seed: int, n: int, classes: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (n, classes)) / 4 if ties else random.random((n, classes))
    labels = (random.random((n, classes)) < 0.3).astype(float)
    each = [average_precision(scores[:, k], labels[:, k] > 0.5) for k in range(classes) if labels[:, k].any()]
    found = measure(scores, labels)
    assert found["map"] == pytest.approx(np.mean(each) if each else 0.0)
    five = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    assert found["top5"] == np.mean([any(labels[i, five[i]]) for i in range(n)])


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(2, 8))
def test_confusion_counts_true_and_likeliest_classes(seed: int, n: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    scores, labels = random.integers(0, 4, (n, classes)) / 4, random.integers(0, classes, n)
    counts = np.zeros((classes, classes), int)
    for row, label in zip(scores, labels, strict=True):
        counts[label, list(row).index(max(row))] += 1
    assert (confusion(scores, labels) == counts).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_numbers_are_measured_all_the_same(bad: float) -> None:
    """The loss of such a run ends it, with a line that says so."""
    found = measure(np.array([[bad, 0.2], [0.3, bad]]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert 0 <= found["map"] <= 1


def test_measures_by_hand() -> None:
    scores = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.5, 0.1]])
    found = measure(scores, np.array([0, 1, 1]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["top5"] == 1.0
    assert confusion(scores, np.array([0, 1, 1])).tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    tags = np.array([[1, 0, 0], [0, 1, 1], [0, 1, 0]], float)
    # Class 0 ranks its one positive first; 1 has them at ranks 1 and 3; 2 first.
    assert measure(scores, tags)["map"] == pytest.approx((1 + (1 / 1 + 2 / 3) / 2 + 1) / 3)


def test_recordings_are_averaged() -> None:
    scores = np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8], [0.0, 1.0]])
    mean, labels = by_recording(scores, np.array([0, 0, 1, 1]), np.array([4, 4, 2, 2]))
    assert mean.tolist() == [[pytest.approx(0.1), pytest.approx(0.9)], [pytest.approx(0.6), pytest.approx(0.4)]]
    assert labels.tolist() == [1, 0]
    assert probabilities(np.array([[0.0, 0.0]]), True).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("preset", "length", "vocabulary", "inputs", "published"),
    [
        ("lra-listops", 2000, 16, 1, 8_948_746),
        ("lra-text", 4000, 257, 1, 3_486_722),
        ("lra-retrieval", 4000, 257, 2, 1_087_746),
        ("lra-image", 1024, 257, 1, 248_458),
        ("lra-pathfinder", 1024, 257, 1, 26_530),
        ("lra-pathx", 16384, 257, 1, 537_954),
    ],
)
def test_presets_have_the_parameters_of_the_published_transformer(
    preset: str, length: int, vocabulary: int, inputs: int, published: int
) -> None:
    """Within 10 %, the benchmark's own rule; counted from its released configurations."""
    from waveletgpt import WaveletGPTConfig, WaveletGPTForSequenceClassification

    assert set(CLASSIFIER_PRESETS) > {preset}
    config = WaveletGPTConfig(
        vocab_size=vocabulary,
        n_positions=length,
        n_inputs=inputs,
        num_labels=10 if preset in ("lra-listops", "lra-image") else 2,
        mixing="none",
        tie_word_embeddings=False,
        **CLASSIFIER_PRESETS[preset],
    )
    with torch.device("meta"):
        model = WaveletGPTForSequenceClassification(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.1)


def test_a_language_models_recipe_is_a_programmers_mistake(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        task_of(store_of(tmp_path, "texts")).build_model(Recipe())


def test_held_out_examples_are_of_all_classes(tmp_path: Path) -> None:
    """Where classes stand in turn, as in balanced sets, a stride over them would see a few only."""

    def in_turn(writer: ExampleWriter) -> None:
        writer.begin(kind="tokens", modality="text", classes=list("abcdefghij"), vocab_size=257)
        for split in SIZES:
            for i in range(1000):
                writer.append(split, np.array([1 + i % 10], np.uint16), i % 10)
        writer.finish(source={"name": "in turn"})

    store = prepare_once("turn", {"name": "turn"}, tmp_path, in_turn)
    recipe = tiny_recipe(eval_windows=200)
    task = task_of(store)
    chosen = [int(row["labels"]) for row in task.eval_data(recipe, task.build_model(recipe))]
    assert len(chosen) == 200
    assert np.bincount(chosen, minlength=10).min() > 5
    assert [int(row["labels"]) for row in task_of(store).eval_data(recipe, None)] == chosen
