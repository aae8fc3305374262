"""Ladders: models of the wanted sizes, runs of the wanted lengths, going on, and mistakes in a line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import make_store, tiny_recipe, waveletgpt, write_text
from waveletgpt import WaveletGPTConfig, WaveletGPTForCausalLM
from waveletgpt.data import TokenStore
from waveletgpt.errors import UserError
from waveletgpt.report.ladder import block_parameters, find_rungs, parse_rung, rung_name
from waveletgpt.report.ladder_page import write_ladder
from waveletgpt.runs.folder import RunFolder, find_runs
from waveletgpt.training.ladder import parse_count, plan, shape_of, train_ladder
from waveletgpt.training.recipe import Recipe
from waveletgpt.training.trainer import Interrupted, Recorder

# A step is 4 windows of 16 tokens.
# When it is evaluated follows from its length, as by default.
RECIPE = tiny_recipe(samples=0, eval_every=None, save_every=1000)
ARMS = ["none", "fixed:max_window=4"]
GRID = {"lr": ["1e-3", "1e-2"]}
LADDER = {"arms": ARMS, "sizes": ["60k", "20k"], "tokens": ["256", "640"]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def out(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 sizes x 2 numbers of tokens x 2 arms, each arm at its best of two rates."""
    out = tmp_path_factory.mktemp("ladder") / "out"
    train_ladder(RECIPE, store, out, data="words.txt", grid=GRID, **LADDER)
    return out


