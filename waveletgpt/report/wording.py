"""The numbers of summary.json as sentences and tables, for terminals, Markdown and the report."""

from __future__ import annotations

import math
from typing import Literal

from waveletgpt.report.records import LossArm, LossSummary, SeedNumbers, baseline_arm
from waveletgpt.runs.records import SourceLoss


def arm_sentence(summary: LossSummary, name: str) -> str:
    """One sentence that compares an arm with the baseline. Arm names are in backticks."""
    arm, base = summary["arms"][name], baseline_arm(summary)
    seeds = len(arm["seeds"])
    loss = arm["final_nll"]["mean"]
    if not seeds or loss is None:
        return f"`{name}` has no finished run."
    if not base or name == summary["baseline"] or not base["seeds"]:
        return f"`{name}` ended at {loss:.3f} nats per token after {arm['steps']} steps; {plural(seeds, 'seed')}."
    same = arm["same_performance_step"]
    target, steps = base["final_nll"]["mean"], summary["steps"]
    difference = arm["final_nll_difference"]
    if same["mean"] is None:
        gap = f"{abs(difference['mean']):.3f} nats {'above' if difference['mean'] > 0 else 'below'} it"
        if same["reached"]:
            return (
                f"`{name}` reached the baseline's final loss {target:.3f} with {same['reached']} of "
                f"{plural(seeds, 'seed')} only, so it has no speed-up; it ended {gap} on average."
            )
        return (
            f"`{name}` never reached the baseline's final loss {target:.3f} in {arm['steps']} steps; "
            f"it ended {gap}; {plural(seeds, 'seed')}."
        )
    text = f"`{name}` reached the baseline's final loss {target:.3f} after {same['mean']:.0f} of {steps} steps"
    if arm["step_speedup"] is not None:  # None if the arm was there before the first step
        text += f": {_times(arm['step_speedup'], 'fewer steps', 'more steps', 'as many steps')}"
    if arm["time_speedup"] is not None:
        text += f", {_times(arm['time_speedup'], 'less time', 'more time', 'the same time')}"
    text += f"; {plural(seeds, 'seed')}"
    ci = difference["ci95"]
    if ci is not None and abs(difference["mean"]) <= ci:
        text += ", and the difference in final loss may be chance between seeds"
    return text + "."


def best_arm(summary: LossSummary) -> str | None:
    """The arm that reaches the baseline's final loss with the least compute: steps times FLOPs per token.

    Steps alone would favour larger models, and seconds depend on other work on the machine. All batches count as
    equally large. None if no arm gets there.
    """
    arms = summary["arms"]
    costs = {
        name: (arm["flops_per_token"] or 1.0) / arm["step_speedup"]
        for name, arm in arms.items()
        if arm.get("step_speedup")
    }
    return min(costs, key=lambda name: costs[name]) if costs else None


def headline_arm(summary: LossSummary) -> str | None:
    """The arm that the headline is about; None if it is about all arms."""
    arms, baseline = summary["arms"], summary["baseline"]
    others = [name for name in arms if name != baseline and arms[name]["seeds"]]
    if best_arm(summary) is not None:
        return best_arm(summary)
    if baseline is None or not others or not arms[baseline]["seeds"]:
        return next((name for name in arms if arms[name]["seeds"]), next(iter(arms)))
    return others[0] if len(others) == 1 else None


def headline(summary: LossSummary) -> str:
    """One sentence on the arm of `best_arm`, or on all arms if none reached the baseline's final loss."""
    arms, name = summary["arms"], headline_arm(summary)
    others = sum(bool(arm["seeds"]) for other, arm in arms.items() if other != summary["baseline"])
    if name is None:
        target = baseline_arm(summary)["final_nll"]["mean"]
        return (
            f"None of {others} arms reached the baseline's final loss {target:.3f} with all of their seeds in "
            f"{summary['steps']} steps."
        )
    # The best of many arms is partly luck, so say how many there were.
    chosen = f"; best of {others} arms" if others > 1 and name == best_arm(summary) else ""
    return f"{arm_sentence(summary, name)[:-1]}{chosen}."


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _times(ratio: float, fewer: str, more: str, same: str) -> str:
    if abs(ratio - 1) < 0.005:
        return same
    return f"{ratio:.2f}x {fewer}" if ratio > 1 else f"{1 / ratio:.2f}x {more}"


def quantity(value: float | None) -> str:
    """1213440 -> "1.21 M"; None -> a dash."""
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds in words: "42 s", "12.3 min", "1.50 h"; None -> a dash."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


TABLE_HEADER = [
    "arm", "final nll", "vs baseline", "same-performance step", "step speed-up", "time speed-up", "bits/byte",
    "parameters", "FLOPs/token", "tokens/s", "training",
]  # fmt: skip


def summary_table(summary: LossSummary) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of short strings, one row per arm, for a terminal, Markdown or the report."""
    base = baseline_arm(summary)
    rows = []
    for name, arm in summary["arms"].items():
        compared = bool(base) and name != summary["baseline"]
        same = arm.get("same_performance_step", {})
        difference = arm.get("final_nll_difference", {})
        if not compared:
            reached = "baseline" if name == summary["baseline"] and len(summary["arms"]) > 1 else "–"
        elif same["mean"] is not None:
            reached = f"{same['mean']:.0f} of {summary['steps']}"
        elif not arm["seeds"] or not base["seeds"]:
            reached = "–"
        else:
            reached = f"never ({same['reached']} of {len(arm['seeds'])} seeds)" if same["reached"] else "never"
        rows.append(
            [
                name,
                plus_minus(arm["final_nll"]),
                plus_minus(difference, sign=True) if difference else "",
                reached,
                speedup_text(arm.get("step_speedup")) if compared else "",
                speedup_text(arm.get("time_speedup")) if compared else "",
                "–" if arm["bits_per_byte"] is None else f"{arm['bits_per_byte']:.3f}",
                quantity(arm["parameters"]) + (_share(arm, base, "parameters") if compared else ""),
                quantity(arm["flops_per_token"]) + (_share(arm, base, "flops_per_token") if compared else ""),
                "–" if arm["tokens_per_second"] is None else f"{arm['tokens_per_second']:,.0f}",
                duration(arm["seconds"]),
            ]
        )
    return list(TABLE_HEADER), rows


def gap_table(summary: LossSummary) -> tuple[list[str], list[list[str]]]:
    """(header, rows): the lead of each arm over the baseline, in nats, during training; no rows without a lead."""
    rows = []
    for name, arm in summary["arms"].items():
        gap = arm.get("gap") or {}
        if all(gap.get(when) is not None for when in ("quarter", "half", "end")):
            left = f"{gap['end'] / gap['quarter']:.0%}" if gap["quarter"] > 0 else "–"
            rows.append([name, *(f"{gap[when]:+.3f}" for when in ("quarter", "half", "end")), left])
    return ["arm", "ahead at a quarter of the steps", "at half", "at the end", "left of the first"], rows


def breakdown_table(summary: LossSummary) -> tuple[list[str], list[list[str]]]:
    """(header, rows): loss on tokens that complete a pair seen earlier in the context and on the other tokens, with the
    differences to the baseline, and the share of attention to near tokens; no rows if no run recorded them."""
    base = baseline_arm(summary).get("breakdown")
    rows = []
    for name, arm in summary["arms"].items():
        found = arm.get("breakdown")
        if not found:
            continue
        cells = []
        for kind in ("seen", "new"):
            own = found["pairs"][kind]["nll"]
            theirs = base["pairs"][kind]["nll"] if base and name != summary["baseline"] else None
            text = "–" if own is None else f"{own:.3f}"
            cells.append(text if own is None or theirs is None else f"{text} ({own - theirs:+.3f})")
        tokens = {kind: found["pairs"][kind]["tokens"] for kind in ("seen", "new")}
        near = found["near_attention"]
        rows.append(
            [
                name,
                f"{tokens['seen'] / max(1, sum(tokens.values())):.0%}",
                *cells,
                "–" if near is None else f"{near['share']:.1%}",
            ]
        )
    header = ["arm", "tokens that complete a seen pair", "loss on these", "loss on the others"]
    return [*header, "attention within 2 tokens"], rows


def sources_table(summary: LossSummary) -> tuple[list[str], list[list[str]]]:
    """(header, rows): loss on each source of a mixture, with the difference to the baseline; no rows for other data."""
    each = {name: (arm.get("breakdown") or {}).get("sources") for name, arm in summary["arms"].items()}
    found: dict[str, dict[str, SourceLoss]] = {name: sources for name, sources in each.items() if sources}
    base = found.get(summary["baseline"] or "")
    names = list(next(iter(found.values()), dict[str, SourceLoss]()))
    rows = []
    for arm, sources in found.items():
        cells = []
        for name in names:
            own = sources[name]["nll"]
            theirs = base[name]["nll"] if base and arm != summary["baseline"] else None
            cells.append(f"{own:.3f}" if theirs is None else f"{own:.3f} ({own - theirs:+.3f})")
        rows.append([arm, *cells])
    return ["arm", *(f"loss on {name}" for name in names)], rows


def markdown_table(summary: LossSummary) -> str:
    """`summary_table` as Markdown, without empty columns."""
    header, rows = summary_table(summary)
    keep = [i for i in range(len(header)) if i == 0 or any(row[i] not in ("", "–") for row in rows)]
    cells = [[row[i].replace("|", "\\|") for i in keep] for row in rows]
    lines = [[header[i] for i in keep], ["---"] * len(keep), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plus_minus(value: SeedNumbers, *, sign: bool = False) -> str:
    """{"mean", "std"} as "1.523 ± 0.004", or as "1.523" if the deviation is unknown."""
    if value.get("mean") is None:
        return "–"
    text = f"{value['mean']:+.3f}" if sign else f"{value['mean']:.3f}"
    return text if value.get("std") is None else f"{text} ± {value['std']:.3f}"


def _share(arm: LossArm, base: LossArm, key: Literal["parameters", "flops_per_token"]) -> str:
    if not base or not base[key] or arm[key] is None:
        return ""
    share = arm[key] / base[key] - 1
    return " (+0 %)" if share == 0 else f" ({100 * share:+.2g} %)"


def speedup_text(value: float | None) -> str:
    """1.324 -> "1.32x"; None -> a dash."""
    return "–" if value is None else f"{value:.2f}x"
