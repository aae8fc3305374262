"""CIFAR-10 is read in both of its versions, and its pickles are never run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.classify.lra_files import Prepare, cifar, packed, python_2_pickle, shown
from waveletgpt.classify.official import CIFAR10, cifar_records
from waveletgpt.data import SPLITS
from waveletgpt.data.modalities.images import Unusable


def test_cifar_in_both_versions(prepare: Prepare, tmp_path: Path) -> None:
    batches = cifar(tmp_path / "binary" / "cifar-10-batches-bin")
    for protocol in ("python 2", 2, 3, 4):
        folder = tmp_path / str(protocol) / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10)}, 2))
        for name, (planes, labels) in batches.items():
            content = {"batch_label": "training batch 1 of 5", "labels": labels, "data": planes}
            dumped = python_2_pickle(planes, labels) if protocol == "python 2" else pickle.dumps(content, protocol)
            (folder / name).write_bytes(dumped)
    assert np.array_equal(pickle.loads(python_2_pickle(planes, labels), encoding="latin1")["data"], planes)
    store = prepare("image", tmp_path / "binary")
    assert store.classes == CIFAR10
    assert [store.meta["splits"][split]["per_class"] for split in SPLITS] == [[9] * 10, [1] * 10, [5] * 10]
    for folder in ("python 2", "2", "3", "4"):
        data = packed(tmp_path / folder, tmp_path / f"{folder}.tar.gz")
        other = prepare("image", data)
        assert [shown(other, split) for split in SPLITS] == [shown(store, split) for split in SPLITS], folder
    # Grey is ITU-R 601's luma: of the test batch by its formula, up to rounding.
    planes, labels = batches["test_batch"]
    red, green, blue = planes.reshape(-1, 3, 1024).astype(float).swapaxes(0, 1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    examples = store.split("test")
    assert examples.names is not None
    for index, name in enumerate(examples.names):
        number = int(name.rpartition("/")[2])
        assert np.abs(examples.raw(index)[0] - 1.0 - grey[number]).max() <= 0.51
        assert examples.labels[index] == labels[number]


def test_cifar_is_never_unpickled(prepare: Prepare, tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    planes, labels = np.zeros((2, 3072), np.uint8), [1, 2]
    content = pickle.dumps({"evil": Evil(), "labels": labels, "data": planes}, 2)
    assert cifar_records(content) == b"\1" + bytes(3072) + b"\2" + bytes(3072)
    pickle.loads(content)
    assert marker.exists()  # it would have done harm
    marker.unlink()
    cifar(tmp_path / "data")
    (tmp_path / "data" / "data_batch_3").write_bytes(content)
    prepare("image", tmp_path / "data")
    assert not marker.exists()


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 4000))
def test_damaged_batches_are_refused(noise: bytes, place: int) -> None:
    good = python_2_pickle(np.full((1, 3072), 7, np.uint8), [3])
    damaged = good[:place] + noise + good[place + len(noise) + 1 :]
    for content in (noise, damaged, good[:place]):
        try:
            records = cifar_records(content)
        except Unusable:
            continue
        assert len(records) % 3073 == 0


def test_wrong_batches(prepare: Prepare, tmp_path: Path) -> None:
    cifar(tmp_path / "data")
    (tmp_path / "data" / "data_batch_1.bin").write_bytes(bytes(3000))
    (tmp_path / "data" / "data_batch_3.bin").write_bytes(b"\x0c" + bytes(3072))
    (tmp_path / "data" / "data_batch_4").write_bytes(pickle.dumps({"labels": [1, 2]}))
    store = prepare("image", tmp_path / "data")
    assert store.meta["source"]["examples"] == 100
    assert [name.split(": ")[1][:33] for name in store.meta["skipped"]["names"]] == [
        "3,000 bytes are no whole number o", "a label is 12, but there are 10 c", "not a batch of CIFAR-10's Python ",
    ]  # fmt: skip
