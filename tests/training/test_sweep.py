"""Sweeps: every arm gets its own best, trials are not trained twice, and the report says where a grid ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import make_store, tiny_recipe, waveletgpt, write_text
from waveletgpt.errors import UserError
from waveletgpt.report.summary import sweep_folder
from waveletgpt.runs.folder import RunFolder, find_runs
from waveletgpt.training.compare import compare
from waveletgpt.training.sweep import choose, parse_grid, sweep, variants

GRID = {"lr": ["1e-5", "3e-3", "1e-2"]}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two arms and two seeds, each arm at its best of three rates."""
    folder = tmp_path_factory.mktemp("sweep")
    store, recipe = make_store(folder), tiny_recipe()
    arms = sweep(recipe, store, folder / "out", data="words.txt", arms=["none", "fixed"], grid=GRID)
    compare(recipe, store, folder / "out", data="words.txt", arms=arms, seeds=2, resume=True)
    return folder / "out"


def test_each_arm_has_the_best_of_its_trials(out: Path) -> None:
    trials = {run.info["arm"]: run.info["result"]["final_nll"] for run in find_runs(sweep_folder(out))}
    assert len(trials) == 6
    chosen = list(json.loads((out / "summary.json").read_text())["arms"])
    for arm in chosen:
        rivals = {name: loss for name, loss in trials.items() if name.split(":")[0] == arm.split(":")[0]}
        assert trials[arm] == min(rivals.values())
    assert [arm.split(":")[0] for arm in chosen] == ["none", "fixed"]


def test_a_whole_trial_is_the_first_run(out: Path) -> None:
    runs = list(find_runs(out))
    assert {run.info["seed"] for run in runs} == {0, 1}
    for run in runs:
        trial = RunFolder(sweep_folder(out) / run.path.name)
        if run.info["seed"] == 0:
            assert (run.path / "model.safetensors").read_bytes() == (trial.path / "model.safetensors").read_bytes()
            assert run.info["environment"]["date"] == trial.info["environment"]["date"]
        else:
            assert not trial.exists()


