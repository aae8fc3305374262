"""Made-up run folders for the tests of summary and report: known curves, no training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from waveletgpt.runs.folder import RunFolder


def make_run(
    path: Path,
    arm: str = "none",
    seed: int = 0,
    curve: list[tuple[int, float]] | None = None,
    *,
    seconds_per_step: float = 0.1,
    windows: list[int] | None = None,
    status: str = "finished",
    samples: list[dict[str, Any]] | None = None,
    fingerprint: str = "abc123",
    parameters: int = 1_213_440,
    extra_parameters: int = 0,
    max_steps: int = 1200,
    recipe: dict[str, Any] | None = None,
    **info: Any,
) -> RunFolder:
    """A run folder with the held-out `curve` [(step, loss), ...] and a training loss beside it."""
    curve = [(0, 3.3), (100, 2.0), (200, 1.5)] if curve is None else curve
    path.mkdir(parents=True, exist_ok=True)
    run = RunFolder(path)
    last, final = curve[-1] if curve else (0, math.nan)
    flops = 2 * parameters + (len(windows or []) * 6 * 6)
    run.write_info(
        {
            "status": status,
            "arm": arm,
            "seed": seed,
            "command": f"waveletgpt compare reviews.txt --arms none fixed --seeds 3 --max-steps {max_steps}",
            "recipe": {
                "data": "reviews.txt", "modality": "text8", "preset": "small", "mixing": arm.split(":")[0],
                "architecture": "gpt2", "max_steps": max_steps, "batch_size": 16, "lr": 2e-3, "seed": seed,
                "model": {"n_embd": 128, "n_layer": 6, "n_head": 4, "max_window": 256}, **(recipe or {}),
            },
            "data": {
                "name": "reviews.txt", "modality": "text8", "fingerprint": fingerprint, "vocab_size": 27,
                "bytes_per_token": {"train": 1.0, "validation": 1.0, "test": 1.0},
                "splits": {
                    "train": {"tokens": 9_000_000, "documents": 12000, "bytes": 9_000_000},
                    "validation": {"tokens": 500_000, "documents": 700, "bytes": 500_000},
                    "test": {"tokens": 500_000, "documents": 700, "bytes": 500_000},
                },
                "source": "/data/reviews.txt",
            },
            "model": {
                "parameters": parameters, "extra_parameters": extra_parameters, "flops_per_token": flops,
                "mixing_flops_per_token": len(windows or []) * 36, "windows": windows or [], "n_embd": 128,
                "n_layer": 6, "n_positions": 256,
            },
            "environment": {
                "python": "3.11.9", "torch": "2.11.0", "transformers": "5.17.0", "accelerate": "1.15.0",
                "numpy": "2.3", "waveletgpt": "0.1.0", "cpu": "AMD EPYC 7B13", "cores": 2, "threads": 2, "gpu": None,
                "git_revision": "0123abc", "date": "2026-01-01T12:00:00+00:00", "platform": "Linux",
            },
            "probe": list(range(27)) * 4,
            "result": {
                "final_nll": final, "bits_per_byte": final / math.log(2), "seconds": last * seconds_per_step,
                "tokens_per_second": 4096 / seconds_per_step, "steps": last, "tokens": last * 4096,
            },
            **info,
        }
    )  # fmt: skip
    for step, loss in curve:
        common = {"step": step, "tokens": step * 4096, "seconds": step * seconds_per_step}
        if step:
            run.append_metrics({**common, "loss": loss + 0.01, "lr": 1e-3, "grad_norm": 0.5})
        run.append_metrics({**common, "nll": loss})
    if samples is not None:
        (path / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    return run
