"""Comparisons end to end on small generated data: the contract of summary.json, equal batches, going on."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import make_store, tiny_recipe
from waveletgpt.data import TokenStore
from waveletgpt.errors import UserError
from waveletgpt.model.mixer import delayed
from waveletgpt.model.mixing import MIXERS, Mixer
from waveletgpt.runs.evaluation import evaluate_run, print_samples
from waveletgpt.runs.folder import RunFolder, find_runs
from waveletgpt.training.compare import compare, parse_arms
from waveletgpt.training.recipe import Recipe
from waveletgpt.training.trainer import Diverged, Interrupted, Recorder

ARMS = ["none", "fixed", "learnable:max_window=8", "none:n_layer=1,lr=1e-3"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def out(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    compare(tiny_recipe(), store, out, data="words.txt", arms=ARMS, seeds=2)
    return out


def test_summary_keeps_the_contract(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == 1
    assert summary["baseline"] == "none"
    assert list(summary["arms"]) == ARMS
    assert {"data", "recipe", "environment"} <= set(summary)
    for name, arm in summary["arms"].items():
        assert {"parameters", "extra_parameters", "flops_per_token", "tokens_per_second", "seconds"} <= set(arm)
        assert len(arm["final_nll"]["per_seed"]) == 2
        assert arm["final_nll"]["mean"] == pytest.approx(sum(arm["final_nll"]["per_seed"]) / 2)
        assert arm["bits_per_byte"] > 0
        if name != "none":
            assert {"same_performance_step", "step_speedup", "time_speedup"} <= set(arm)
    arms = summary["arms"]
    assert arms["fixed"]["parameters"] == arms["none"]["parameters"]
    assert arms["fixed"]["extra_parameters"] == 0 < arms["learnable:max_window=8"]["extra_parameters"]
    assert arms["none:n_layer=1,lr=1e-3"]["parameters"] < arms["none"]["parameters"]


def test_one_run_folder_per_arm_and_seed(out: Path) -> None:
    runs = list(find_runs(out))
    assert sorted((run.info["arm"], run.info["seed"]) for run in runs) == sorted((a, s) for a in ARMS for s in (0, 1))
    assert all(run.finished for run in runs)
    assert (out / "report.html").stat().st_size > 10_000


def test_curves_hold_every_logged_point(out: Path) -> None:
    rows = list(csv.DictReader((out / "curves.csv").open()))
    runs = list(find_runs(out))
    assert sum(len(run.metrics()) for run in runs) == len(rows) > 0
    for run in runs:
        mine = [r for r in rows if (r["arm"], int(r["seed"])) == (run.info["arm"], run.info["seed"])]
        assert len(mine) == len(run.metrics())


def test_resume_writes_in_no_folder_of_other_things(store: TokenStore, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("mine")
    (tmp_path / "none-seed0").mkdir()
    with pytest.raises(UserError, match=r"holds no comparison to go on with, but summary\.json"):
        compare(tiny_recipe(), store, tmp_path, data="words.txt", arms=["none"], resume=True)
    assert (tmp_path / "summary.json").read_text() == "mine"
    (tmp_path / "summary.json").unlink()  # what is left is what a kill at the start, or in a sweep's copying, leaves
    (tmp_path / ".none_lr=4e-3-seed0.copy").mkdir()
    assert compare(tiny_recipe(), store, tmp_path, data="words.txt", arms=["none"], resume=True)["arms"]


def test_arms_are_measured_alike(store: TokenStore, tmp_path: Path) -> None:
    for arm in ("none:n_positions=8", "none:eval_windows=3"):
        with pytest.raises(UserError, match=f"`arms={arm}` cannot be compared with none: their evaluation windows"):
            compare(tiny_recipe(max_steps=1), store, tmp_path / "out", data="words.txt", arms=["none", arm])
    assert not list(find_runs(tmp_path / "out"))


def test_arms_of_other_lengths_and_batches_are_measured_alike(store: TokenStore, tmp_path: Path) -> None:
    recipe = tiny_recipe(eval_every=None, eval_windows=None, max_steps=8)
    arms = ["none", "none:max_steps=2", "fixed:batch_size=64"]
    compare(recipe, store, tmp_path / "out", data="words.txt", arms=arms)
    recorded = {run.info["recipe"]["training"]["eval_windows"] for run in find_runs(tmp_path / "out")}
    assert recorded == {recipe.eval_windows}


def test_a_comparison_of_before_goes_on_as_it_began(store: TokenStore, tmp_path: Path) -> None:
    """Earlier versions recorded `eval_every: null` for a 40th of the run, and 128 windows, where nothing was set."""
    recipe, out = tiny_recipe(eval_every=None, eval_windows=None, max_steps=12, save_every=6), tmp_path / "out"
    then = tiny_recipe(eval_every=1, eval_windows=128, max_steps=12, save_every=6)
    compare(then, store, out, data="words.txt", arms=["none", "fixed"])
    for run in list(find_runs(out)):
        info = json.loads((run.path / "run.json").read_text())
        info["recipe"]["training"]["eval_every"] = None
        (run.path / "run.json").write_text(json.dumps({**info, "status": "interrupted"}))
        shutil.rmtree(run.path / "checkpoint-12")
    before = {run.path.name: run.metrics() for run in find_runs(out)}
    compare(recipe, store, out, data="words.txt", arms=["none", "fixed", "ema"], resume=True)
    after = {run.path.name: run for run in find_runs(out)}
    assert len(after) == 3
    for name, run in after.items():
        assert run.finished
        evaluated = [row["step"] for row in run.metrics() if "nll" in row]
        assert evaluated == list(range(13))
        assert run.info["recipe"]["training"]["eval_windows"] == 128
        if name in before:
            rows = [row for row in run.metrics() if "nll" in row and row["step"] <= 6]
            assert rows == [row for row in before[name] if "nll" in row and row["step"] <= 6]


def test_data_may_be_called_otherwise(store: TokenStore, tmp_path: Path) -> None:
    recipe = tiny_recipe(max_steps=1)
    compare(recipe, store, tmp_path / "out", data="words", arms=["none"])
    summary = compare(recipe, store, tmp_path / "out", data="./words/", arms=["none", "fixed"], resume=True)
    assert list(summary["arms"]) == ["none", "fixed"]


def test_a_comparison_without_a_finished_run_has_failed(store: TokenStore, tmp_path: Path) -> None:
    recipe = tiny_recipe(lr=1e30, clip=1e30, schedule="constant", warmup_steps=0)
    with pytest.raises(Diverged, match="no run came to its end"):
        compare(recipe, store, tmp_path, data="words.txt", arms=["none", "fixed"])
    assert "failed" in (tmp_path / "report.html").read_text()


def test_identical_arms_have_identical_curves(store: TokenStore, tmp_path: Path) -> None:
    """Two arms that differ in nothing that computes: same batches in the same order, same start, same losses."""
    compare(tiny_recipe(), store, tmp_path / "out", data="words.txt", arms=["none", "none:keep_checkpoints=1"], seeds=1)
    first, second = ([(r["step"], r.get("loss"), r.get("nll")) for r in run.metrics()] for run in find_runs(tmp_path))
    assert first == second


def test_conv_starts_as_the_baseline(store: TokenStore, tmp_path: Path) -> None:
    recipe = tiny_recipe(max_steps=1)
    compare(recipe, store, tmp_path / "out", data="words.txt", arms=["none", "conv"], seeds=1)
    starts = [run.metrics()[0]["nll"] for run in find_runs(tmp_path)]
    assert starts[0] == pytest.approx(starts[1], abs=1e-6)


class Difference(Mixer):
    """g (x_t - x_{t-1}): a filter that the package does not know."""

    def __init__(self, config: Any, site: str = "block"):
        super().__init__(config, site)
        self.gain = torch.nn.Parameter(torch.ones(self.n_mixed))

    def reset_parameters(self, init: Any = torch.nn.init) -> None:
        init.ones_(self.gain)

    def mix(self, x: torch.Tensor, before: torch.Tensor | None, reach: torch.Tensor | None) -> torch.Tensor:
        return self.gain * (x - delayed(x, 1, before, reach))

    def flops(self) -> int:
        return 6 * self.n_mixed


def test_a_filter_from_outside_is_an_arm_like_the_others(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MIXERS, "difference", Difference)
    arms = ["none", "difference", "difference:mix_placement=key+mlp_output,mix_residual=true"]
    summary = compare(tiny_recipe(), store, tmp_path / "out", data="words.txt", arms=arms)
    found = summary["arms"]["difference"]
    assert found["extra_parameters"] > 0
    assert found["flops_per_token"] - summary["arms"]["none"]["flops_per_token"] == 6 * found["extra_parameters"]
    assert "difference" in (tmp_path / "out" / "report.html").read_text()
    for run in list(find_runs(tmp_path))[:2]:
        loss = evaluate_run(run.path, "validation", 4, 4, "cpu")["nll"]  # loads what was saved
        assert math.isfinite(loss)
        print_samples(run.path, None, tokens=5, samples=1, seed=0, device="cpu", temperature=0.0)
    assert capsys.readouterr().out.strip()


def test_an_arm_can_be_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "shifted-keys.yaml"
    recipe.write_text("mixing: shift\nmodel:\n  mix_placement: key\n  mix_fraction: 0.25\n")
    [arm] = parse_arms([f"{recipe}:lr=1e-3"], tiny_recipe())
    assert arm.name == "shifted-keys:lr=1e-3"
    assert (arm.recipe.mixing, arm.recipe.lr, arm.recipe.model.mix_fraction) == ("shift", 1e-3, 0.25)
    with pytest.raises(UserError, match="cannot read the recipe"):
        parse_arms([str(tmp_path / "none.yaml")], tiny_recipe())


@pytest.mark.parametrize(
    ("arms", "settings", "message"),
    [
        (["none", "fixed:mix_band=detail"], {}, "mix_band=detail has no effect on mixing fixed"),
        (["none:max_window=8"], {}, "max_window=8 has no effect on mixing none"),
        (["none", "ema:min-window=4"], {}, "min_window=4 has no effect on mixing ema"),
        (["none", "conv:model.mix_fraction=0.25"], {}, "mix_fraction=0.25 has no effect on mixing conv"),
        (["none", "fixed"], {"mix_start": "zero"}, "mix_start=zero has no effect on mixing none and fixed"),
    ],
)
def test_settings_that_nothing_reads_are_refused(arms: list[str], settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arms(arms, Recipe().override(settings, "test"))
    # What one arm reads may be set for all.
    assert len(parse_arms(["none", "fixed"], Recipe().override({"max_window": 8}, "test"))) == 2


def test_interrupted_comparison_goes_on(
    store: TokenStore, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Recorder.on_step_end

    def interrupt(self: Recorder, args, state, control, **kwargs) -> None:
        self.interrupted = self.interrupted or (self.trainer.recipe.mixing == "fixed" and state.global_step == 7)
        original(self, args, state, control, **kwargs)

    again = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", interrupt)
        with pytest.raises(Interrupted):
            compare(tiny_recipe(), store, again, data="words.txt", arms=ARMS, seeds=2)
    first = RunFolder(again / "none-seed0")
    before = (first.path / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="already holds a comparison; add `resume=True`"):
        compare(tiny_recipe(), store, again, data="words.txt", arms=ARMS, seeds=2)
    compare(tiny_recipe(), store, again, data="words.txt", arms=ARMS, seeds=2, resume=True)
    assert (first.path / "model.safetensors").stat().st_mtime_ns == before
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (out, again))
    for arm in ARMS:
        assert one["arms"][arm]["final_nll"] == two["arms"][arm]["final_nll"]


def test_a_diverging_arm_is_told_and_the_others_go_on(store: TokenStore, tmp_path: Path) -> None:
    bad = "none:lr=1e30,clip=1e30,warmup_steps=0"
    summary = compare(tiny_recipe(), store, tmp_path / "out", data="words.txt", arms=["none", bad, "fixed"], seeds=1)
    assert summary["arms"]["fixed"]["final_nll"]["mean"] > 0
    assert "lr" in json.dumps(summary["notes"])
    assert (tmp_path / "out" / "report.html").is_file()


def test_refuses_folders_with_other_files(store: TokenStore, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        compare(tiny_recipe(), store, tmp_path, data="words.txt", arms=["none"], seeds=1)
    with pytest.raises(UserError, match="`seeds` must be at least 1"):
        compare(tiny_recipe(), store, tmp_path / "x", data="words.txt", arms=["none"], seeds=0)
