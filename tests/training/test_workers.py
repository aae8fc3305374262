"""Runs side by side: the same results as one by one, whatever happens to the processes that compute them."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import make_store, tiny_recipe
from waveletgpt.cli.commands import Compare, Settings, plain
from waveletgpt.cli.main import parse
from waveletgpt.data import TokenStore
from waveletgpt.errors import UserError
from waveletgpt.report import in_words
from waveletgpt.runs.environment import command
from waveletgpt.runs.folder import RunFolder
from waveletgpt.training import workers
from waveletgpt.training.compare import compare, parse_arms, with_seeds
from waveletgpt.training.recipe import Recipe
from waveletgpt.training.trainer import Interrupted, train
from waveletgpt.training.workers import Job, Metrics, Worker, side_by_side, worker_count

ARMS = ["none", "fixed"]
LENGTH = {"max_steps": 400, "save_every": 50, "eval_every": 200}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data"))


def wait_for_steps(run: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while max((row["step"] for row in RunFolder(run).metrics()), default=0) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_side_by_side_is_one_by_one_bit_for_bit_whatever_happens(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A worker is killed, its run goes on in another one, Ctrl-C stops that, and this process brings it to its end."""
    recipe, out = tiny_recipe(**LENGTH), tmp_path / "out"
    events: list[str] = []
    give = Worker.give

    def give_and_kill(self: Worker, job: Job) -> None:
        give(self, job)
        if job.arm == "fixed" and not events:
            wait_for_steps(job.folder, 60)
            events.append("killed")
            self.kill()

    def press_ctrl_c(self: object, running: list[Job], waiting: int) -> None:
        if events == ["killed"] and [(job.arm, job.resume) for job in running] == [("fixed", True)]:
            wait_for_steps(out / "fixed-seed0", 70)
            events.append("pressed")
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "give", give_and_kill)
        patch.setattr(workers.Table, "show", press_ctrl_c)
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(Interrupted, match="saved 1 unfinished run in"):
            compare(recipe, store, out, data="words.txt", arms=ARMS, workers=2)
        assert signal.getsignal(signal.SIGINT) is before
    assert "fixed seed 0: its worker ended (SIGKILL); it goes on in a new one" in capfd.readouterr().err
    none, fixed = (RunFolder(out / f"{arm}-seed0") for arm in ARMS)
    assert (none.info["status"], fixed.info["status"]) == ("finished", "interrupted")
    assert fixed.checkpoints()[-1][0] >= 70
    assert none.info["command"] == command()

    summary = compare(recipe, store, out, data="words.txt", arms=ARMS, resume=True)
    assert summary["at_once"] == none.info["environment"]["at_once"] == fixed.info["environment"]["at_once"] == 2
    assert any("time speed-ups mean little" in note for note in summary["notes"])
    for run in (none, fixed):
        alone = train(
            tiny_recipe(**LENGTH, mixing=run.info["arm"]),
            store,
            tmp_path / "alone" / run.path.name,
            data="words.txt",
            show_progress=False,
        )
        assert (alone.path / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()
        assert alone.info["environment"]["at_once"] == 1


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def test_a_worker_that_keeps_dying_is_given_up(tmp_path: Path) -> None:
    job = Job(tiny_recipe(), Deadly(), tmp_path / "run", "words.txt", "none", False, 2)
    RunFolder(job.folder).write_info({"status": "running"})
    other = Job(tiny_recipe(), Deadly(), tmp_path / "other", "words.txt", "fixed", False, 2)
    ended = {job.arm: error for job, error in side_by_side([job, other], 2)}
    assert ended == dict.fromkeys(ARMS, "its worker died 3 times (exit code 3)")
    assert job.run.info["status"] == "failed"
    assert "died 3 times" in job.run.info["error"]


def test_the_others_are_reported_where_the_baseline_never_began(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_the_first(jobs: list[Job], count: int) -> workers.Ended:
        yield jobs[0], "its worker died 3 times (SIGKILL)"
        yield from workers.one_by_one(jobs[1:])

    monkeypatch.setattr("waveletgpt.training.compare.side_by_side", without_the_first)
    summary = compare(tiny_recipe(), store, tmp_path / "out", data="words.txt", arms=ARMS, workers=2)
    assert (summary["baseline"], list(summary["arms"])) == (None, ["fixed"])
    assert "`fixed` ended at" in " ".join(in_words(summary)[2:])


def test_how_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "gpus", lambda device: ["0", "1", "2"] if device == "auto" else [])
    assert worker_count("auto", "auto", 6) == 3
    assert worker_count("auto", "auto", 2) == 2
    assert worker_count("auto", "cpu", 6) == 1
    assert worker_count("4", "cpu", 6) == worker_count(4, "cpu", 6) == 4
    for wrong in ("0", "-1", "many", "1.5"):
        with pytest.raises(UserError, match="give a number from 1 on, or auto"):
            worker_count(wrong, "cpu", 6)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert worker_count("auto", "auto", 6) == 1
    with pytest.raises(UserError, match="without torchrun"):
        worker_count(2, "cpu", 6)


def test_metrics_are_read_as_they_grow(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file)
    metrics.read()
    assert metrics.last == {}
    file.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "nll"')
    metrics.read()
    assert metrics.last == {"step": 1, "loss": 3.0}
    file.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "nll": 2.5}\n')
    metrics.read()
    assert metrics.last == {"step": 2, "loss": 3.0, "nll": 2.5}
    file.write_text('{"step": 1, "loss": 3.0}\n')  # a resumed run drops what came after its checkpoint
    metrics.read()
    assert metrics.last == {"step": 1, "loss": 3.0}


def test_printed_commands_train_the_runs_of_the_comparison() -> None:
    recipe = tiny_recipe(
        compile=True, clip=0.5, transpose="-3,-2", mix_layers="0,1", include="*.md, *.txt", lr=3e-4, dropout=0.1, seed=5
    )
    settings = Settings(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)})
    arms = ["none", "fixed:max_window=8,lr=1e-2"]
    comparison = Compare(data=("my words.txt",), out="runs/mine", arms=tuple(arms), seeds=2, settings=settings)
    expected = with_seeds(parse_arms(arms, recipe), 2)
    lines = comparison.commands()
    assert len(lines) == len(expected) == 4
    for line, (arm, arm_recipe) in zip(lines, expected, strict=True):
        program, name, *words = shlex.split(line)
        assert (program, name) == ("waveletgpt", "train")
        parsed = parse(name, words)
        assert type(plain(parsed.settings)) is Recipe
        assert plain(parsed.settings) == arm_recipe
        assert (parsed.data, parsed.arm, parsed.resume) == (("my words.txt",), arm.name, True)
        assert parsed.out == f"runs/mine/{arm.folder(arm_recipe.seed)}"


def test_printed_runs_are_measured_alike() -> None:
    """As those of a comparison, also where their steps and batches differ and nothing says on how many windows."""
    arms = ("none", "fixed:max_steps=20", "fixed:batch_size=4")
    comparison = Compare(data=("words.txt",), arms=arms, settings=Settings(max_steps=400))
    recipes = [plain(parse("train", shlex.split(line)[2:]).settings) for line in comparison.commands()]
    assert len({(recipe.eval_windows, recipe.eval_every) for recipe in recipes}) == 1