@given(st.floats(4, 9.5), st.sampled_from(["gpt2", "llama"]))
def test_shapes_have_the_size_and_grow_in_width_and_depth(log: float, architecture: str) -> None:
    size = round(10**log)
    shape, larger = shape_of(size, architecture), shape_of(10 * size, architecture)
    # Widths are multiples of 8 and more, and small models have few to choose from.
    assert abs(math.log(shape.parameters / size)) < math.log(1.36)
    if size > 1e5:
        assert abs(math.log(shape.parameters / size)) < math.log(1.18)
    assert shape.n_embd % shape.n_head == 0
    assert (shape.n_embd // shape.n_head) % 2 == 0
    assert shape.n_layer <= larger.n_layer
    assert shape.n_embd < larger.n_embd
    assert shape == shape_of(size, architecture)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("size", [20_000, 300_000, 5_000_000])
def test_a_size_is_what_the_blocks_of_the_model_have(size: int, architecture: str) -> None:
    """Matrices of the blocks, counted in the model itself."""
    shape = shape_of(size, architecture)
    config = WaveletGPTConfig(
        architecture=architecture, mixing="none", vocab_size=40, n_positions=16,
        n_layer=shape.n_layer, n_embd=shape.n_embd, n_head=shape.n_head,
    )  # fmt: skip
    with torch.device("meta"):
        blocks = WaveletGPTForCausalLM(config).model.blocks
    assert sum(p.numel() for p in blocks.parameters() if p.ndim == 2) == shape.parameters


def test_the_presets_lie_on_the_ladder() -> None:
    small, gpt2 = shape_of(1_180_000, "gpt2"), shape_of(85_000_000, "gpt2")
    assert (small.n_layer, small.n_embd, small.n_head) == (6, 128, 4)
    assert (gpt2.n_layer, gpt2.n_embd, gpt2.n_head) == (12, 768, 12)


def test_counts_are_read_and_named() -> None:
    assert [parse_count(text, "sizes") for text in ("1.2M", "300k", "1e6", "60000", "2B")] == [
        1_200_000, 300_000, 1_000_000, 60_000, 2_000_000_000]  # fmt: skip
    assert rung_name(300_000, 5_000_000) == "0.3M-5M"
    for size in (256, 20_000, 300_000, 1_234_567, 2_000_000_000):
        assert parse_rung(rung_name(size, 10 * size)) == (size, 10 * size)
    assert parse_rung("none-seed0") is None
    for text in ("1e400", "0", "-5", "many"):
        with pytest.raises(UserError, match="give a number such as 60k"):
            parse_count(text, "sizes")
    for size, which in ((100, "smallest"), (10**15, "largest")):
        with pytest.raises(UserError, match=f"the {which} model has"):
            shape_of(size, "gpt2")


def test_every_rung_is_a_run_of_its_own_with_its_size_and_tokens(out: Path) -> None:
    assert [folder.name for folder in find_rungs(out)] == ["20k-256", "20k-640", "60k-256", "60k-640"]
    for folder in find_rungs(out):
        size, tokens = parse_rung(folder.name) or (0, 0)
        runs = list(find_runs(folder))
        assert len(runs) == 2
        for run in runs:
            info = run.info
            assert info["result"]["tokens"] == tokens
            assert info["recipe"]["max_steps"] == tokens // 64
            # Norms and biases are in it too, and are many in so small a model.
            wanted = shape_of(size, "gpt2").parameters
            assert wanted < block_parameters(info) < 1.06 * wanted
            # Its learning rate came to its end: a tenth of the peak.
            last = [row["lr"] for row in run.metrics() if "lr" in row][-1]
            assert last < 0.35 * info["recipe"]["lr"]


def test_each_arm_has_its_best_rate_at_each_size(out: Path) -> None:
    ladder = json.loads((out / "ladder.json").read_text())
    assert [sweep["rung"] for sweep in ladder["sweeps"]] == ["20k-256", "60k-256"]
    for sweep in ladder["sweeps"]:
        chosen = [entry["best"]["lr"] for entry in sweep["arms"].values()]
        for entry in sweep["arms"].values():
            assert entry["best"] == min(entry["trials"], key=lambda trial: trial["loss"])["settings"]
        for rung in ladder["rungs"]:
            if rung["size"] == sweep["size"]:
                assert list(rung["arms"]) == ARMS
                assert [arm["settings"] for arm in rung["arms"].values()] == [f"lr={value}" for value in chosen]
    assert "is at the edge of the grid" in " ".join(ladder["notes"])


def test_a_rung_may_have_a_sweep_of_its_own(store: TokenStore, out: Path, tmp_path: Path) -> None:
    """A ladder that was swept at each size is swept at each rung, too."""
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    settings = {"data": "words.txt", "arms": ARMS, "sizes": ["20k"], "tokens": ["256", "640"], "grid": GRID}
    ladder = train_ladder(RECIPE, store, copy, sweep_every="rung", resume=True, **settings)
    assert [sweep["rung"] for sweep in ladder["sweeps"]] == ["20k-256", "20k-640", "60k-256"]
    rung, sweep = ladder["rungs"][1], ladder["sweeps"][1]
    assert rung["rung"] == sweep["rung"] == "20k-640"
    assert [arm["settings"] for arm in rung["arms"].values()] == [
        f"lr={entry['best']['lr']}" for entry in sweep["arms"].values()
    ]
    for arm, entry in zip(rung["arms"].values(), sweep["arms"].values(), strict=True):
        assert arm["final_nll"]["per_seed"] == [min(trial["loss"] for trial in entry["trials"])]
    with pytest.raises(UserError, match='`sweep_every`: no "rungs"; use one of size, rung'):
        train_ladder(RECIPE, store, copy, sweep_every="rungs", resume=True, **settings)
    # Without the flag, what was swept stays.
    again = train_ladder(RECIPE, store, copy, resume=True, **settings)
    assert again["rungs"][:2] == ladder["rungs"][:2]


def test_too_few_rungs_are_said_to_be_and_the_rest_is_told(out: Path) -> None:
    ladder = json.loads((out / "ladder.json").read_text())
    assert "4 rungs of 2 sizes and 2 numbers of tokens do not determine" in ladder["notes"][0]
    assert ladder["arms"]["none"]["law"] is None
    for rung in ladder["rungs"]:
        losses = {arm: entry["final_nll"]["per_seed"][0] for arm, entry in rung["arms"].items()}
        entry = rung["arms"][ARMS[1]]
        assert entry["gap"]["value"] == pytest.approx(losses["none"] - losses[ARMS[1]])
        assert entry["compute_multiplier"]["value"] is None
        assert entry["throughput_ratio"] > 0


def test_the_report_is_made_again_from_run_folders_alone(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    before = json.loads((copy / "ladder.json").read_text())
    lines = (copy / "ladder.csv").read_text()
    for name in ("ladder.json", "ladder.csv", "report.html"):
        (copy / name).unlink()
    for folder in find_rungs(copy):
        (folder / "summary.json").unlink()
    done = waveletgpt("report", copy)
    assert done.returncode == 0, done.stderr
    assert json.loads((copy / "ladder.json").read_text()) == before
    assert (copy / "ladder.csv").read_text() == lines
    assert lines.count("\n") == 1 + 8
    page = (copy / "report.html").read_text()
    assert "<script" not in page
    assert "20k-256" in done.stdout
    with pytest.raises(UserError, match='no arm "conv"'):
        write_ladder(copy, "conv")


def test_goes_on_where_it_was_stopped(
    store: TokenStore, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Recorder.on_step_end

    def interrupt(self: Recorder, args, state, control, **kwargs) -> None:
        where = self.trainer.run.path.parent.name
        self.interrupted = self.interrupted or (where == "20k-640" and state.global_step == 5)
        stopped(self, args, state, control, **kwargs)

    arms = [run.info["arm"] for run in find_runs(out / "20k-640") if run.info["arm"].startswith("none")]
    settings = {"data": "words.txt", "arms": arms, "sizes": ["20k"], "tokens": ["256", "640"]}
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", interrupt)
        with pytest.raises(Interrupted):
            train_ladder(RECIPE, store, tmp_path, **settings)
    with pytest.raises(UserError, match="already holds a ladder; add `resume=True`"):
        train_ladder(RECIPE, store, tmp_path, **settings)
    ladder = train_ladder(RECIPE, store, tmp_path, resume=True, **settings)
    whole = json.loads((out / "ladder.json").read_text())
    for again, once in zip(ladder["rungs"], whole["rungs"], strict=False):
        assert again["rung"] == once["rung"]
        assert again["arms"][arms[0]]["final_nll"] == once["arms"]["none"]["final_nll"]
    other = RECIPE.override({"weight_decay": 0.5}, "test")
    with pytest.raises(UserError, match=r"weight_decay is 0\.5, the run in"):
        train_ladder(other, store, tmp_path, resume=True, **settings)


def test_a_report_that_a_kill_left_behind_is_renewed(store: TokenStore, out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    whole = json.loads((copy / "20k-640" / "summary.json").read_text())
    cut = {**whole, "arms": {name: {**arm, "seeds": []} for name, arm in whole["arms"].items()}}
    (copy / "20k-640" / "summary.json").write_text(json.dumps(cut))
    train_ladder(RECIPE, store, copy, data="words.txt", grid=GRID, resume=True, **LADDER)
    again = json.loads((copy / "20k-640" / "summary.json").read_text())
    assert [arm["seeds"] for arm in again["arms"].values()] == [[0], [0]]


def test_grows_by_a_rung(store: TokenStore, out: Path, tmp_path: Path) -> None:
    """Finished runs are left alone, and the rates are those of the sweep that was made, though tokens are fewer now."""
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("run.json")}
    more = {"arms": ARMS, "sizes": ["20k"], "tokens": ["128", "256", "640"]}
    ladder = train_ladder(RECIPE, store, copy, data="words.txt", grid=GRID, resume=True, **more)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [rung["rung"] for rung in ladder["rungs"]] == ["20k-128", "20k-256", "20k-640", "60k-256", "60k-640"]
    assert [sweep["rung"] for sweep in ladder["sweeps"]] == ["20k-256", "60k-256"]
    for arm in ARMS:
        assert ladder["rungs"][0]["arms"][arm]["settings"] == ladder["rungs"][1]["arms"][arm]["settings"]
    # Three lengths of training make a law of tokens.
    assert set(ladder["arms"]["none"]["size_laws"]) == {"20k"}
    assert "Multipliers at 20k come from a law of tokens alone" in ladder["notes"][0]


def test_what_arms_and_recipes_may_not_set() -> None:
    settings = {"arms": ["none"], "sizes": ["20k"], "tokens": ["1k", "2k"]}
    for arm, message in {
        "none:n_layer=2": "sets n_layer, which a ladder takes",
        "none:max_steps=5": "sets max_steps",
        "none:batch_size=8": "steps of the same tokens",
        "nine": 'no "nine"',
    }.items():
        with pytest.raises(UserError, match=message):
            plan(tiny_recipe(), "nowhere", **{**settings, "arms": ["none", arm]})
    with pytest.raises(UserError, match="sets lr itself"):
        plan(tiny_recipe(), "nowhere", grid=GRID, **{**settings, "arms": ["none:lr=1e-3"]})
    with pytest.raises(UserError, match='no setting "rate"'):
        plan(tiny_recipe(), "nowhere", grid={"rate": ["1", "2"]}, **settings)
    # What a recipe has of it is for other commands.
    rungs = plan(Recipe().override({"n_inner": 5, "n_layer": 3, "max_steps": 7}, "x"), "nowhere", **{
        **settings, "tokens": ["5k", "10k"]})  # fmt: skip
    assert [rung.recipe.max_steps for rung in rungs] == [1, 2]
    assert all(rung.recipe.model.n_inner is None for rung in rungs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "1.2X"], "sizes 1.2X: give a number such as 60k, 1.2M or 1e6"),
        (["--tokens", "0"], "tokens 0: give a number"),
        (["--tokens", "1k", "10"], "tokens 10: one batch has 64 already"),
        (["--tokens", "1k", "200k"], "tokens 0.2M: the training data has"),
        (["--sizes", "20k", "--tokens", "1k"], "make one rung"),
        (["--sizes", "20k", "20000"], "given twice"),
        (["--sizes", "20k", "20.1k"], "give the same model"),
        (["--tokens", "1k", "1001"], "the same number of steps"),
        (["--sizes", "100"], "sizes 100: the smallest model has"),
        (["--sweep", "lr=1e-3"], "two or more values"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--out", "{taken}"], "no part of a ladder"),
    ],
)
def test_mistakes_are_told_in_a_line(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from waveletgpt import cli

    monkeypatch.setenv("WAVELETGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("mine")
    options = {"--sizes": ["20k", "60k"], "--tokens": ["1k", "2k"], "--out": [str(tmp_path / "out")]}
    options[words[0]] = [word.format(taken=tmp_path / "taken") for word in words[1:] if not word.startswith("--")]
    if "--tokens" in words[1:]:
        options |= {"--sizes": ["20k"], "--tokens": ["1k"]}
    text = write_text(tmp_path / "words.txt", 2000)
    line = ["ladder", str(text), "--modality", "chars", "--batch-size", "4", "--model.n-positions", "16"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*line, *(word for name, values in options.items() for word in (name, *values))])
    told = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len([one for one in told if one.startswith("waveletgpt: ")]) == 1
    assert message in told[-1]
    assert not (tmp_path / "out").exists()


def test_a_run_folder_is_no_ladder(out: Path) -> None:
    assert find_rungs(out / "20k-256") == []
    assert find_rungs(RunFolder(out / "nothing").path) == []
