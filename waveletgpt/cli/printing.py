"""What the commands print: lines, tables, results in a sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from waveletgpt.training import processes


def say(text: str) -> None:
    """Print a line; of several processes the first does."""
    if processes.first():
        print(text, flush=True)


def by_source(found: Any) -> str:
    """The loss on each source of a mixture, in words; nothing of data that is none."""
    sources = found.get("sources") or {}
    return "".join(f"; {name}: {value['nll']:.4f}" for name, value in sources.items())


def print_summary(summary: dict[str, Any]) -> None:
    """The table of arms, and the result in a sentence."""
    from waveletgpt.report import in_words

    if not processes.first():
        return
    header, rows, sentence = in_words(summary)
    print_table(header, rows)
    say(sentence)
    if summary["at_once"] > 1:
        say(f"Up to {summary['at_once']} runs at once shared the machine: time speed-ups mean little.")


def print_ladder(ladder: dict[str, Any], out: Path) -> None:
    """The table of rungs, what to keep in mind, the result in a sentence, and where the report is."""
    from waveletgpt.report.ladder import headline, ladder_table

    print_table(*ladder_table(ladder))
    for note in ladder["notes"]:
        say(f"note: {note}")
    say(headline(ladder))
    say(f"report: {out / 'report.html'}")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
