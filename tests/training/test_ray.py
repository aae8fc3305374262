"""A comparison as tasks of Ray, started on this machine: the same weights, though a worker is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.helpers import make_store, tiny_recipe
from waveletgpt.errors import UserError
from waveletgpt.runs.folder import RunFolder
from waveletgpt.training import ray_engine
from waveletgpt.training.compare import compare
from waveletgpt.training.trainer import train
from waveletgpt.training.workers import Job, Outcome

ray = pytest.importorskip("ray")
LENGTH = {"max_steps": 400, "save_every": 50, "eval_every": 200}
ATTEMPT = ray_engine._attempt


def dies_once(job: Job, argv: list[str]) -> Outcome:
    """A task whose process is killed in the middle of its first attempt."""

    def kill() -> None:
        while max((row["step"] for row in job.run.metrics()), default=0) < 60:
            time.sleep(0.002)
        (job.folder.parents[1] / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if not job.run.exists():
        threading.Thread(target=kill, daemon=True).start()
    return ATTEMPT(job, argv)


def test_tasks_of_ray_train_what_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "data")
    recipe = tiny_recipe(**LENGTH)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    # Ray's processes import `dies_once` from here, wherever this was started.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setattr(ray_engine, "_attempt", dies_once)
    monkeypatch.chdir(tmp_path)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        summary = compare(recipe, store, "out", data="words.txt", arms=["none"], engine="ray")
    finally:
        ray.shutdown()
    run = RunFolder(tmp_path / "out" / "none-seed0")
    assert (tmp_path / "killed").exists()
    assert run.finished
    assert summary["at_once"] == 1
    alone = train(tiny_recipe(**{**LENGTH, "mixing": "none"}), store, "alone", data="words.txt", show_progress=False)
    assert (alone.path / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()


def test_ray_decides_how_many_run(tmp_path: Path) -> None:
    store = make_store(tmp_path / "data", words=2000)
    with pytest.raises(UserError, match="leave `workers` out"):
        compare(tiny_recipe(), store, tmp_path / "out", data="words.txt", arms=["none"], engine="ray", workers=2)
    with pytest.raises(UserError, match='`engine`: no "rey"'):
        compare(tiny_recipe(), store, tmp_path / "out", data="words.txt", arms=["none"], engine="rey")
