"""The tasks have the examples they should have, in splits that share nothing, from every official layout."""

from __future__ import annotations

import io
import logging
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.classify.lra_files import (
    Prepare,
    independent,
    official_listops,
    official_pathfinder,
    packed,
    papers,
    pictures,
    reviews,
    shown,
)
from waveletgpt.classify.examples import ExampleStore, show
from waveletgpt.classify.long_range_arena import PUBLISHED, TASKS
from waveletgpt.data import NAMED, SPLITS
from waveletgpt.data.modalities.listops import WORDS
from waveletgpt.errors import UserError


def test_the_table() -> None:
    assert list(TASKS) == ["listops", "text", "retrieval", "image", "pathfinder", "pathx"]
    for task in TASKS.values():
        assert set(task.published) == set(SPLITS)
        assert set(task.published_accuracies) == {row.name for row in PUBLISHED}
    # The averages that the papers give for these rows are those of these figures.
    averages = [[a for a in row.accuracies.values() if a is not None] for row in PUBLISHED]
    assert [round(statistics.mean(row), 2) for row in averages] == [54.39, 74.28, 87.46]


# ListOps

FUNCTIONS = {
    "MAX": lambda *values: max(values),
    "MIN": lambda *values: min(values),
    "MED": lambda *values: int(statistics.median(values)),
    "SM": lambda *values: sum(values) % 10,
}


def value_of(expression: str) -> int:
    """By Python itself: each operation a call of a function."""
    code = " ".join(f"{word[1:]}(" if word[0] == "[" else word.replace("]", ")") + "," for word in expression.split())
    return eval(code.rstrip(","), dict(FUNCTIONS))


def test_listops_is_generated(prepare: Prepare) -> None:
    store = prepare("listops", length=120, train_examples=60, validation_examples=20, test_examples=30)
    assert (store.modality, store.kind, store.vocab_size, store.n_inputs) == ("listops", "tokens", 16, 1)
    assert store.classes == tuple("0123456789")
    assert {split: len(store.split(split)) for split in SPLITS} == {"train": 60, "validation": 20, "test": 30}
    for split in SPLITS:
        for expression, label in shown(store, split):
            assert value_of(expression) == label
            assert 30 <= len(expression.split()) <= 120  # a quarter of the longest, as 500 to 2000
    assert independent(store)
    assert store.max_length <= 120
    assert prepare("listops", length=20, min_length=18, train_examples=5, validation_examples=5, test_examples=5)


def test_generated_examples_depend_on_what_they_should(prepare: Prepare) -> None:
    counts = {"train_examples": 20, "validation_examples": 10, "test_examples": 15, "length": 60}
    first = prepare("listops", **counts)
    assert prepare("listops", **counts).path == first.path
    again = prepare("listops", cache="another", **counts)
    assert again.fingerprint == first.fingerprint
    more = prepare("listops", **{**counts, "train_examples": 50, "validation_examples": 30})
    other = prepare("listops", **counts, data_seed=1)
    for split in SPLITS:
        assert shown(again, split) == shown(first, split)
        assert shown(more, split)[: len(first.split(split))] == shown(first, split)
        assert not set(shown(other, split)) & set(shown(first, split))
    assert shown(more, "test") == shown(first, "test")


def test_splits_share_nothing_even_where_there_is_hardly_anything(prepare: Prepare) -> None:
    store = prepare("listops", length=1, train_examples=5, validation_examples=2, test_examples=3)
    assert independent(store)
    assert sorted(label for split in SPLITS for _, label in shown(store, split)) == list(range(10))
    with pytest.raises(UserError, match="found only 10 of 11 different expressions of 1 to 1 tokens"):
        prepare("listops", length=1, train_examples=6, validation_examples=2, test_examples=3)


