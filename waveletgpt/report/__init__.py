"""Run folders -> summary.json, curves.csv and report.html, and the same results as text for a terminal.

Summary and report depend on the task of the runs. Each task is one line of `KINDS`.
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
    """(folder, runs, the baseline's arm) -> summary; writes summary.json and curves.csv into the folder."""
    write_report: Callable[[Path, Runs, str | None], Any]
    """Writes report.html, from the same arguments."""
    table: Callable[[Any], tuple[list[str], list[list[str]]]]
    """Summary -> header and rows of the table of arms."""
    headline: Callable[[Any], str]
    """Summary -> the result in a sentence."""


KINDS = {
    "language modeling": "waveletgpt.report.language_modeling",
    "classification": "waveletgpt.classify.reporting",
}
"""Task, as run.json names it -> the module whose `KIND` reports it; imported only if there is such a run."""


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
    """The kind of the first run with another task than language modeling, else language modeling.

    Runs of older versions name no task and are language models. Runs of several tasks have different data, which
    `Kind.write_summary` refuses.
    """
    names = [info.get("task") for info in infos]
    name = next((name for name in names if name in KINDS and name != "language modeling"), "language modeling")
    kind: Kind = importlib.import_module(KINDS[name]).KIND
    return kind
