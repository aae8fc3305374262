"""A run on a mixture: recorded, resumed exactly, and measured on each source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import WORDS, tiny_recipe, write_text
from waveletgpt.data import DataSettings, prepare
from waveletgpt.report import write_results
from waveletgpt.report.wording import sources_table
from waveletgpt.runs.evaluation import evaluate_run, load_store
from waveletgpt.runs.folder import RunFolder
from waveletgpt.training.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("mixture")
    write_text(folder / "words.txt", 3000)
    (folder / "same.txt").write_text(" ".join([WORDS[3]] * 3000))
    data = [f"{folder}/words.txt=0.75", f"{folder}/same.txt=0.25"]
    store = prepare(data, "chars", DataSettings(cache_dir=str(folder / "cache")), progress=False)
    recipe = tiny_recipe(samples=3, keep_checkpoints=9, cache_dir=str(folder / "cache"))
    return train(recipe, store, folder / "run", data=data, show_progress=False)


def test_it_is_recorded(run: RunFolder) -> None:
    info = run.info
    assert [Path(name).name for name in info["data"]["mixture"]] == ["words.txt", "same.txt"]
    assert [part["weight"] for part in info["data"]["mixture"].values()] == [0.75, 0.25]
    assert info["recipe"]["data"] == info["data"]["name"].split(" ")
    assert load_store(run).fingerprint == info["data"]["fingerprint"]
    prompts = [sample["prompt"] for sample in run.samples()]
    assert [set(prompt.split(" ")[1:-1]) == {WORDS[3]} for prompt in prompts] == [False, True, False]


def test_it_goes_on_exactly(run: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(run.path, folder)
    again = RunFolder(folder)
    for step, checkpoint in again.checkpoints():
        if step > 6:
            shutil.rmtree(checkpoint)
    again.update_info(status="interrupted")
    data = again.info["recipe"]["data"]
    recipe = tiny_recipe(samples=3, keep_checkpoints=9, cache_dir=run.info["recipe"]["source"]["cache_dir"])
    train(recipe, load_store(run), folder, data=data, resume=True, show_progress=False)
    assert again.curve()[-1][2] == run.curve()[-1][2]
    assert (folder / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()


def test_each_source_is_measured(run: RunFolder, tmp_path: Path) -> None:
    found = run.info["result"]["breakdown"]["sources"]
    words, same = (found[name]["nll"] for name in run.info["data"]["mixture"])
    assert same < words
    value = evaluate_run(run.path, batch_size=64)
    losses = [part["nll"] for part in value["sources"].values()]
    assert value["nll"] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1])
    summary = write_results(tmp_path, [run], None)
    header, rows = sources_table(summary)
    assert header[1].endswith("words.txt")
    assert rows == [["fixed", f"{words:.3f}", f"{same:.3f}"]]
    assert "Loss by source" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "summary.json").read_text())["data"]["mixture"]


def test_the_data_is_prepared_again_where_it_is_gone(run: RunFolder) -> None:
    (part, *_) = run.info["data"]["mixture"].values()
    shutil.rmtree(part["store"])
    assert load_store(run).fingerprint == run.info["data"]["fingerprint"]
