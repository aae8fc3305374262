"""Run folders -> summary.json (how much sooner each arm learned) and curves.csv. No torch, no plots.

An *arm* is one setting of the model, trained once per *seed*. The *baseline* is one of the arms.

    target                  the final validation loss of the baseline with the same seed
    same-performance step   the first step at which an arm's validation loss is at or below that target, linearly
                            interpolated between evaluations
    step speed-up           the baseline's steps / mean same-performance step over the seeds
    time speed-up           the same ratio in training seconds, at each run's mean seconds per step (without evaluation,
                            saving and sampling)

A mean over seeds exists only if every seed has the number. If a seed never reaches the target, the arm's mean and
speed-ups are null, because the mean of the other seeds would flatter the arm. With one seed the standard deviation is
unknown, so it is null, not 0.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waveletgpt.errors import UserError
from waveletgpt.report.reading import Record, interpolate, number, read_records, same_performance_step
from waveletgpt.report.records import Arm, ArmSummary, Difference, LossArm, LossSummary, SeedNumbers, Summary
from waveletgpt.report.wording import headline, markdown_table, summary_table
from waveletgpt.runs.folder import RunFolder, write_atomically, write_json
from waveletgpt.runs.records import Breakdown, RunRecord

__all__ = [
    "LOSS",
    "Measure",
    "Record",
    "assemble",
    "compared",
    "curves_csv",
    "headline",
    "markdown_table",
    "mean",
    "over_seeds",
    "read_records",
    "same_performance_step",
    "summarize",
    "summarize_records",
    "summary_table",
    "write_summary",
]  # fmt: skip

SCHEMA = 1


def summarize(runs: Iterable[RunFolder], baseline: str | None) -> LossSummary:
    """Numbers of all arms against the baseline: the content of summary.json.

    Only finished runs with a finite loss count and, with a baseline, only seeds that the baseline has too. `notes`
    says which runs were left out, and what else a reader should know.

    Args:
        runs: run folders in the order in which the arms are to appear.
        baseline: name of the arm to compare with, or None for numbers without a comparison.

    Raises:
        UserError: if there is no run, no arm is called `baseline`, or the runs cannot be compared.
    """
    return summarize_records(read_records(runs), baseline)


def summarize_records(records: Sequence[Record], baseline: str | None) -> LossSummary:
    """`summarize` for runs that have been read."""
    return {**assemble(records, baseline, _arm_numbers, _against, early=True)}


def assemble(
    records: Sequence[Record],
    baseline: str | None,
    numbers: Callable[[RunRecord, Sequence[Record]], Arm],
    against: Callable[[Sequence[Record], dict[int, Record]], Arm],
    *,
    early: bool,
) -> Summary[Arm]:
    """The summary of any task: selects the runs that count, and collects the numbers of each arm and the notes.

    Args:
        numbers: (run.json of an arm, its runs that count) -> the arm's entry.
        against: (those runs, seed -> the baseline's run) -> the part of the entry that compares them.
        early: whether to warn if the baseline had its final loss long before its end.
    """
    if not records:
        raise UserError("there is no run to summarize: name run folders, or a folder with runs")
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record.arm, []).append(record)
    notes: list[str] = []
    if baseline is not None and baseline not in arms:
        namesakes = [name for name in arms if name.startswith(f"{baseline} (")]
        if not namesakes:
            raise UserError(f"no run of the baseline arm {baseline!r}; the arms are {', '.join(arms)}")
        notes.append(f"Several different runs are called `{baseline}`; the baseline is `{namesakes[0]}`.")
        baseline = namesakes[0]
    base = {r.seed: r for r in arms[baseline] if r.usable} if baseline is not None else {}
    if baseline is not None and not base:
        notes.append(f"No run of the baseline `{baseline}` has finished, so nothing can be compared with it yet.")
    first = (arms[baseline] if baseline is not None else records)[0]
    summary: Summary[Arm] = {
        "schema": SCHEMA,
        "baseline": baseline,
        "steps": max((r.steps for r in base.values()), default=first.steps),
        "data": first.info.get("data") or {},
        "recipe": first.info.get("recipe") or {},
        "environment": first.info.get("environment") or {},
        "at_once": max(map(_at_once, records)),
        "arms": {},
    }
    for name, group in arms.items():
        notes += _left_out(name, group, base if name != baseline else {})
        counted = [r for r in group if r.usable and (not base or r.seed in base)]
        entry = numbers(group[0].info, counted)
        if baseline is not None and name != baseline:
            entry |= against(counted, base)
        summary["arms"][name] = entry
    summary["notes"] = notes + _warnings(arms, baseline, base if early else {}, len(base))
    return summary


def _arm_numbers(info: RunRecord, counted: Sequence[Record]) -> LossArm:
    model = info.get("model") or {}
    results = [r.info.get("result") or {} for r in counted]
    return {
        "parameters": model.get("parameters"),
        "extra_parameters": model.get("extra_parameters"),
        "flops_per_token": model.get("flops_per_token"),
        "mixing_flops_per_token": model.get("mixing_flops_per_token"),
        "tokens_per_second": mean([result.get("tokens_per_second") for result in results]),
        "seconds": mean([r.seconds for r in counted]),
        "steps": max((r.steps for r in counted), default=None),
        "seeds": [r.seed for r in counted],
        "final_nll": over_seeds([r.final_nll for r in counted]),
        "bits_per_byte": mean([_bits_per_byte(r) for r in counted]),
        "breakdown": _mean_breakdown([result.get("breakdown") for result in results]),
    }


def _mean_breakdown(found: Sequence[Breakdown | None]) -> Breakdown | None:
    """Mean over seeds of `runs.breakdown.break_down`; None if a run lacks it, as runs of earlier versions do."""
    if not found or any(entry is None for entry in found):
        return None
    parts = [entry for entry in found if entry is not None]
    first, near = parts[0], [entry["near_attention"] for entry in parts]
    breakdown: Breakdown = {
        "pairs": {
            kind: {**pair, "nll": mean([entry["pairs"][kind]["nll"] for entry in parts])}
            for kind, pair in first["pairs"].items()
        },
        "positions": [
            {**place, "nll": mean([entry["positions"][i]["nll"] for entry in parts])}
            for i, place in enumerate(first["positions"])
        ],
        "near_attention": None,
    }
    if all("sources" in entry for entry in parts):
        breakdown["sources"] = {
            name: {**source, "nll": mean([entry["sources"][name]["nll"] for entry in parts])}
            for name, source in first["sources"].items()
        }
    measured = [entry for entry in near if entry]
    if len(measured) == len(near):
        breakdown["near_attention"] = {
            **measured[0],
            "share": mean([entry["share"] for entry in measured]),
            "by_block": [mean(block) for block in zip(*(entry["by_block"] for entry in measured), strict=True)],
        }
    return breakdown


@dataclass(frozen=True)
class Measure:
    """The quantity by which arms are compared, as functions of a usable run.

    `curve`: (step, value) in order of step, lower is better. `target`: of a run of the baseline, the value that other
    arms have to reach. `final`: the value that is reported.
    """

    curve: Callable[[Record], Sequence[tuple[float, float]]]
    target: Callable[[Record], float]
    final: Callable[[Record], float]


LOSS = Measure(lambda r: r.losses, lambda r: r.losses[-1][1], lambda r: r.final_nll)


def compared(counted: Sequence[Record], base: dict[int, Record], measure: Measure) -> tuple[ArmSummary, Difference]:
    """Compare an arm's runs with the baseline's of the same seeds.

    Returns:
        The entries of `ArmSummary` for the comparison, and the difference in the final value.
    """
    reached = [same_performance_step(measure.curve(r), measure.target(base[r.seed])) if base else None for r in counted]
    mean_step = mean(reached)
    baseline_steps = mean([float(base[r.seed].steps) for r in counted if base])
    baseline_seconds = mean([base[r.seed].seconds for r in counted if base])
    own_seconds = mean(
        [
            None if step is None or not r.steps else r.seconds / r.steps * step
            for r, step in zip(counted, reached, strict=True)
        ]
    )
    differences = [measure.final(r) - measure.final(base[r.seed]) for r in counted if base]
    difference = over_seeds(differences)
    numbers: ArmSummary = {
        "same_performance_step": {
            "mean": mean_step,
            "per_seed": reached,
            "reached": sum(step is not None for step in reached),
        },
        "same_performance_seconds": own_seconds,
        "step_speedup": _ratio(baseline_steps, mean_step),
        "time_speedup": _ratio(baseline_seconds, own_seconds),
    }
    return numbers, {**difference, "ci95": _half_interval(difference["std"], len(differences))}


def _half_interval(std: float | None, n: int) -> float | None:
    """Half of the two-sided 95 % interval of a mean over n values by Student's t; None where one value has no `std`."""
    if std is None:
        return None
    from scipy.special import stdtrit  # not at the top: importing takes a moment, and most comparisons have one seed

    return float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)


