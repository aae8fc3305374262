"""Run folders of version 0.1, kept beside this file, still load, and are still reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers import waveletgpt
from waveletgpt import WaveletGPTForCausalLM
from waveletgpt.runs import find_runs
from waveletgpt.runs.evaluation import load_model

OLD = Path(__file__).parent / "version-0.1"
RUNS = list(find_runs(OLD))


def test_both_runs_are_found() -> None:
    assert sorted(run.info["arm"] for run in RUNS) == ["learnable:max_window=4", "none"]
    assert {run.info["environment"]["waveletgpt"] for run in RUNS} == {"0.1.0"}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.path.name)
def test_the_model_is_what_it_was(run) -> None:
    expected = torch.tensor(json.loads((run.path / "logits.json").read_text()))
    model, report = WaveletGPTForCausalLM.from_pretrained(run.path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for loaded in (model.eval(), load_model(run, "cpu")):
        with torch.no_grad():
            found = loaded(torch.arange(10)[None]).logits[0, -1]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_old_runs_are_reported(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "runs")
    found = waveletgpt("report", tmp_path / "runs")
    assert found.returncode == 0, found.stderr
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert summary["arms"]["learnable:max_window=4"]["final_nll"]["mean"] == pytest.approx(3.039, abs=1e-3)
    page = (tmp_path / "runs" / "report.html").read_text()
    assert "learnable:max_window=4" in page
    assert "Traceback" not in found.stderr


def test_old_runs_are_described() -> None:
    for run in RUNS:
        found = waveletgpt("info", run.path)
        assert found.returncode == 0, found.stderr
        assert f"{run.info['model']['parameters']:,}" in found.stdout
