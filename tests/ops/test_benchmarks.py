"""The figures that the benchmarks make of times, and that they refuse to print without parity."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measuring

ROOT = Path(__file__).parents[2]


def test_slope_is_the_power() -> None:
    sizes = [256, 512, 1024, 4096]
    assert measuring.slope(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert measuring.slope(sizes, [7.0] * 4) == pytest.approx(0)
    assert math.isnan(measuring.slope([256], [1.0]))


def test_ratio_is_of_rounds() -> None:
    """A machine that gets three times slower changes nothing; medians of times would."""
    base = [1.0, 1.0, 3.0, 3.0, 3.0]
    assert measuring.ratio([2 * t for t in base], base) == 2
    assert measuring.ratio([2.0, 50.0, 6.0, 6.0, 6.0], base) == 2


def test_quartiles() -> None:
    assert measuring.quartiles([5, 1, 4, 2, 3]) == (2, 4)
    assert measuring.quartiles([7]) == (7, 7)


def test_in_turn_gives_each_its_turn() -> None:
    order: list[str] = []
    ways = {name: (lambda name=name: order.append(name)) for name in "abc"}

    def measure(run: measuring.Run) -> tuple[float, None]:
        run()
        return float(len(order)), None

    times = measuring.in_turn(ways, measure, seconds=0)
    assert (order, times) == (["a", "b", "c"], {"a": [1.0], "b": [2.0], "c": [3.0]})
    order.clear()
    times = measuring.in_turn(ways, measure, seconds=0.05)
    assert "".join(order).startswith("abcbcacab")
    assert len({len(values) for values in times.values()}) == 1


def test_no_speed_without_parity() -> None:
    want = torch.tensor([1.0, -100.0])
    measuring.demand_parity("fine", want + 0.9, want, 1e-2)
    for wrong in (want + 1.1, want * math.nan):
        with pytest.raises(SystemExit, match="wrong is off by"):
            measuring.demand_parity("wrong", wrong, want, 1e-2)


def test_results_make_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measuring.Report("speed", tmp_path / "new", device="cpu")
    report.table("one", ["way", "time"], [["a", 1.23456], ["b", 2]], "Limit: 3.")
    printed = capsys.readouterr().out
    lines = ["**one**", "", "| way | time |", "| --- | --- |", "| a | 1.23 |", "| b | 2 |", "", "Limit: 3."]
    assert "\n".join(lines) in printed
    content = json.loads((tmp_path / "new" / "speed.json").read_text())
    assert content["tables"][0]["rows"] == [["a", 1.23456], ["b", 2]]
    assert content["environment"]["torch"] == torch.__version__
    page = measuring.page(tmp_path / "new")
    assert page.startswith("## speed")
    assert "\n".join(lines) in page


def test_the_gpu_script_is_tried_without_one(tmp_path: Path) -> None:
    script = [sys.executable, "benchmarks/operator_gpu.py", "--device", "cpu", "--tiny", "--seconds", "0"]
    where = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    run = subprocess.run([*script, "--out", str(tmp_path)], capture_output=True, text=True, **where)
    assert run.returncode == 0, run.stderr
    tables = json.loads((tmp_path / "operator_gpu.json").read_text())["tables"]
    titles = [table["title"].split(",")[0] for table in tables]
    assert titles == ["parity holds", "means", "packed documents of 200 tokens", "learned kernels"]
    assert "off by" not in run.stderr
