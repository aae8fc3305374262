"""Run folders -> summary.json, curves.csv and report.html, and what they say in a terminal.

What is summarised and shown depends on what the runs learned. Each kind of learning is one line of `KINDS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waveletgpt.runs.folder import RunFolder

__all__ = ["KINDS", "Kind", "in_words", "write_results"]

Runs = Sequence[RunFolder]


@dataclass(frozen=True)
class Kind:
    """How runs of one task are reported."""

    write_summary: Callable[[Path, Runs, str | None], Any]
    """Writes summary.json and curves.csv into a folder, of runs and the baseline's arm; returns the summary."""
    write_report: Callable[[Path, Runs, str | None], Any]
    """Writes report.html likewise."""
    table: Callable[[Any], tuple[list[str], list[list[str]]]]
    """Summary -> header and rows of the table of arms."""
    headline: Callable[[Any], str]
    """Summary -> the result in a sentence."""


KINDS = {
    "language modeling": "waveletgpt.report.language_modeling",
    "classification": "waveletgpt.classify.reporting",
}
"""Task, as run.json names it -> the module whose `KIND` reports it; imported when there is such a run."""


def write_results(out: Path, runs: Runs, baseline: str | None) -> dict[str, Any]:
    """Write summary.json, curves.csv and report.html into `out`.

    Returns the summary. Raises UserError if there is no run, or the runs cannot be compared.
    """
    kind = _kind(run.info for run in runs)
    summary: dict[str, Any] = kind.write_summary(out, runs, baseline)
    kind.write_report(out, runs, baseline)
    return summary


def in_words(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Header and rows of the table of arms, and the result in a sentence."""
    kind = _kind([summary])
    return *kind.table(summary), kind.headline(summary)


def _kind(infos: Iterable[Mapping[str, Any]]) -> Kind:
    """That of the first run that names a task of its own; runs of older versions name none and are language models.

    Runs of several tasks have different data, which `Kind.write_summary` refuses.
    """
    names = [info.get("task") for info in infos]
    name = next((name for name in names if name in KINDS and name != "language modeling"), "language modeling")
    kind: Kind = importlib.import_module(KINDS[name]).KIND
    return kind
