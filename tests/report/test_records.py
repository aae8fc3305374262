"""The types of run.json and summary.json name what runs write: no key more, none less."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import pytest

from tests.helpers import make_store, tiny_recipe
from waveletgpt.classify.examples import ExampleWriter, prepare_once
from waveletgpt.classify.settings import ClassifierRecipe
from waveletgpt.report.records import LossArm, LossSummary, ScoreArm, ScoreSummary
from waveletgpt.runs.folder import find_runs
from waveletgpt.runs.records import RunRecord
from waveletgpt.training.compare import compare

RUNS = Path(__file__).parents[1] / "runs" / "version-0.1"


def parts_of(kind: Any, arm: Any) -> tuple[Any, bool]:
    """(the TypedDict in a type, whether it stands in a list or a dict); (None, False) where there is none."""
    kind = arm if getattr(kind, "__name__", "") == "Arm" else kind
    if is_typeddict(kind):
        return kind, False
    for inner in get_args(kind):
        found, _ = parts_of(inner, arm)
        if found:
            return found, get_origin(kind) in (list, dict)
    return None, False


def declared(kind: Any, arm: Any, place: str = "") -> Iterator[str]:
    """The dotted names of all keys of a TypedDict; "*" for each of several."""
    for key, hint in get_type_hints(kind).items():
        yield place + key
        inner, several = parts_of(hint, arm)
        if inner:
            yield from declared(inner, arm, f"{place}{key}.{'*.' if several else ''}")


def written(kind: Any, arm: Any, value: dict[str, Any], place: str = "") -> Iterator[str]:
    """The dotted names of the keys of `value`; what is below a key without a type of its own is not looked at."""
    hints = get_type_hints(kind)
    for key, found in value.items():
        yield place + key
        inner, several = parts_of(hints.get(key), arm)
        if inner and found is not None:
            each = (found.values() if isinstance(found, dict) else found) if several else [found]
            for one in each:
                yield from written(inner, arm, one, f"{place}{key}.{'*.' if several else ''}")


def keys_in(folder: Path, summary: Any, arm: Any) -> tuple[set[str], set[str]]:
    """The keys of all run.json and of summary.json."""
    runs = [json.loads((run.path / "run.json").read_text()) for run in find_runs(folder)]
    assert len(runs) == 2
    found = json.loads((folder / "summary.json").read_text())
    return {key for run in runs for key in written(RunRecord, None, run)}, set(written(summary, arm, found))


ONLY_SOME = {
    "error",  # of a run that failed
    "data.mixture",
    "result.breakdown.sources",
    "result.breakdown.sources.*.nll",
    "result.breakdown.sources.*.windows",
    "model.model_type",  # of a model of transformers
    "model.identity",
}
ONLY_CLASSIFIERS = {"data.classes", "data.multi_label", "data.max_length", "data.splits.*.examples"}
ONLY_LANGUAGE_MODELS = {"data.vocab_size", "data.bytes_per_token"}
ONLY_LANGUAGE_MODELS |= {f"data.splits.*.{key}" for key in ("documents", "tokens", "bytes")}


def test_language_models_write_the_typed_keys(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    recipe = tiny_recipe(max_steps=2, eval_every=2, save_every=2, samples=0)
    compare(recipe, store, tmp_path / "out", data="words.txt", arms=["none", "fixed"])
    run, summary = keys_in(tmp_path / "out", LossSummary, LossArm)
    typed = {key for key in declared(RunRecord, None) if not key.startswith(("result.validation", "result.test"))}
    assert run == typed - ONLY_SOME - ONLY_CLASSIFIERS
    # What a summary takes over from run.json is tested there; a sweep has a file of its own.
    assert own(summary) == own(set(declared(LossSummary, LossArm))) - {"sweep"}


def own(keys: set[str]) -> set[str]:
    return {key for key in keys if not key.startswith(("data.", "environment.")) and "breakdown." not in key}


@pytest.mark.parametrize("several", [False, True], ids=["one class", "several classes"])
def test_classifiers_write_the_typed_keys(tmp_path: Path, several: bool) -> None:
    def fill(writer: ExampleWriter) -> None:
        writer.begin(kind="tokens", modality="text", classes=["a", "b"], vocab_size=257, multi_label=several)
        for split in ("train", "validation", "test"):
            for i in range(12):
                writer.append(split, np.array([60 + i, 70, 80], np.uint16), [i % 2] if several else i % 2)
        writer.finish(source={"name": "letters"})

    changes = {"max_steps": 2, "eval_every": 2, "save_every": 2, "batch_size": 4, "device": "cpu", "threads": 1}
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2}
    recipe = ClassifierRecipe().override({**changes, **sizes}, "test")
    store = prepare_once("letters", {"name": "letters"}, tmp_path / "cache", fill)
    compare(recipe, store, tmp_path / "out", data="letters", arms=["none", "fixed"])
    run, summary = keys_in(tmp_path / "out", ScoreSummary, ScoreArm)
    only = {"result.bits_per_byte"} | ONLY_LANGUAGE_MODELS | ONLY_SOME
    scores = {"accuracy", "majority_class"} if several else {"map"}
    only |= {f"result.{split}.{score}" for split in ("validation", "test") for score in scores}
    typed = {key for key in declared(RunRecord, None) if not key.startswith("result.breakdown")}
    assert run == typed - only
    assert own(summary) == own(set(declared(ScoreSummary, ScoreArm)))


def test_earlier_versions_wrote_no_other_keys() -> None:
    runs = [json.loads((run.path / "run.json").read_text()) for run in find_runs(RUNS)]
    found = {key for run in runs for key in written(RunRecord, None, run)}
    assert found <= set(declared(RunRecord, None))
    assert len(found) > 40