def test_official_listops(prepare: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = official_listops(tmp_path / "lra_release" / "listops-1000")
    store = prepare("listops", tmp_path / "lra_release")
    for split in SPLITS:
        held = set(rows["test"] + rows["validation"] * (split == "train")) if split != "test" else set()
        assert sorted(shown(store, split)) == sorted(row for row in rows[split] if row not in held)
    assert store.meta["division"] == "given"
    train = tmp_path / "lra_release" / "listops-1000" / "basic_train.tsv"
    train.write_bytes(train.read_bytes() + b"[MAX 1 2 ]\t7\r\n[MAX 1 1 1 1 1 1 1 1 1 1 ]\t1\r\n")
    with caplog.at_level(logging.WARNING):
        again = prepare("listops", tmp_path / "lra_release", length=9)
    assert shown(again, "train") == shown(store, "train")
    assert again.meta["skipped"]["count"] == 2
    assert "1 wrong rows, the first in line 42 (is 2, not 7)" in caplog.text
    assert "1 expressions of more than 9 tokens" in caplog.text


# Text


def stored_bytes(store: ExampleStore, split: str) -> dict[str, tuple[bytes, int]]:
    examples = store.split(split)
    assert examples.names is not None
    return {
        name.split("aclImdb/")[-1]: ((examples.raw(index)[0] - 1).astype(np.uint8).tobytes(), int(label))
        for index, (name, label) in enumerate(zip(examples.names, examples.labels, strict=True))
    }


def test_reviews(prepare: Prepare, tmp_path: Path) -> None:
    folder = reviews(tmp_path / "aclImdb")
    store = prepare("text", folder, length=50)
    assert (store.modality, store.vocab_size, store.classes, store.max_length) == ("text", 257, ("neg", "pos"), 50)
    sizes = {"train": [36, 36], "validation": [4, 4], "test": [30, 30]}
    assert {split: store.meta["splits"][split]["per_class"] for split in SPLITS} == sizes
    assert store.meta["division"] == "held out"
    for split in SPLITS:
        for name, (content, label) in stored_bytes(store, split).items():
            assert content == (folder / name).read_bytes()[:50]
            assert name.split("/")[:2] == ["test" if split == "test" else "train", store.classes[label]]
    assert independent(store)
    assert not set(stored_bytes(store, "train")) & set(stored_bytes(store, "validation"))
    whole = prepare("text", folder)
    assert whole.max_length == max(path.stat().st_size for path in folder.glob("t*/[np]*/*.txt"))
    # The length is no part of what decides the splits.
    assert [set(stored_bytes(whole, split)) for split in SPLITS] == [set(stored_bytes(store, s)) for s in SPLITS]


@pytest.mark.parametrize("name", ["aclImdb_v1.tar.gz", "aclImdb.tar.xz"])
def test_an_archive_is_as_good_as_a_folder(name: str, prepare: Prepare, tmp_path: Path) -> None:
    folder = reviews(tmp_path / "aclImdb", 10, 5)
    archive = packed(folder, tmp_path / name)
    a, b = prepare("text", folder), prepare("text", archive)
    for split in SPLITS:
        assert stored_bytes(a, split) == stored_bytes(b, split)
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(UserError, match=f"{name}.* is (broken|truncated)"):
        prepare("text", archive)


def test_the_named_set(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = reviews(tmp_path / "aclImdb", 10, 5)
    packed(folder, tmp_path / "aclImdb_v1.tar.gz")
    with pytest.raises(UserError, match=r"has .* bytes instead of 84,125,825"):
        prepare("text", data_dir=str(tmp_path))
    monkeypatch.setitem(NAMED, "imdb", replace(NAMED["imdb"], size=None, sha256=None))
    store = prepare("text", data_dir=str(tmp_path))
    assert store.fingerprint == prepare("text", "imdb", data_dir=str(tmp_path)).fingerprint
    assert stored_bytes(store, "test") == stored_bytes(prepare("text", folder), "test")


def test_copies_stay_on_one_side(prepare: Prepare, tmp_path: Path) -> None:
    folder = reviews(tmp_path / "aclImdb")
    for number in range(5):  # in training and in the test
        (folder / "train" / "pos" / f"copy{number}.txt").write_bytes(
            (folder / "test" / "neg" / f"{number}_7.txt").read_bytes()
        )
    for number in range(40):  # all of training twice
        original = folder / "train" / "neg" / f"{number}_7.txt"
        original.with_name(f"twice{number}.txt").write_bytes(original.read_bytes())
    store = prepare("text", folder)
    assert independent(store)
    assert len(store.split("test")) == 60
    assert sum(len(store.split(split)) for split in SPLITS) + store.meta["source"]["copies_left_out"] == 185
    assert 5 <= store.meta["source"]["copies_left_out"] <= 10


def test_the_test_split_is_what_it_is(prepare: Prepare, tmp_path: Path) -> None:
    folder = reviews(tmp_path / "aclImdb")
    first = prepare("text", folder)
    for changes in ({"validation_examples": 2}, {"validation_examples": 50}, {"train_examples": 10}):
        assert stored_bytes(prepare("text", folder, **changes), "test") == stored_bytes(first, "test")
    # A few examples for validation take no others away from training than the tenth did.
    assert stored_bytes(prepare("text", folder, validation_examples=2), "train") == stored_bytes(first, "train")
    most = prepare("text", folder, validation_examples=50)
    assert [len(most.split(split)) for split in SPLITS] == [30, 50, 60]
    assert set(stored_bytes(first, "validation")) <= set(stored_bytes(most, "validation"))


def test_fewer_are_a_part_of_more_and_balanced(prepare: Prepare, tmp_path: Path) -> None:
    folder = reviews(tmp_path / "aclImdb")
    for path in sorted((folder / "train" / "neg").iterdir())[10:]:
        path.unlink()  # 10 of one class, 40 of the other
    more = prepare("text", folder, train_examples=40, test_examples=20)
    for count in (5, 10, 20):
        fewer = prepare("text", folder, train_examples=count, test_examples=10)
        assert fewer.meta["splits"]["train"]["per_class"] == [count // 5, count * 4 // 5]
        assert fewer.meta["splits"]["test"]["per_class"] == [5, 5]
        assert shown(fewer, "train") == shown(more, "train")[:count]
    other = prepare("text", folder, train_examples=20, data_seed=1)
    assert set(stored_bytes(other, "train")) != set(stored_bytes(fewer, "train"))


# Retrieval


def test_retrieval(prepare: Prepare, tmp_path: Path) -> None:
    rows = papers(tmp_path / "lra_release" / "tsv_data")
    for length in (4000, 100):
        store = prepare("retrieval", tmp_path / "lra_release", length=length)
        assert (store.n_inputs, store.classes, store.vocab_size) == (2, ("unrelated", "related"), 257)
        for split in SPLITS:
            examples = store.split(split)
            found = [
                (int(label), *((ids - 1).astype(np.uint8).tobytes() for ids in examples.raw(index)))
                for index, label in enumerate(examples.labels)
            ]
            assert sorted(found) == sorted((label, one[:length], two[:length]) for label, one, two in rows[split])
            assert [ids.shape for ids in examples[0]["input_ids"]] == [each.shape for each in examples.raw(0)]
        assert independent(store)
        assert examples.names is not None
        assert all(name.endswith(" W02-9999") for name in examples.names)


def test_wrong_tables_of_papers(prepare: Prepare, tmp_path: Path) -> None:
    papers(tmp_path / "ids", columns=3)  # as in the repository, where texts are left out
    with pytest.raises(
        UserError, match=r"new_aan_pairs.*\.tsv: its first line has 3 columns, the first \"0.0\", not a label"
    ):
        prepare("retrieval", tmp_path / "ids")
    papers(tmp_path / "good")
    train = tmp_path / "good" / "new_aan_pairs.train.tsv"
    train.write_bytes(train.read_bytes() + b"2.0\ta\tb\tc\td\n1.0\ta\tb\n1.0\ta\tb\t\td\n")
    store = prepare("retrieval", tmp_path / "good")
    assert len(store.split("train")) == 12
    assert store.meta["skipped"]["names"] == ["new_aan_pairs.train.tsv: 3 wrong lines"]
    train.unlink()
    with pytest.raises(UserError, match=r"has no train examples of retrieval: it needs new_aan_pairs\.train\.tsv"):
        prepare("retrieval", tmp_path / "good")
    with pytest.raises(UserError, match=r"retrieval needs data: unpack https://.*lra_release\.gz"):
        prepare("retrieval")
    (tmp_path / "lra_release.gz").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"rename it lra_release\.tar\.gz"):
        prepare("retrieval", tmp_path / "lra_release.gz")


# Image


def test_pictures_in_class_folders(prepare: Prepare, tmp_path: Path) -> None:
    wanted = pictures(tmp_path / "mine")
    store = prepare("image", tmp_path / "mine")
    assert (store.modality, store.vocab_size, store.max_length) == ("image", 257, 1024)
    assert store.classes == ("ant", "bee", "cow")
    assert [store.meta["splits"][split]["per_class"] for split in SPLITS] == [[9] * 3, [1] * 3, [4] * 3]
    seen = {}
    for split in SPLITS:
        examples = store.split(split)
        assert examples.names is not None
        for (pixels, label), name in zip(shown(store, split), examples.names, strict=True):
            seen[name] = (pixels, store.classes[label])
    assert seen == wanted
    raw = store.split("train").raw(0)[0]
    assert (raw.min() >= 1, raw.max() <= 256, raw.dtype) == (True, True, np.uint16)
    small = prepare("image", tmp_path / "mine", length=64)
    assert show(small, small.split("train").raw(0)).shape == (8, 8)
    archive = prepare("image", packed(tmp_path / "mine", tmp_path / "mine.tar.gz"))
    assert [shown(archive, split) for split in SPLITS] == [shown(store, split) for split in SPLITS]


def test_broken_pictures_are_named_and_counted(
    prepare: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures(tmp_path / "mine")
    broken = tmp_path / "mine" / "train" / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:300])
    (tmp_path / "mine" / "test" / "cow" / "note.txt").write_text("no picture")
    with caplog.at_level(logging.WARNING):
        store = prepare("image", tmp_path / "mine")
    assert store.meta["skipped"]["count"] == 2
    assert [name.split(":")[0] for name in store.meta["skipped"]["names"]] == ["test/cow/note.txt", "train/bee/3.png"]
    assert "skipped 2 files" in caplog.text
    assert store.meta["source"]["examples"] == 41


# Pathfinder and Path-X


@pytest.mark.parametrize(("task", "side", "counts"), [("pathfinder", 32, (40, 10, 12)), ("pathx", 128, (6, 2, 3))])
def test_pathfinder_is_generated(task: str, side: int, counts: tuple[int, ...], prepare: Prepare) -> None:
    asked = dict(zip(("train_examples", "validation_examples", "test_examples"), counts, strict=True))
    store = prepare(task, **asked)
    assert (store.modality, store.classes, store.max_length) == ("image", ("apart", "joined"), side * side)
    assert tuple(len(store.split(split)) for split in SPLITS) == counts
    assert show(store, store.split("train").raw(0)).shape == (side, side)
    assert set(store.split("train").labels.tolist()) == {0, 1}
    assert independent(store)
    fewer = prepare(task, **{**asked, "train_examples": 3})
    assert shown(fewer, "train") == shown(store, "train")[:3]
    assert shown(fewer, "test") == shown(store, "test")


@pytest.mark.parametrize("given_as", ["lra_release", "pathfinder32", "curv_contour_length_14", "archive"])
def test_official_pathfinder(given_as: str, prepare: Prepare, tmp_path: Path) -> None:
    root = tmp_path / "lra_release"
    inner = root / "pathfinder32" / "curv_contour_length_14"
    wanted = official_pathfinder(inner)
    official_pathfinder(root / "pathfinder32" / "curv_baseline", 1, 3)  # easier
    official_pathfinder(root / "pathfinder64" / "curv_contour_length_14", 1, 3)  # larger
    data = {"lra_release": root, "pathfinder32": inner.parent, "curv_contour_length_14": inner}.get(given_as)
    store = prepare("pathfinder", data or packed(root, tmp_path / "lra_release.tar.gz"))
    seen = {}
    for split in SPLITS:
        names = store.split(split).names
        assert names is not None
        seen |= {name[name.index("imgs/") :]: row for name, row in zip(names, shown(store, split), strict=True)}
    assert seen == wanted
    assert [len(store.split(split)) for split in SPLITS] == [80, 10, 10]
    assert store.meta["division"] == "hash"
    ones = sum(label for _, label in wanted.values()) / 100
    for split in SPLITS:
        assert abs(store.split(split).labels.mean() - ones) <= 0.1


def test_damaged_official_pathfinder(prepare: Prepare, tmp_path: Path) -> None:
    official_pathfinder(tmp_path / "data")
    (tmp_path / "data" / "imgs" / "0" / "sample_17.png").write_bytes(b"")  # as one in the release is
    (tmp_path / "data" / "imgs" / "1" / "sample_2.png").unlink()
    Image.new("L", (32, 32)).save(tmp_path / "data" / "imgs" / "1" / "unknown.png")
    store = prepare("pathfinder", tmp_path / "data")
    assert store.meta["source"]["examples"] == 98
    assert store.meta["skipped"]["names"][0].startswith("imgs/0/sample_17.png: ")
    assert store.meta["skipped"]["names"][1:] == ["1 pictures of the metadata are missing, such as imgs/1/sample_2.png"]
    (tmp_path / "data" / "metadata" / "0.npy").write_bytes(b"\x93NUMPY\1\0v\0{'descr': '<i8'}\n")
    with pytest.raises(UserError, match=r"metadata/0\.npy line 1 is not metadata: it needs folder, file, number, 0 or"):
        prepare("pathfinder", tmp_path / "data")


# Mistakes


def _nothing(root: Path) -> Path:
    (root / "other").mkdir()
    (root / "other" / "notes.txt").write_text("nothing of the kind")
    return root / "other"


def _without(part: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        reviews(root / "aclImdb", 4, 3)
        for file in (root / "aclImdb" / part).rglob("*"):
            if file.is_file():
                file.unlink()
        return root / "aclImdb"

    return make


def _empty_files(root: Path) -> Path:
    reviews(root / "aclImdb", 4, 3)
    for file in (root / "aclImdb").rglob("*.txt"):
        file.write_bytes(b"")
    (root / "aclImdb" / "test" / "neg" / "0_7.txt").write_bytes(b"")
    return root / "aclImdb"


MISTAKES: dict[str, tuple[str, Callable[[Path], Any], dict[str, Any], str]] = {
    "unknown task": ("pathfinders", lambda root: None, {}, 'no task "pathfinders".*did you mean "pathfinder"'),
    "nothing there": ("text", lambda root: root / "none", {}, "is not there: give .*train/neg.* the named set imdb"),
    "the set of another": ("text", lambda root: "cifar10", {}, '"cifar10" is not there'),
    "a folder of something else": ("text", _nothing, {}, "has nothing for text, it needs train/neg, train/pos"),
    "pictures of something else": ("image", _nothing, {}, "has nothing for image, it needs train/CLASS"),
    "a file of something else": ("image", lambda root: _nothing(root) / "notes.txt", {}, "has nothing for image"),
    "no test split": ("text", _without("test"), {}, "has no test examples of text: it needs train/neg"),
    "no training split": ("text", _without("train"), {}, "has no|there are 0 to train on"),
    "a class without examples": ("text", _without("train/pos"), {}, "no train example of the class pos: each class"),
    "a test class without examples": ("text", _without("test/neg"), {}, "no test example of the class neg"),
    "empty files": ("text", _empty_files, {}, "is empty: there is nothing to read"),
    "more than there are": (
        "text", lambda root: reviews(root / "aclImdb"), {"train_examples": 73},
        "train_examples is 73, but .* has 72 for train: give at most that",
    ),
    "more validation than training": (
        "text", lambda root: reviews(root / "aclImdb"), {"validation_examples": 80},
        "validation_examples is 80, but there are 80 to train on: give fewer",
    ),
    "no square": ("image", lambda root: None, {"length": 999}, "length is 999: pictures are square, give 961 or 1024"),
    "no square to generate": ("pathfinder", lambda root: None, {"length": 99}, "length is 99: .* give 81 or 100"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_a_line(mistake: str, prepare: Prepare, tmp_path: Path) -> None:
    task, make, changes, message = MISTAKES[mistake]
    data = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        prepare(task, data, **changes)
    assert "\n" not in str(caught.value)


def test_a_split_may_be_called_val(prepare: Prepare, tmp_path: Path) -> None:
    pictures(tmp_path / "mine")
    (tmp_path / "mine" / "test").rename(tmp_path / "mine" / "val")
    wanted = pictures(tmp_path / "other", 10, 4)
    for file in (tmp_path / "other" / "test").rglob("*.png"):
        content = Image.open(io.BytesIO(file.read_bytes())).transpose(Image.Transpose.ROTATE_90)
        target = tmp_path / "mine" / file.relative_to(tmp_path / "other")
        target.parent.mkdir(parents=True, exist_ok=True)
        content.save(target)
    store = prepare("image", tmp_path / "mine")
    assert store.meta["division"] == "given"
    assert [len(store.split(split)) for split in SPLITS] == [30, 12, 12]
    own = {pixels for name, (pixels, _) in wanted.items() if name.startswith("test/")}
    assert {pixels for pixels, _ in shown(store, "validation")} == own


def test_words_are_numbered_as_documented(prepare: Prepare) -> None:
    """Id 0 is padding, then the ten digits, the operators and the closing bracket."""
    store = prepare("listops", length=40, train_examples=30, validation_examples=1, test_examples=1)
    ids = {int(value) for index in range(30) for value in store.split("train").raw(index)[0]}
    assert ids <= set(range(1, 16))
    assert WORDS[:15] == (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
    assert store.split("train").raw(0)[0].dtype == np.uint8


def test_the_table_is_light() -> None:
    """The command line shows the tasks without waiting for torch."""
    package = Path(sys.modules["waveletgpt"].__file__ or "").parent
    # The package itself may register its models on import; `waveletgpt --help` doesn't, and neither does this.
    stub = f"import types, sys; m = types.ModuleType('waveletgpt'); m.__path__ = [{str(package)!r}]; "
    code = (
        "sys.modules['waveletgpt'] = m; from waveletgpt.classify.long_range_arena import TASKS; "
        "assert len(TASKS) == 6; heavy = {'torch', 'PIL', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", stub + code], check=True)
