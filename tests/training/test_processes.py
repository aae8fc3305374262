"""Several processes are one run: they stop, go on and give up together, and one of them speaks."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.helpers import make_store, tiny_recipe
from tests.training.launch import launch, train_until
from waveletgpt.cli import main
from waveletgpt.cli.main import plain_errors
from waveletgpt.data import TokenStore
from waveletgpt.errors import UserError
from waveletgpt.runs.folder import RunFolder
from waveletgpt.training import processes
from waveletgpt.training.trainer import train


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data"))


def told(results: list[tuple[int, str, str]]) -> list[str]:
    """The lines of ours on standard error, of all processes."""
    return [line for _, _, errors in results for line in errors.splitlines() if line.startswith("waveletgpt:")]


def evaluations(run: Path) -> list[float]:
    return [loss for _, _, loss in RunFolder(run).curve()]


@pytest.fixture(scope="module")
def whole(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that nothing happens to."""
    out = tmp_path_factory.mktemp("whole")
    results = launch(out, train_until, tiny_recipe(), store, out / "run")
    assert [code for code, *_ in results] == [0, 0], results
    return out / "run"


def test_a_signal_to_one_process_stops_all_and_they_go_on_together(
    store: TokenStore, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    results = launch(tmp_path, train_until, tiny_recipe(), store, out, False, (1, 5, signal.SIGINT))
    assert [code for code, *_ in results] == [130, 130], results
    assert told(results) == [f"waveletgpt: saved {out} at step 5 of 12; go on with the same command and --resume"]
    assert RunFolder(out).info["status"] == "interrupted"
    results = launch(tmp_path, train_until, tiny_recipe(), store, out, True)
    assert [code for code, *_ in results] == [0, 0], results
    assert evaluations(out) == evaluations(whole)


def test_another_number_of_processes_goes_on_with_the_same_batches_or_not_at_all(
    store: TokenStore, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    results = launch(tmp_path, train_until, tiny_recipe(), store, out, False, (0, 5, signal.SIGTERM))
    assert [code for code, *_ in results] == [130, 130], results
    with pytest.raises(UserError, match=r"processes, 1: a step would have 4 .* it has 8; give `batch_size=8`"):
        train(tiny_recipe(), store, out, data="words.txt", resume=True, show_progress=False)
    with pytest.raises(UserError, match=r"it has 8; use 2 again"):
        train(tiny_recipe(accumulation=3), store, out, data="words.txt", resume=True, show_progress=False)
    recipe = tiny_recipe(batch_size=2, accumulation=4)
    train(recipe, store, out, data="words.txt", resume=True, show_progress=False)
    assert evaluations(out) == pytest.approx(evaluations(whole), abs=1e-5)
    assert RunFolder(out).metrics()[-1]["tokens"] == RunFolder(whole).metrics()[-1]["tokens"]


def test_a_process_that_dies_is_told_of(store: TokenStore, tmp_path: Path) -> None:
    results = launch(tmp_path, train_until, tiny_recipe(), store, tmp_path / "run", False, (1, 5, signal.SIGKILL))
    assert [code for code, *_ in results] == [1, -signal.SIGKILL], results
    ended = "another process of this run has ended; go on with the same command and --resume"
    assert told(results) == [f"waveletgpt: {ended}"]


WORDS = [
    *("--modality", "chars", "--preset", "tiny", "--max-steps", "2", "--batch-size", "2", "--device", "cpu"),
    *("--training.samples", "0", "--training.threads", "1", "--training.eval-windows", "4", "--arms", "none", "fixed"),
    *("--cache-dir", "cache", "--out", "out"),
]


def test_one_process_plans_writes_and_prints_a_comparison(store: TokenStore, tmp_path: Path) -> None:
    words = str(store.path.parents[2] / "words.txt")
    for attempt in range(2):  # on cold folders, where the slower process would find what the faster has begun
        folder = tmp_path / str(attempt)
        cache, out = folder / "cache", folder / "out"
        results = launch(folder, main, ["compare", words, *WORDS, "--cache-dir", str(cache), "--out", str(out)])
        assert [code for code, *_ in results] == [0, 0], results
        assert "report:" in results[0][1]
        assert not results[1][1]
        assert (out / "report.html").is_file()


def test_folders_that_are_not_shared_are_refused(store: TokenStore, tmp_path: Path) -> None:
    words = str(store.path.parents[2] / "words.txt")
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    results = launch(tmp_path, main, ["compare", words, *WORDS], timeout=30)
    assert [code for code, *_ in results] == [2, 2], results
    (line,) = told(results)
    assert line.startswith("waveletgpt: process 1 of 2: out on ")
    assert line.endswith("name a folder that all machines share")
    assert not (tmp_path / "0" / "out").exists()


def mistake_of(rank: int | None) -> None:
    with plain_errors(), processes.agreed():
        if rank in (None, processes.rank()):
            raise UserError(f"rank {processes.rank()} has no such file")


@pytest.mark.parametrize(
    ("rank", "line"),
    [(None, "rank 0 has no such file"), (0, "rank 0 has no such file"), (1, "process 1 of 2: rank 1 has no such file")],
)
def test_a_mistake_is_everybodys_and_told_once(rank: int | None, line: str, tmp_path: Path) -> None:
    results = launch(tmp_path, mistake_of, rank)
    assert [code for code, *_ in results] == [2, 2]
    assert told(results) == [f"waveletgpt: {line}"]


def test_options_that_are_wrong_are_told_once(tmp_path: Path) -> None:
    results = launch(tmp_path, main, ["compare", "words.txt", "--max-step", "3"])
    assert [code for code, *_ in results] == [2, 2]
    assert len(told(results)) == 1


def test_one_process_agrees_with_itself() -> None:
    assert processes.gather(3) == [3]
    assert processes.from_first(lambda: 4) == 4
    assert processes.any_of(True)
    assert not processes.any_of(False)
    with pytest.raises(UserError, match="mine"), processes.agreed():
        raise UserError("mine")
