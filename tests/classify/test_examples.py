"""What is written is read, whole or not at all, however it came about."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.helpers import with_meta
from waveletgpt.classify.examples import ExampleStore, ExampleWriter, balanced, prepare_once, show
from waveletgpt.classify.settings import TaskSettings
from waveletgpt.data import SPLITS, StoreWriter
from waveletgpt.errors import UserError


def write(path: Path, **changes: Any) -> ExampleStore:
    """A store with five examples of text, of lengths 1 to 5."""
    with ExampleWriter(path, "f" * 64, {"made": "here"}) as writer:
        writer.begin(**{"kind": "tokens", "modality": "text", "classes": ["no", "yes"], "vocab_size": 257, **changes})
        for number in range(5):
            writer.append("train", np.arange(1, number + 2), number % 2, name=f"{number}.txt")
        writer.append("test", np.array([256]), 1)
        writer.finish(note="kept")
    return ExampleStore.open(path)


@st.composite
def contents(draw: st.DrawFn) -> dict[str, Any]:
    """Any examples: (split, inputs, label, clip, name) and what they are."""
    kind = draw(st.sampled_from(["tokens", "waveform"]))
    vocabulary = draw(st.sampled_from([2, 16, 256, 257, 65536])) if kind == "tokens" else None
    inputs = draw(st.integers(1, 2)) if vocabulary else 1
    classes = draw(st.integers(1, 5))
    multi = draw(st.booleans())
    label = st.integers(0, classes - 1)
    if vocabulary:
        values = hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(1, vocabulary - 1))
    else:
        values = hnp.arrays(np.int16, st.integers(1, 40))
    named = draw(st.booleans())
    example = st.tuples(
        st.sampled_from(SPLITS),
        st.lists(values, min_size=inputs, max_size=inputs),
        st.lists(label, max_size=classes, unique=True).map(sorted) if multi else label,
        st.none() | st.integers(0, 99),
        st.text(min_size=1) if named else st.none(),
    )
    return {
        "kind": kind, "vocab_size": vocabulary, "sample_rate": None if vocabulary else 8000, "n_inputs": inputs,
        "classes": [f"class {i}" for i in range(classes)], "multi_label": multi, "named": named,
        "examples": draw(st.lists(example, max_size=12)),
    }  # fmt: skip


@hypothesis_settings(max_examples=60, deadline=None)
@given(content=contents())
def test_what_is_written_is_read(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "store"
    examples, named = content.pop("examples"), content.pop("named")
    with ExampleWriter(path, "key") as writer:
        writer.begin(modality="text" if content["kind"] == "tokens" else "audio", **content)
        for split, inputs, label, clip, name in examples:
            writer.append(split, inputs if len(inputs) > 1 else inputs[0], label, clip, name)
        writer.finish()
    store = ExampleStore.open(path)
    for what, value in content.items():
        assert getattr(store, what) == (tuple(value) if what == "classes" else value)
    assert store.max_length == max((len(each) for example in examples for each in example[1]), default=0)
    for split in SPLITS:
        wanted = [example for example in examples if example[0] == split]
        found = store.split(split)
        assert len(found) == len(wanted) == store.meta["splits"][split]["examples"]
        assert found.names == ([example[4] for example in wanted] if named and wanted else None)
        assert found.clips.tolist() == [i if example[3] is None else example[3] for i, example in enumerate(wanted)]
        lengths = [[len(each) for each in example[1]] for example in wanted]
        assert found.lengths().tolist() == (lengths if content["n_inputs"] == 2 else [each for (each,) in lengths])
        per_class = [0] * len(content["classes"])
        for index, (item, (_, inputs, label, _, _)) in enumerate(zip(found, wanted, strict=True)):
            raw = found.raw(index)
            assert [each.tolist() for each in raw] == [each.tolist() for each in inputs]
            for number in label if content["multi_label"] else [label]:
                per_class[number] += 1
            if content["multi_label"]:
                assert item["labels"].dtype == torch.float32
                assert np.flatnonzero(item["labels"]).tolist() == label == np.flatnonzero(found.labels[index]).tolist()
            else:
                assert (item["labels"].dtype, item["labels"].shape) == (torch.int64, ())
                assert item["labels"] == label == found.labels[index]
            if content["kind"] == "waveform":
                assert item["input_values"].dtype == torch.float32
                assert (item["input_values"] * 32768).tolist() == inputs[0].tolist()
                assert item["input_values"].abs().max() <= 1
            else:
                ids = item["input_ids"] if content["n_inputs"] == 2 else [item["input_ids"]]
                assert [each.tolist() for each in ids] == [each.tolist() for each in inputs]
                assert all(each.dtype == torch.int64 for each in ids)
        assert store.meta["splits"][split]["per_class"] == per_class


def test_a_split_is_a_sequence(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    train = store.split("train")
    assert [len(item["input_ids"]) for item in train] == [1, 2, 3, 4, 5]  # ends by itself
    assert train.raw(-1)[0].tolist() == [1, 2, 3, 4, 5]
    assert train[np.int64(2)]["input_ids"].tolist() == [1, 2, 3]
    for index in (5, -6):
        with pytest.raises(IndexError):
            train[index]
    with pytest.raises(UserError, match='did you mean "validation"'):
        store.split("valid")
    assert (store.meta["note"], store.meta["identity"], store.fingerprint) == ("kept", {"made": "here"}, "f" * 64)


def test_other_processes_map_the_files_themselves(tmp_path: Path) -> None:
    with ExampleWriter(tmp_path / "store", "") as writer:
        writer.begin(kind="tokens", modality="text", classes=["a"], vocab_size=9)
        for _ in range(1000):
            writer.append("train", np.full(10, 8), 0, name="a name")
        writer.finish()
    train = ExampleStore.open(tmp_path / "store").split("train")
    before = train[0]["input_ids"].tolist(), train.labels.tolist(), train.clips.tolist(), train.names
    assert isinstance(train._data, np.memmap)
    dumped = pickle.dumps(train)
    assert len(dumped) < 1000
    again = pickle.loads(dumped)
    assert (again[0]["input_ids"].tolist(), again.labels.tolist(), again.clips.tolist(), again.names) == before


def test_it_feeds_a_data_loader(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(write(tmp_path / "store").split("train"), batch_size=None, shuffle=True)
    assert sorted(len(item["input_ids"]) for item in loader) == [1, 2, 3, 4, 5]


WRONG: dict[str, tuple[dict[str, Any], tuple[Any, ...], str]] = {
    "padding as an id": ({}, (np.array([3, 0]), 0), "id out of range 1 .. 256: 0 .. 3"),
    "an id beyond the vocabulary": ({}, (np.array([257]), 0), "id out of range"),
    "no ids": ({}, (np.array([], int), 0), "shape"),
    "a table of ids": ({}, (np.ones((2, 2), int), 0), "shape"),
    "one input of two": ({"n_inputs": 2}, ([np.array([1])], 0), "1 inputs instead of 2"),
    "two inputs of one": ({}, ([np.array([1]), np.array([1])], 0), "2 inputs instead of 1"),
    "an unknown class": ({}, (np.array([1]), 2), "label 2 of 2 classes"),
    "a negative class": ({}, (np.array([1]), -1), "label -1"),
    "two classes": ({}, (np.array([1]), [0, 1]), "label"),
    "no class": ({}, (np.array([1]), []), "label"),
    "an unknown class among several": ({"multi_label": True}, (np.array([1]), [0, 2]), "label"),
    "samples that are no integers": (
        {"kind": "waveform", "modality": "audio", "vocab_size": None, "sample_rate": 8000},
        (np.array([0.5]), 0),
        "float64, not int16",
    ),
    "a name after none": ({}, (np.array([1]), 0, None, "a"), "names, or none"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_example(what: str, tmp_path: Path) -> None:
    changes, arguments, message = WRONG[what]
    start = {"kind": "tokens", "modality": "text", "classes": ["no", "yes"], "vocab_size": 257}
    with ExampleWriter(tmp_path / "store", "") as writer:
        writer.begin(**{**start, **changes})
        if "after" in what:
            writer.append("train", np.array([1]), 0)
        with pytest.raises(ValueError, match=message):
            writer.append("train", *arguments)
    assert not list(tmp_path.iterdir())


def test_tokens_and_waveforms_need_their_own(tmp_path: Path) -> None:
    with ExampleWriter(tmp_path / "store", "") as writer:
        for wrong in ({"kind": "tokens"}, {"kind": "waveform", "vocab_size": 9}, {"kind": "sounds", "sample_rate": 9}):
            with pytest.raises(ValueError, match="kind"):
                writer.begin(modality="text", classes=["a"], **wrong)


DAMAGE = {
    "truncated data": (lambda path: os.truncate(path / "data-train.bin", 3), "is truncated"),
    "truncated labels": (lambda path: os.truncate(path / "labels-train.bin", 3), "is truncated"),
    "missing ends": (lambda path: (path / "ends-test.bin").unlink(), "is missing"),
    "missing names": (lambda path: (path / "names-train.jsonl").unlink(), "is missing"),
    "no description": (lambda path: (path / "meta.json").unlink(), "is not an example store"),
    "truncated description": (lambda path: os.truncate(path / "meta.json", 50), "is damaged"),
    "another description": (with_meta("kind", "pictures"), "is damaged"),
    "a later format": (with_meta("format", 99), "has format 99"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_refused_and_made_again(damage: str, tmp_path: Path) -> None:
    def fill(writer: ExampleWriter) -> None:
        writer.begin(kind="tokens", modality="text", classes=["a"], vocab_size=300)
        writer.append("train", np.arange(1, 300), 0, name="one")
        writer.append("test", np.arange(1, 9), 0)
        writer.finish()

    store = prepare_once("any", {}, tmp_path, fill)
    harm, message = DAMAGE[damage]
    harm(store.path)
    with pytest.raises(UserError, match=message) as caught:
        ExampleStore.open(store.path)
    assert "prepare the data again" in str(caught.value)
    again = prepare_once("any", {}, tmp_path, fill)
    assert again.path == store.path
    assert again.split("train").raw(0)[0].tolist() == list(range(1, 300))
    assert [path.name for path in store.path.parent.iterdir() if not path.name.endswith(".lock")] == [store.path.name]


def test_a_token_store_is_no_example_store(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "tokens", modality="bytes", fingerprint="") as writer:
        writer.begin(10)
        writer.finish()
    with pytest.raises(UserError, match="prepare the data again"):
        ExampleStore.open(tmp_path / "tokens")
    with pytest.raises(UserError, match="is not an example store"):
        ExampleStore.open(tmp_path / "nowhere")


def _one(writer: ExampleWriter) -> None:
    writer.begin(kind="tokens", modality="text", classes=["a"], vocab_size=9)
    writer.append("train", np.array([1]), 0)
    writer.finish()


def test_made_once_whoever_asks(tmp_path: Path) -> None:
    made = []

    def fill(writer: ExampleWriter) -> None:
        made.append(1)
        _one(writer)

    stores: list[ExampleStore] = []
    threads = [
        threading.Thread(target=lambda: stores.append(prepare_once("a/b c", {"x": 1}, tmp_path, fill))) for _ in "1234"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({store.path for store in stores}) == 1
    assert len(made) == 1
    assert stores[0].path.name.startswith("a-b-c-")
    other = prepare_once("a/b c", {"x": 2}, tmp_path, fill)
    assert len(made) == 2
    assert other.fingerprint != stores[0].fingerprint


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "No space"), UserError, "the disk is full at .*free some space"),
        (OSError(errno.EROFS, "Read-only"), UserError, "Read-only"),
        (UserError("no example"), UserError, "no example"),
    ],
)
def test_what_breaks_off_leaves_nothing(error: Any, raised: Any, message: str | None, tmp_path: Path) -> None:
    def fill(writer: ExampleWriter) -> None:
        writer.begin(kind="tokens", modality="text", classes=["a"], vocab_size=9)
        writer.append("train", np.array([1]), 0)
        raise error

    with pytest.raises(raised, match=message):
        prepare_once("any", {}, tmp_path, fill)
    assert all(path.name.endswith(".lock") for path in (tmp_path / "examples").iterdir())


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), max_size=80))
def test_every_beginning_is_balanced(examples: list[tuple[int, float]]) -> None:
    labels = np.array([label for label, _ in examples], int)
    points = np.array([point for _, point in examples])
    order = balanced(labels, points)
    assert sorted(order.tolist()) == list(range(len(examples)))
    classes = np.unique(labels)
    for label in classes:
        assert np.all(np.diff(points[order[labels[order] == label]]) >= 0)
        share = (labels == label).mean()
        counts = np.cumsum(labels[order] == label)
        # Each class is within half an example of its share of a common fraction, which all classes together define.
        assert np.all(np.abs(counts - share * np.arange(1, len(order) + 1)) <= 1 + len(classes) / 2)


def test_a_rare_class_has_its_share_of_a_beginning() -> None:
    labels = np.array([0] * 10 + [1] * 90)
    order = balanced(labels, np.arange(100) / 100)
    for count in (10, 20, 50):
        assert np.bincount(labels[order[:count]]).tolist() == [count // 10, count * 9 // 10]


def test_for_a_human(tmp_path: Path) -> None:
    def shown(data: Any, **begin: Any) -> Any:
        with ExampleWriter(tmp_path / str(len(list(tmp_path.iterdir()))), "") as writer:
            writer.begin(classes=["a"], **begin)
            writer.append("train", data, 0)
            writer.finish()
        store = ExampleStore.open(writer.path)
        return show(store, store.split("train").raw(0))

    def bytes_(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(int) + 1

    assert shown(bytes_("naïve"), kind="tokens", modality="text", vocab_size=257) == "naïve"
    pair = shown([bytes_("one"), bytes_("two")], kind="tokens", modality="text", vocab_size=257, n_inputs=2)
    assert pair.split() == ["one", "----", "two"]
    # Words in the order of the grammar's description: ten digits, four operators, the bracket.
    words = shown(np.array([11, 1, 10, 15]), kind="tokens", modality="listops", vocab_size=16)
    assert words == "[MIN 0 9 ]"
    picture = np.arange(256).reshape(16, 16)
    assert np.array_equal(
        shown(picture.reshape(-1) + 1, kind="tokens", modality="image", vocab_size=257), picture.astype(np.uint8)
    )
    wave = np.array([-32768, 0, 32767], np.int16)
    assert np.array_equal(shown(wave, kind="waveform", modality="audio", sample_rate=8000), wave)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length must be greater than 0, got 0"),
        ({"train_examples": -1}, "train_examples must be greater than 0, got -1"),
        ({"length": 10, "min_length": 11}, "min_length is 11, but length 10"),
        ({"data_seed": -1}, "data_seed must be greater than or equal to 0, got -1"),
        ({"clip_seconds": float("nan")}, "clip_seconds must be less than or equal to 600, got nan"),
        ({"sample_rate": 10}, "sample_rate must be greater than or equal to 1000, got 10"),
        ({"fold": 11}, "fold must be less than or equal to 10, got 11"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TaskSettings(**changes)
