"""Run folders -> summary.json, curves.csv and report.html, and what they say in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from waveletgpt.classify.scores import CLASSIFICATION, score_headline, score_table, write_scores
from waveletgpt.report.page import write_report
from waveletgpt.report.summary import write_summary
from waveletgpt.report.wording import headline, summary_table
from waveletgpt.runs.folder import RunFolder

__all__ = ["in_words", "write_report", "write_results"]


def write_results(out: Path, runs: Sequence[RunFolder], baseline: str | None) -> dict[str, Any]:
    """Write summary.json, curves.csv and report.html into `out`, of language models or of classifiers.

    Returns the summary. Raises UserError if there is no run, or the runs cannot be compared.
    """
    if _classified(run.info for run in runs):
        from waveletgpt.classify.page import write_score_report

        summary = write_scores(out, runs, baseline)
        write_score_report(out, runs, baseline)
    else:
        summary = write_summary(out, runs, baseline)
        write_report(out, runs, baseline)
    return summary


def in_words(summary: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Header and rows of the table of arms, and the result in a sentence."""
    if _classified([summary]):
        return *score_table(summary), score_headline(summary)
    return *summary_table(summary), headline(summary)


def _classified(infos: Iterable[dict[str, Any]]) -> bool:
    return any(info.get("task") == CLASSIFICATION for info in infos)