def _against(counted: Sequence[Record], base: dict[int, Record]) -> LossArm:
    """The entries that compare an arm's loss with the baseline's of the same seeds."""
    numbers, difference = compared(counted, base, LOSS)
    return {**numbers, "final_nll_difference": difference, "gap": _gap(counted, base)}


GAP_AT = {"quarter": 0.25, "half": 0.5, "end": 1.0}
"""Shares of the baseline's steps at which `gap` is measured."""


def _gap(counted: Sequence[Record], base: dict[int, Record]) -> dict[str, float | None]:
    """The baseline's loss minus an arm's at the same step, in nats, at several times of training.

    Mean over the seeds that both have, linear between evaluations; None if an arm ended before. A lead that shrinks
    from `quarter` to `end` is only a head start.
    """
    gaps: dict[str, float | None] = {}
    for name, share in GAP_AT.items():
        pairs = [(r.losses, base[r.seed].losses, share * base[r.seed].steps) for r in counted if base]
        both = [(interpolate(theirs, step), interpolate(ours, step)) for ours, theirs, step in pairs]
        gaps[name] = mean([None if None in (a, b) else a - b for a, b in both])  # type: ignore[operator]
    return gaps


def _left_out(name: str, group: Sequence[Record], base: dict[int, Record]) -> list[str]:
    notes = []
    for record in group:
        status, why = record.info.get("status"), record.info.get("error")
        tail = f": {why}" if why else "."
        if status != "finished":
            at = f" at step {record.curve[-1][0]}" if record.curve else ""
            stands = {"failed": f"failed{at}", "interrupted": f"was interrupted{at}"}.get(
                str(status), f"is not finished{at and f' (it is{at})'}"
            )
            notes.append(f"`{name}` seed {record.seed} {stands}, so it does not count{tail}")
        elif not record.usable:
            notes.append(f"`{name}` seed {record.seed} has no finite validation loss, so it does not count{tail}")
        elif base and record.seed not in base:
            notes.append(f"`{name}` seed {record.seed} does not count: the baseline has no finished run of this seed.")
    missing = sorted(set(base) - {record.seed for record in group})
    if missing:
        notes.append(f"`{name}` has no run of seed {', '.join(map(str, missing))}.")
    return notes


def _warnings(arms: dict[str, list[Record]], baseline: str | None, base: dict[int, Record], seeds: int) -> list[str]:
    """What a reader should know before trusting the speed-ups."""
    notes = []
    if seeds == 1 and len(arms) > 1:
        notes.append("One seed only: how much of a difference is chance is unknown.")
    early = [s for r in base.values() if (s := same_performance_step(r.losses, r.losses[-1][1])) and s < 0.95 * r.steps]
    if early and len(arms) > 1:
        step, steps = statistics.fmean(early), max(r.steps for r in base.values())
        notes.append(
            f"The baseline `{baseline}` reached its final loss at step {step:.0f} of {steps} and gained nothing after "
            f"that. Counted to there, the speed-ups would be {100 * (1 - step / steps):.0f} % smaller."
        )
    everyone = [r for group in arms.values() for r in group if r.usable]
    # With batches of different sizes, steps are not the same amount of training, and their ratio says little.
    sizes = {r.arm: r.tokens_per_step for r in everyone if r.tokens_per_step}
    if len({round(size) for size in sizes.values()}) > 1:
        text = ", ".join(f"`{arm}` {size:.0f}" for arm, size in sizes.items())
        notes.append(f"A step does not have the same number of tokens in all arms ({text}).")
    lengths = {r.arm: r.steps for r in everyone}
    if len(set(lengths.values())) > 1:
        notes.append(f"The arms trained for different steps ({', '.join(f'`{a}` {n}' for a, n in lengths.items())}).")
    for key in ("cpu", "gpu", "threads", "torch"):
        values = {str((r.info.get("environment") or {}).get(key)) for r in everyone}
        if len(values) > 1:
            notes.append(f"The runs differ in {key} ({', '.join(sorted(values))}): do not compare their seconds.")
    at_once = max(map(_at_once, everyone), default=1)
    if at_once > 1:
        notes.append(
            f"Up to {at_once} runs at once shared the machine and slowed each other down: trust the steps; time "
            "speed-ups mean little."
        )
    # The median over the logging intervals is the speed of the machine alone. A mean far below it is due to other work.
    busy = dict.fromkeys(r.arm for r in everyone if r.was_disturbed)
    if busy:
        names = ", ".join(f"`{arm}`" for arm in busy)
        notes.append(f"The machine was busy with other work at times ({names}): trust the steps, not the seconds.")
    return notes


def _at_once(record: Record) -> int:
    """How many runs shared the machine."""
    return int((record.info.get("environment") or {}).get("at_once", 1))


def _bits_per_byte(record: Record) -> float | None:
    value = (record.info.get("result") or {}).get("bits_per_byte")
    if value is not None:
        return number(value)
    per_token = ((record.info.get("data") or {}).get("bytes_per_token") or {}).get("validation")
    return record.final_nll / math.log(2) / per_token if per_token else None


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None if there is no value or one is missing."""
    present = [float(v) for v in values if v is not None and math.isfinite(v)]
    return statistics.fmean(present) if present and len(present) == len(values) else None


def over_seeds(values: Sequence[float]) -> SeedNumbers:
    """Mean, sample standard deviation (None for one value) and the values themselves."""
    std = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    return {"mean": mean(values), "std": std, "per_seed": [v if math.isfinite(v) else None for v in values]}


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


CSV_HEADER = ("arm", "seed", "step", "tokens", "seconds", "split", "loss")


def curves_csv(runs: Iterable[RunFolder] | Sequence[Record], scores: Sequence[str] = ()) -> str:
    """All curves as CSV: arm, seed, step, tokens, training seconds, split (train or validation), loss in nats.

    `scores` names more columns: other measures of the evaluations than the loss.
    """
    items = list(runs)
    records = [r for r in items if isinstance(r, Record)] or read_records(r for r in items if isinstance(r, RunFolder))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV_HEADER, *scores])
    for record in records:
        for row in record.metrics:
            for split, key in (("train", "loss"), ("validation", "nll")):
                if key in row:
                    common = [record.arm, record.seed, row["step"], row.get("tokens"), row.get("seconds"), split]
                    writer.writerow([*common, row[key], *(row.get(score) for score in scores)])
    return out.getvalue()


def newest_summary(folder: Path) -> dict[str, Any]:
    """summary.json of the newest comparison in `folder`; of none, one without arms."""
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) and isinstance(found.get("arms"), dict) else {"arms": {}}


def arms_compared(folder: Path) -> list[str]:
    """The arms of the newest comparison in `folder`, the baseline first."""
    summary = newest_summary(folder)
    return list(dict.fromkeys(arm for arm in (summary.get("baseline"), *summary["arms"]) if arm is not None))


def without(arm: str, swept: Iterable[str]) -> tuple[str, str]:
    """Splits an arm from the settings that a sweep chose: ("fixed:max_window=4", "lr=4e-3")."""
    mixing, _, rest = arm.partition(":")
    parts = [part for part in rest.split(",") if part]
    chosen = [part for part in parts if part.partition("=")[0].strip() in set(swept)]
    kept = ",".join(part for part in parts if part not in chosen)
    return mixing + (f":{kept}" if kept else ""), ",".join(chosen)


def passed_over(folder: Path, arms: Iterable[str], swept: Iterable[str]) -> list[str]:
    """Which of `arms` differ in what was swept alone from one of the newest comparison in `folder`, and are not in it.

    So it is with runs that were made before a sweep, or a wider one, chose other settings.
    """
    newest, here = arms_compared(folder), list(dict.fromkeys(arms))
    kept = {without(arm, swept)[0] for arm in newest if arm in here}
    return [arm for arm in here if arm not in newest and without(arm, swept)[0] in kept]


SWEEP_FILE = "sweep.json"


def sweep_folder(out: str | Path) -> Path:
    """The folder with the trials of a sweep for the comparison in `out`, and the record of the choice."""
    place = Path(os.path.abspath(out))  # "." has no name
    return place.with_name(place.name + "-sweep")


def read_sweep(folder: Path) -> dict[str, Any] | None:
    """The record of a sweep in the folder of its trials; None where there is none that can be read."""
    try:
        found = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and {"grid", "steps", "seed", "fingerprint", "arms"} <= set(found)
    return found if whole else None


def with_sweep(summary: LossSummary, out: str | Path) -> LossSummary:
    """The summary, with "sweep": {"grid", "steps", "seed", "arms": {arm: {"best", "edges", "trials"}}} if a sweep
    chose settings for the comparison in `out`. A record of other arms or other data is ignored: it is left from an
    earlier comparison."""
    found = read_sweep(sweep_folder(out))
    if found is None:
        return summary
    same = found["fingerprint"] == summary["data"].get("fingerprint") and set(found["arms"]) <= set(summary["arms"])
    return {**summary, "sweep": found} if same else summary


def write_summary(out: Path, runs: Iterable[RunFolder], baseline: str | None) -> LossSummary:
    """Write summary.json and curves.csv into `out`, each atomically, and return the summary.

    Raises:
        UserError: see `summarize`.
    """
    records = read_records(runs)
    summary = with_sweep(summarize_records(records, baseline), out)
    write_json(Path(out) / "summary.json", summary)
    write_atomically(Path(out) / "curves.csv", curves_csv(records))
    return summary