def test_the_report_shows_what_was_tried(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "Settings tried" in page
    assert all(f"lr {value}" in page for value in GRID["lr"])
    sweep = json.loads((out / "summary.json").read_text())["sweep"]
    assert sweep["grid"] == GRID
    for arm, entry in sweep["arms"].items():
        at_the_edge = entry["best"]["lr"] in ("1e-5", "1e-2")
        assert (entry["edges"] == ["lr"]) is at_the_edge
        assert (f"{arm}</code>: its best lr" in page) is at_the_edge


def test_a_sweep_of_another_comparison_is_not_shown(out: Path, tmp_path: Path) -> None:
    """What lay in the folder before may have left its trials beside it."""
    shutil.copytree(sweep_folder(out), tmp_path / "again-sweep")
    compare(tiny_recipe(), make_store(tmp_path), tmp_path / "again", data="words.txt", arms=["none", "fixed"])
    assert "sweep" not in json.loads((tmp_path / "again" / "summary.json").read_text())
    assert "Settings tried" not in (tmp_path / "again" / "report.html").read_text()


def test_shortened_trials_are_no_runs(tmp_path: Path) -> None:
    store, recipe = make_store(tmp_path), tiny_recipe()
    grid = {"lr": ["1e-3", "3e-3"]}
    arms = sweep(recipe, store, tmp_path / "out", data="words.txt", arms=["none"], grid=grid, steps=3)
    assert not (tmp_path / "out").exists()
    trials = list(find_runs(sweep_folder(tmp_path / "out")))
    assert [run.info["recipe"]["max_steps"] for run in trials] == [3, 3]
    assert [run.info["recipe"]["training"]["samples"] for run in trials] == [0, 0]  # a comparison's have 1
    assert arms[0] in ("none:lr=1e-3", "none:lr=3e-3")


def test_a_recipe_file_is_an_arm_like_others(tmp_path: Path) -> None:
    """It is given as a path and called by its name."""
    (tmp_path / "mine.yaml").write_text("mixing: fixed\nmodel:\n  max_window: 2\n")
    arms, grid = ["none", str(tmp_path / "mine.yaml")], {"lr": ["1e-3", "3e-3"]}
    store, recipe = make_store(tmp_path), tiny_recipe()
    best = sweep(recipe, store, tmp_path / "out", data="words.txt", arms=arms, grid=grid, steps=3)
    summary = compare(recipe, store, tmp_path / "out", data="words.txt", arms=best)
    mine = [name for name in summary["arms"] if name.startswith("mine:lr=")]
    assert len(mine) == 1
    assert list(summary["sweep"]["arms"])[1] == mine[0]


@given(st.dictionaries(st.sampled_from([f"{k}e-3" for k in range(1, 9)]), st.floats(0.1, 9), min_size=2))
def test_the_choice_is_the_lowest_loss_and_tells_of_edges(losses: dict[str, float]) -> None:
    found = choose({(value,): loss for value, loss in losses.items()}, {"lr": list(losses)})
    value = found["best"]["lr"]
    assert losses[value] == min(losses.values())
    assert bool(found["edges"]) == (float(value) in (min(map(float, losses)), max(map(float, losses))))


def test_words_have_no_edges() -> None:
    losses = {("zero",): 2.0, ("partial",): 1.0}
    found = choose(losses, {"mix_edge": ["zero", "partial"]})  # type: ignore[arg-type]
    assert found["best"] == {"mix_edge": "partial"}
    assert found["edges"] == []


def test_the_folder_of_trials_of_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert sweep_folder(".") == sweep_folder(tmp_path / "out") == tmp_path / "out-sweep"


def test_a_report_leaves_out_what_a_wider_sweep_passed_over(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    run = next(run for run in find_runs(copy) if run.info["arm"].startswith("none"))
    shutil.copytree(run.path, copy / "before-seed0")
    RunFolder(copy / "before-seed0").update_info(arm="none:lr=7e-3")
    shutil.copytree(sweep_folder(out), sweep_folder(copy))
    before = json.loads((copy / "summary.json").read_text())
    done = waveletgpt("report", copy)
    assert done.returncode == 0, done.stderr
    assert "left out, as a sweep has chosen other settings since: none:lr=7e-3" in done.stdout + done.stderr
    assert json.loads((copy / "summary.json").read_text()) == before


def test_diverged_trials_are_never_chosen() -> None:
    assert choose({("1",): None, ("2",): 3.0, ("3",): float("nan")}, {"lr": ["1", "2", "3"]})["best"] == {"lr": "2"}
    with pytest.raises(UserError, match="diverged"):
        choose({("1",): None, ("2",): None}, {"lr": ["1", "2"]})


def test_settings_of_an_arm_stay_and_combine() -> None:
    grid = parse_grid(["lr=1e-3,2e-3", "weight_decay=0,0.1"])
    found = variants("fixed:max_window=4", grid)
    assert len(found) == 4
    assert found["2e-3", "0"] == "fixed:max_window=4,lr=2e-3,weight_decay=0"
    with pytest.raises(UserError, match="sets lr itself"):
        variants("fixed:lr=1e-3", grid)
    for name in ("weight-decay", "training.weight_decay"):
        with pytest.raises(UserError, match="sets weight_decay itself"):
            variants(f"none:{name}=0.5", grid)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "lr=1e-3"], "two or more values"),
        (["--sweep", "lr=1e-3,1e-3"], "given twice"),
        (["--sweep", "rate=1e-3,2e-3"], 'no setting "rate"'),
        (["--sweep", "lr=1e-3,high"], "lr"),
        (["--sweep-steps", "3"], "without --sweep"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path: Path, words: list[str], message: str) -> None:
    text = write_text(tmp_path / "words.txt", 2000)
    found = waveletgpt("compare", text, "--preset", "tiny", "--max-steps", "2", "--out", tmp_path / "out", *words)
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr
