"""Runs of classifiers -> summary.json, curves.csv and sentences: how well and how soon each arm learned. No torch.

score                 accuracy, or mean average precision if examples have several classes; from 0 to 1 (best)
test                  the score of the last model on the test split, which is used for nothing else
same-accuracy step    the first step at which an arm's score on the validation examples is at or above the best that
                      the baseline with the same seed had at any evaluation, linearly interpolated between evaluations
speed-ups             as in `report/summary.py`, from that step
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from waveletgpt.report.reading import Record, read_records
from waveletgpt.report.records import ScoreArm, ScoreSummary, SeedNumbers, baseline_arm
from waveletgpt.report.summary import Measure, assemble, compared, curves_csv, mean, over_seeds
from waveletgpt.report.wording import duration, plural, quantity, speedup_text
from waveletgpt.runs.folder import RunFolder, write_atomically, write_json
from waveletgpt.runs.records import RunRecord

CLASSIFICATION = "classification"
NAMES = {"accuracy": "accuracy", "map": "mean average precision"}


def score_of(record: Record) -> str:
    """ "accuracy" or "map"."""
    return "map" if (record.info.get("data") or {}).get("multi_label") else "accuracy"


def score_curve(record: Record, name: str | None = None) -> list[tuple[float, float]]:
    """(step, score on the validation examples) for every evaluation."""
    name = name or score_of(record)
    return [(row["step"], float(row[name])) for row in record.metrics if name in row]


def best_score(record: Record) -> float:
    return max((score for _, score in score_curve(record)), default=math.nan)


def final_score(record: Record, split: Literal["test", "validation"] = "test", name: str | None = None) -> float:
    """The last model's score on a whole split; NaN if there is none."""
    found: Mapping[str, Any] = (record.info.get("result") or {}).get(split) or {}
    value = found.get(name or score_of(record))
    return float(value) if value is not None else math.nan


# In `Measure` lower is better, so scores get a minus sign.
SCORE = Measure(
    lambda r: [(step, -score) for step, score in score_curve(r)],
    lambda r: -best_score(r),
    lambda r: -_reported(r),
)


def _reported(record: Record) -> float:
    """The test score, or the validation score if there is no test split."""
    test = final_score(record)
    return test if math.isfinite(test) else final_score(record, "validation")


def summarize_scores(records: Sequence[Record], baseline: str | None) -> ScoreSummary:
    """Numbers of all arms against the baseline: the content of summary.json.

    Raises:
        UserError: see `summary.summarize`.
    """
    summary: ScoreSummary = {**assemble(records, baseline, _numbers, _against, early=False)}
    summary["task"] = CLASSIFICATION
    summary["score"] = score_of(records[0])
    tested = all(math.isfinite(final_score(r)) for r in records if r.usable)
    if not tested:
        summary["notes"].append("There is no test split: the scores are those of the validation split.")
    base = [r for r in records if r.arm == summary["baseline"] and r.seed in summary["arms"][r.arm]["seeds"]]
    if base and not any(_beats_guessing(r) for r in base):
        score = percent(baseline_arm(summary)["test"])
        summary["notes"].append(
            f"The baseline's accuracy, {score} %, is not clearly better than that of always naming the most common "
            "class: how soon another arm reaches it means nothing."
        )
    return summary


def _beats_guessing(record: Record) -> bool:
    """Whether a run is more accurate than always naming the most common class by two standard errors; true if the
    record does not say."""
    result = record.info.get("result") or {}
    found = result.get("test") or result.get("validation") or {}
    share, count = found.get("majority_class"), found.get("recordings")
    if share is None or not count:
        return True
    return found["accuracy"] > share + 2 * math.sqrt(share * (1 - share) / count)


def _numbers(info: RunRecord, counted: Sequence[Record]) -> ScoreArm:
    model = info.get("model") or {}
    return {
        "parameters": model.get("parameters"),
        "extra_parameters": model.get("extra_parameters"),
        "flops_per_token": model.get("flops_per_token"),
        "tokens_per_second": mean([(r.info.get("result") or {}).get("tokens_per_second") for r in counted]),
        "seconds": mean([r.seconds for r in counted]),
        "steps": max((r.steps for r in counted), default=None),
        "seeds": [r.seed for r in counted],
        "test": over_seeds([_reported(r) for r in counted]),
        "validation": over_seeds([final_score(r, "validation") for r in counted]),
        "best": over_seeds([best_score(r) for r in counted]),
        "top5": over_seeds([final_score(r, "test", "top5") for r in counted]),
        "final_nll": over_seeds([r.final_nll for r in counted]),
    }


def _against(counted: Sequence[Record], base: dict[int, Record]) -> ScoreArm:
    numbers, difference = compared(counted, base, SCORE)
    per_seed = [None if value is None else -value for value in difference["per_seed"]]
    middle = None if difference["mean"] is None else -difference["mean"]
    return {**numbers, "test_difference": {**difference, "mean": middle, "per_seed": per_seed}}


def percent(value: SeedNumbers, *, sign: bool = False) -> str:
    """{"mean", "std"} of numbers from 0 to 1 as percent: "43.1 ± 0.6"."""
    if value.get("mean") is None:
        return "–"
    middle = round(100 * value["mean"], 1) + 0.0  # no "-0.0"
    text = f"{middle:{'+' if sign else ''}.1f}"
    return text if value.get("std") is None else f"{text} ± {100 * value['std']:.1f}"


TABLE_HEADER = [
    "arm", "test, %", "vs baseline", "validation, best, %", "same-accuracy step", "step speed-up", "time speed-up",
    "top 5, %", "parameters", "tokens/s", "training",
]  # fmt: skip


def score_table(summary: ScoreSummary) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of short strings, one row per arm."""
    rows = []
    many = int(summary["data"].get("classes") or 0) > 5
    for name, arm in summary["arms"].items():
        against = "test_difference" in arm
        same = arm.get("same_performance_step") or {}
        reached = "baseline" if not against and len(summary["arms"]) > 1 else "–"
        if against and arm["seeds"]:
            step, some = same["mean"], same["reached"]
            seeds = f" ({some} of {len(arm['seeds'])} seeds)" if some else ""
            reached = f"never{seeds}" if step is None else f"{step:.0f} of {summary['steps']}"
        extra = arm["extra_parameters"]
        rows.append(
            [
                name,
                percent(arm["test"]),
                percent(arm["test_difference"], sign=True) if against else "",
                percent(arm["best"]),
                reached,
                speedup_text(arm.get("step_speedup")) if against else "",
                speedup_text(arm.get("time_speedup")) if against else "",
                percent(arm["top5"]) if many else "–",
                quantity(arm["parameters"]) + (f" (mixing {quantity(extra)})" if extra else ""),
                "–" if arm["tokens_per_second"] is None else f"{arm['tokens_per_second']:,.0f}",
                duration(arm["seconds"]),
            ]
        )
    return list(TABLE_HEADER), rows


def score_sentence(summary: ScoreSummary, name: str) -> str:
    """One sentence on the result of an arm."""
    arm, base = summary["arms"][name], baseline_arm(summary)
    measure, seeds = NAMES[summary["score"]], len(arm["seeds"])
    if not seeds or arm["test"]["mean"] is None:
        return f"`{name}` has no finished run."
    text = f"`{name}`: {measure} {percent(arm['test'])} % after {arm['steps']} steps"
    if not base or name == summary["baseline"] or not base["seeds"]:
        return f"{text}; {plural(seeds, 'seed')}."
    text += f", {percent(arm['test_difference'], sign=True)} points against the baseline"
    same = arm["same_performance_step"]
    best = percent({"mean": base["best"]["mean"]})
    if same["mean"] is not None:
        text += f"; the baseline's best, {best} %, after {same['mean']:.0f} of {summary['steps']} steps"
    elif same["reached"]:
        text += f"; the baseline's best, {best} %, with {same['reached']} of {plural(seeds, 'seed')} only"
    else:
        text += f"; it never reached the baseline's best, {best} %"
    ci = arm["test_difference"]["ci95"]
    chance = ci is not None and abs(arm["test_difference"]["mean"]) <= ci
    return f"{text}; {plural(seeds, 'seed')}{', and the difference may be chance' if chance else ''}."


def best_arm(summary: ScoreSummary) -> str:
    """The arm with the best test score, without the baseline; the first arm if there is no other."""
    others = {n: a for n, a in summary["arms"].items() if n != summary["baseline"] and a["test"]["mean"] is not None}
    return max(others, key=lambda n: others[n]["test"]["mean"]) if others else next(iter(summary["arms"]))


def score_headline(summary: ScoreSummary) -> str:
    """The sentence of the best arm."""
    others = sum(bool(arm["seeds"]) for name, arm in summary["arms"].items() if name != summary["baseline"])
    chosen = f" Best of {others} arms." if others > 1 else ""
    return score_sentence(summary, best_arm(summary)) + chosen


def write_scores(out: Path, runs: Iterable[RunFolder], baseline: str | None) -> ScoreSummary:
    """Write summary.json and curves.csv into `out`, each atomically, and return the summary.

    Raises:
        UserError: see `summarize_scores`.
    """
    records = read_records(runs)
    summary = summarize_scores(records, baseline)
    write_json(Path(out) / "summary.json", summary)
    write_atomically(Path(out) / "curves.csv", curves_csv(records, (summary["score"], "top5")))
    return summary
