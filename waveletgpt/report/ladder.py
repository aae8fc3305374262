"""What a ladder's run folders say: what an arm's lead is worth in compute, and whether it lasts.

A *ladder* is a folder with a comparison for each of its *rungs*, named SIZE-TOKENS: a size of model trained on a number
of tokens, each run with its own learning-rate decay. This module reads the run folders and the records of sweeps beside
them; `scaling.py` fits the laws.

    gap                 the baseline's final loss minus the arm's, in nats, over the seeds that both have
    data multiplier     factor by which the baseline of the same size needs more tokens for the arm's final loss
    compute multiplier  data multiplier x (the arm's tokens per second / the baseline's). Of each, the fastest run at
                        that size counts, because other work on a machine can only slow a run down
    trend               factor by which the compute multiplier changes: per tenfold tokens at the same size, per tenfold
                        parameters at the same tokens, and per tenfold compute, half of it from each of the two
    retention           share of the gap that is left with ten times as many tokens
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from waveletgpt.errors import UserError, suggest
from waveletgpt.report.reading import Record, check_comparable, read_records
from waveletgpt.report.records import LossSummary, baseline_arm
from waveletgpt.report.scaling import PARAMETERS, Estimates, Point, can_fit, can_fit_tokens, estimate
from waveletgpt.report.summary import SWEEP_FILE, arms_compared, passed_over, read_sweep, summarize_records, without
from waveletgpt.report.wording import plural, plus_minus
from waveletgpt.runs.folder import find_runs
from waveletgpt.runs.records import RunRecord

SCHEMA = 1
FILES = ("ladder.json", "ladder.csv", "report.html")
_COUNT = r"(\d+(?:\.\d+)?)([kMB]?)"
_RUNG = re.compile(f"{_COUNT}-{_COUNT}$")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


def count_name(value: int) -> str:
    """A size or number of tokens as text: 300000 -> "0.3M", 20000 -> "20k"."""
    unit = next((unit for unit, least in (("B", 10**8), ("M", 10**5), ("k", 10**3)) if value >= least), "")
    return f"{value / _UNITS[unit]:.12g}{unit}"


def rung_name(size: int, tokens: int) -> str:
    """The name of a rung's folder."""
    return f"{count_name(size)}-{count_name(tokens)}"


def parse_rung(name: str) -> tuple[int, int] | None:
    """(size, tokens) from the name of a rung's folder; None for any other name."""
    found = _RUNG.match(name)
    if found is None:
        return None
    return round(float(found[1]) * _UNITS[found[2]]), round(float(found[3]) * _UNITS[found[4]])


def find_rungs(folder: str | Path) -> list[Path]:
    """The rungs in `folder` that hold a run, sorted by size and tokens; empty if it is not a ladder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    named = [(place, child) for child in folder.iterdir() if (place := parse_rung(child.name)) is not None]
    return [child for _, child in sorted(named) if any(find_runs(child))]


def find_sweeps(folder: Path) -> dict[str, dict[str, Any]]:
    """Rung where a sweep was made -> record of that sweep, as in `summary.with_sweep`."""
    found = {}
    for child in sorted(folder.glob(f"*-sweep/{SWEEP_FILE}")):
        rung, record = child.parent.name.removesuffix("-sweep"), read_sweep(child.parent)
        if parse_rung(rung) is not None and record is not None:
            found[rung] = record
    return found


@dataclass(frozen=True)
class Rung:
    """The runs of a rung and the summary of their comparison. Arms have the same names at all rungs."""

    path: Path
    records: list[Record]
    summary: LossSummary
    settings: dict[str, str]
    """Arm -> the settings that a sweep chose here or at this size, such as "lr=4e-3"; "" without a sweep."""
    passed_over: list[str]
    """Arms as they were trained, with other settings than the sweep has chosen since; they do not count."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> str:
        return self.name.partition("-")[0]

    @property
    def info(self) -> RunRecord:
        """run.json of a run of the baseline."""
        baseline = self.summary["baseline"]
        return next((r for r in self.records if r.arm == baseline), self.records[0]).info

    @property
    def tokens(self) -> int:
        """Tokens that a finished run has trained on."""
        tokens = [r.info["result"]["tokens"] for r in self.records if r.usable]
        return int(max(tokens, default=_tokens_of(self.name)))


def read_ladder(folder: str | Path, baseline: str | None = None) -> list[Rung]:
    """The rungs in `folder`, sorted by size and tokens.

    Args:
        baseline: the arm to compare with. None: the baseline of the rungs' own comparisons, else the first arm without
            mixing.

    Raises:
        UserError: there are no rungs, the runs cannot be compared, or no arm is called `baseline`.
    """
    folder = Path(folder)
    places = find_rungs(folder)
    if not places:
        raise UserError(f"{folder} holds no rungs of a ladder (folders such as 0.3M-5M with runs in them)")
    read = [(place, read_records(find_runs(place))) for place in places]
    check_comparable([record for _, records in read for record in records])
    swept = {name for record in find_sweeps(folder).values() for name in record["grid"]}
    dropped = {place: passed_over(place, [record.arm for record in records], swept) for place, records in read}
    read = [(place, [r for r in records if r.arm not in dropped[place]]) for place, records in read]
    everywhere = [{record.arm for record in records} for _, records in read]
    if not swept and any(names != everywhere[0] for names in everywhere):
        swept = {"lr"}  # no record of the sweep is left
    names = {arm: without(arm, swept) for arms in everywhere for arm in arms}
    if any(len({names[arm][0] for arm in arms}) < len(arms) for arms in everywhere):
        names = {arm: (arm, "") for arm in names}  # these settings were compared, not chosen by a sweep
    order = _order(places, names)
    arms = list(dict.fromkeys(name for name, _ in names.values()))
    if baseline is None:
        baseline = order[0] if order else next((a for a in sorted(arms) if a.split(":")[0] == "none"), sorted(arms)[0])
    elif baseline not in arms:
        raise UserError(
            f'`baseline`: no arm "{baseline}" in {folder}; there are {", ".join(arms)}{suggest(baseline, arms)}'
        )
    rungs = []
    for place, records in read:
        own = [replace(record, arm=names[record.arm][0]) for record in records]
        own.sort(key=lambda r: (r.arm != baseline, order.index(r.arm) if r.arm in order else len(order), r.arm, r.seed))
        chosen = {names[record.arm][0]: names[record.arm][1] for record in records}
        here = baseline if any(record.arm == baseline for record in own) else None
        rungs.append(Rung(place, own, summarize_records(own, here), chosen, dropped[place]))
    return rungs


def _tokens_of(rung: str) -> int:
    return (parse_rung(rung) or (0, 0))[1]


def _order(places: Sequence[Path], names: dict[str, tuple[str, str]]) -> list[str]:
    """Arms in the order in which they were compared, the baseline first; empty if that is not known."""
    return list(dict.fromkeys(names[arm][0] for place in places for arm in arms_compared(place) if arm in names))


def block_parameters(info: RunRecord) -> int:
    """Parameters of a run's model without embeddings and mixers: N of the law, which ignores the vocabulary."""
    model, recipe = info.get("model") or {}, info.get("recipe") or {}
    positions = (recipe.get("model") or {}).get("position_embedding")
    learned = positions == "learned" or (positions is None and recipe.get("architecture", "gpt2") == "gpt2")
    tables = int((info.get("data") or {}).get("vocab_size") or 0) + (int(model["n_positions"]) if learned else 0)
    return int(model["parameters"]) - int(model.get("extra_parameters") or 0) - tables * int(model["n_embd"])


def summarize_ladder(rungs: Sequence[Rung], sweeps: dict[str, dict[str, Any]], replicates: int = 100) -> dict[str, Any]:
    """The content of ladder.json.

    Args:
        sweeps: see `find_sweeps`.
        replicates: number of bootstrap replicates for the intervals.
    """
    baseline = next((rung.summary["baseline"] for rung in rungs if rung.summary["baseline"]), None)
    if baseline is None:
        raise UserError("no rung has a run of the baseline: train it, or name another arm as `baseline`")
    arms = list(dict.fromkeys([baseline, *(arm for rung in rungs for arm in rung.summary["arms"])]))
    ratios = throughput_ratios(rungs, baseline)
    told = [(rung, point) for rung in rungs if (point := _point(rung, ratios)).losses.get(baseline)]
    points = [point for _, point in told]
    found = estimate(points, baseline, replicates) if points else {}
    first = rungs[0].info
    ladder: dict[str, Any] = {
        "schema": SCHEMA,
        "baseline": baseline,
        "data": first.get("data") or {},
        "recipe": first.get("recipe") or {},
        "environment": first.get("environment") or {},
        "rungs": [_rung(rung, baseline, ratios) for rung in rungs],
        "arms": {arm: _arm(arm, baseline, found, points) for arm in arms},
        "sweeps": [{"rung": name, "size": name.partition("-")[0], **record} for name, record in sweeps.items()],
    }
    entries = {entry["rung"]: entry for entry in ladder["rungs"]}
    for index, (rung, _) in enumerate(told):
        for arm, entry in entries[rung.name]["arms"].items():
            if arm != baseline:
                for name, key in (("gap", "gap"), ("data_multiplier", "tokens"), ("compute_multiplier", "compute")):
                    entry[name] = _finite(found.get((key, arm, str(index))))
    ladder["notes"] = _notes(ladder, rungs, points)
    return ladder


Ratios = dict[str, dict[str, float]]


def throughput_ratios(rungs: Sequence[Rung], baseline: str) -> Ratios:
    """Size -> arm -> its tokens per second / the baseline's, each of the fastest finished run at that size."""
    speeds: dict[str, dict[str, float]] = {}
    for rung in rungs:
        own = speeds.setdefault(rung.size, {})
        for r in rung.records:
            speed = (r.info.get("result") or {}).get("tokens_per_second")
            if r.usable and speed:
                own[r.arm] = max(speed, own.get(r.arm, 0.0))
    return {
        size: {arm: speed / own[baseline] for arm, speed in own.items()} if baseline in own else {}
        for size, own in speeds.items()
    }


def _point(rung: Rung, ratios: Ratios) -> Point:
    base = baseline_arm(rung.summary)
    losses: dict[str, dict[int, float]] = {}
    for record in rung.records:
        if record.usable:
            losses.setdefault(record.arm, {})[record.seed] = record.final_nll
    compute = float(base.get("flops_per_token") or 0) * rung.tokens
    return Point(rung.size, block_parameters(rung.info), rung.tokens, compute, losses, ratios.get(rung.size, {}))


def _rung(rung: Rung, baseline: str, ratios: Ratios) -> dict[str, Any]:
    point, model = _point(rung, ratios), rung.info["model"]
    data = (rung.info.get("data") or {}).get("splits") or {}
    there = (data.get("train") or {}).get("tokens")
    arms = {}
    for arm, entry in rung.summary["arms"].items():
        arms[arm] = {
            "settings": rung.settings.get(arm, ""),
            "seeds": entry["seeds"],
            "final_nll": entry["final_nll"],
            "tokens_per_second": entry["tokens_per_second"],
            "throughput_ratio": point.throughput.get(arm),
        }
        if arm != baseline:
            arms[arm] |= {"step_speedup": entry.get("step_speedup"), "time_speedup": entry.get("time_speedup")}
            arms[arm] |= {name: _finite(None) for name in ("gap", "data_multiplier", "compute_multiplier")}
    return {
        "rung": rung.name,
        "size": rung.size,
        **{name: model.get(name) for name in ("n_layer", "n_embd", "n_head")},
        "parameters": point.parameters,
        "all_parameters": model.get("parameters"),
        "tokens": point.tokens,
        "steps": rung.summary["steps"],
        "epochs": point.tokens / there if there else None,
        "compute": point.compute,
        "arms": arms,
    }


def _finite(entry: dict[str, Any] | None) -> dict[str, Any]:
    """An estimate for JSON: infinity becomes None, and an infinite value is marked `out_of_reach`."""
    value, interval = (entry or {}).get("value"), (entry or {}).get("ci95")
    infinite = value is not None and not math.isfinite(value)
    return {
        "value": None if infinite else value,
        "ci95": None if interval is None else [x if math.isfinite(x) else None for x in interval],
        **({"out_of_reach": True} if infinite else {}),
    }


def _arm(arm: str, baseline: str, found: Estimates, points: Sequence[Point]) -> dict[str, Any]:
    def law(*key: str) -> dict[str, Any] | None:
        return {n: _finite(found[*key, n]) for n in PARAMETERS} if (*key, "E") in found else None

    sizes = list(dict.fromkeys(point.size for point in points))
    entry: dict[str, Any] = {
        "law": law("law", arm),
        "size_laws": {size: own for size in sizes if (own := law("size law", arm, size)) is not None},
    }
    if arm != baseline:
        entry["retention"] = _finite(found.get(("retention", arm)))
        entry["retention_by_size"] = {size: _finite(found.get(("retention", arm, size))) for size in sizes}
        entry["trend"] = {
            over: _finite(found.get(("trend", arm, over))) for over in ("tokens", "parameters", "compute")
        }
    return entry


def _notes(ladder: dict[str, Any], rungs: Sequence[Rung], points: Sequence[Point]) -> list[str]:
    """What a reader should know before trusting the numbers."""
    notes = []
    baseline = ladder["baseline"]
    sizes = sorted({point.parameters for point in points})
    budgets = sorted({point.tokens for point in points})
    if not can_fit(points, baseline):
        text = (
            f"The law L(N, D) has {len(PARAMETERS)} parameters, and {plural(len(points), 'rung')} of "
            f"{plural(len(sizes), 'size')} and {plural(len(budgets), 'number')} of tokens do not determine them: train "
            "at least 3 sizes with 3 numbers of tokens. "
        )
        alone = [s for s in dict.fromkeys(p.size for p in points)
                 if can_fit_tokens([p for p in points if p.size == s], baseline)]  # fmt: skip
        if alone:
            text += (
                f"Multipliers at {', '.join(alone)} come from a law of tokens alone, fitted at that size. With 3 "
                "numbers of tokens it goes through every point, so its error is unknown."
            )
        else:
            text += "So there are no multipliers, only gaps, speed-ups within each rung and retention."
        notes.append(text)
    if all(len(losses) == 1 for point in points for losses in point.losses.values()):
        notes.append("One seed only: the intervals do not include the spread over seeds.")
    repeated = [entry for entry in ladder["rungs"] if (entry["epochs"] or 0) > 1.005]
    if repeated:
        names = ", ".join(entry["rung"] for entry in repeated)
        most = max(entry["epochs"] for entry in repeated)
        notes.append(
            f"{names}: the training data is read more than once (up to {most:.1f} times), which is worth less than new "
            "data."
        )
    for arm in ladder["arms"]:
        if arm == baseline:
            continue
        behind = [r["rung"] for r in ladder["rungs"] if (gap := _gap(r, arm)) is not None and not gap > 0]
        if behind:
            notes.append(f"`{arm}` has no lead at {', '.join(behind)}, so it has no retention over all rungs.")
        if not behind and not _steady(ladder, arm):
            gaps = _gaps(ladder, arm)
            notes.append(
                f"The gaps of `{arm}` go from {min(gaps):.4f} to {max(gaps):.4f} nats. Its retention depends on the "
                "smallest, which another seed may change, so the headline leaves it out."
            )
        never = [
            r["rung"]
            for r in ladder["rungs"]
            if (r["arms"].get(arm) or {}).get("data_multiplier", {}).get("out_of_reach")
        ]
        if never:
            notes.append(
                f"At {', '.join(never)} the baseline of the same size never reaches the loss of `{arm}`, by its law, "
                "however long it trains: these rungs have no multiplier, and there is no trend."
            )
    for sweep in ladder["sweeps"]:
        for arm, entry in sweep["arms"].items():
            if entry["edges"]:
                names = ", ".join(f"{name} {entry['best'][name]}" for name in entry["edges"])
                notes.append(
                    f"At {sweep['rung']} the best setting of `{without(arm, sweep['grid'])[0]}`, {names}, is at "
                    "the edge of the grid; a wider sweep may find a better one."
                )
    for size in dict.fromkeys(rung.size for rung in rungs):
        own = [r.info.get("environment") or {} for rung in rungs if rung.size == size for r in rung.records if r.usable]
        if any(len({str(where.get(key)) for where in own}) > 1 for key in ("cpu", "gpu", "threads", "torch")):
            notes.append(
                f"Runs of size {size} were made on different machines: do not use the compute multipliers of this size."
            )
    for rung in rungs:
        if rung.passed_over:
            names = ", ".join(f"`{arm}`" for arm in rung.passed_over)
            notes.append(f"{rung.name}: {names} does not count, because a sweep has chosen other settings since.")
        notes += [f"{rung.name}: {note}" for note in rung.summary["notes"] if not note.startswith("One seed only")]
    return notes


def _gaps(ladder: dict[str, Any], arm: str) -> list[float]:
    return [gap for rung in ladder["rungs"] if (gap := _gap(rung, arm)) is not None]


def _steady(ladder: dict[str, Any], arm: str) -> bool:
    """Whether no gap of an arm is below a tenth of the largest: its logarithm would decide the retention alone."""
    gaps = _gaps(ladder, arm)
    return not gaps or min(gaps) >= max(gaps) / 10


def told_retention(ladder: dict[str, Any], arm: str) -> dict[str, Any]:
    """An arm's retention for the headline: without a value if one small gap decides it."""
    entry: dict[str, Any] = ladder["arms"][arm]["retention"]
    return entry if _steady(ladder, arm) else _finite(None)


def _gap(rung: dict[str, Any], arm: str) -> float | None:
    value: float | None = (rung["arms"].get(arm) or {}).get("gap", {}).get("value")
    return value


CSV_HEADER = (
    "rung", "parameters", "tokens", "steps", "compute", "arm", "settings", "seed", "loss", "baseline_loss", "gap",
    "tokens_per_second",
)  # fmt: skip


def ladder_csv(rungs: Sequence[Rung]) -> str:
    """One line for each finished run: its rung, arm, seed, final loss, and the baseline's of the same seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for rung in rungs:
        point = _point(rung, {})
        base = point.losses.get(rung.summary["baseline"] or "", {})
        for r in rung.records:
            if r.usable:
                theirs = base.get(r.seed)
                gap = "" if theirs is None else theirs - r.final_nll
                speed = r.info["result"].get("tokens_per_second")
                place = [rung.name, point.parameters, point.tokens, r.steps, point.compute]
                writer.writerow([*place, r.arm, rung.settings.get(r.arm, ""), r.seed, r.final_nll, theirs, gap, speed])
    return out.getvalue()


def top_rung(ladder: dict[str, Any]) -> dict[str, Any]:
    """The rung with the most compute among those with finished runs of the baseline."""
    done = [rung for rung in ladder["rungs"] if (rung["arms"].get(ladder["baseline"]) or {}).get("seeds")]
    top: dict[str, Any] = max(done or ladder["rungs"], key=lambda rung: rung["compute"])
    return top


def headline(ladder: dict[str, Any]) -> str:
    """One sentence on the arm with the largest gap at the top rung."""
    top, baseline = top_rung(ladder), ladder["baseline"]
    arms = [arm for arm in top["arms"] if arm != baseline and _gap(top, arm) is not None]
    if not arms:
        return f"{plural(len(ladder['rungs']), 'rung')}; nothing to compare with `{baseline}` at {top['rung']} yet."
    best = max(arms, key=lambda arm: _gap(top, arm) or 0.0)
    chosen = f"; best of {len(arms)} arms" if len(arms) > 1 else ""
    return f"{arm_sentence(ladder, best)[:-1]}{chosen}."


def arm_sentence(ladder: dict[str, Any], arm: str) -> str:
    """What an arm's lead is worth at the top rung, and whether it lasts. Arm names are in backticks."""
    top, entry = top_rung(ladder), ladder["arms"][arm]
    gap = _gap(top, arm)
    if gap is None:
        return f"`{arm}` has no finished run at the top rung, {top['rung']}."
    worth = top["arms"][arm]["compute_multiplier"]
    side = "below" if gap > 0 else "above"
    text = f"`{arm}` ends {abs(gap):.3f} nats {side} the baseline at the top rung, {top['rung']}"
    if worth["value"] is not None:
        text += f", worth {worth['value']:.2f}x of compute"
    if entry["trend"]["compute"]["value"] is not None:
        text += f" ({entry['trend']['compute']['value']:.2f} times that at ten times the compute)"
    left = told_retention(ladder, arm)["value"]
    if left is not None:
        text += f"; {left:.0%} of the gap is left" if left <= 1 else f"; the gap grows {left:.2f}x"
        text += " per tenfold data"
    return f"{text}."


def with_interval(entry: dict[str, Any], form: str) -> str:
    """{"value", "ci95"} as "1.32x [1.21, 1.45]", or without an interval if there is none; infinity is "∞"."""
    if entry.get("out_of_reach"):
        return "∞"
    if entry["value"] is None:
        return "–"
    number = form.partition("}")[0] + "}"
    interval = entry["ci95"]
    ends = "" if interval is None else ", ".join("∞" if x is None else number.format(x) for x in interval)
    return form.format(entry["value"]) + (f" [{ends}]" if ends else "")


LADDER_HEADER = [
    "rung", "arm", "settings", "final nll", "gap", "step speed-up", "tokens/s", "throughput", "data multiplier",
    "compute multiplier",
]  # fmt: skip


def ladder_table(ladder: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of short strings for a terminal and the report, one row for each arm of each rung."""
    rows = []
    for rung in ladder["rungs"]:
        for arm, entry in rung["arms"].items():
            compared = arm != ladder["baseline"]
            ratio, speedup = entry["throughput_ratio"], entry.get("step_speedup")
            rows.append(
                [
                    rung["rung"],
                    arm,
                    entry["settings"] or "–",
                    plus_minus(entry["final_nll"]),
                    with_interval(entry["gap"], "{:+.3f}") if compared else "baseline",
                    f"{speedup:.2f}x" if speedup else ("never" if compared and entry["seeds"] else ""),
                    "–" if entry["tokens_per_second"] is None else f"{entry['tokens_per_second']:,.0f}",
                    f"×{ratio:.2f}" if compared and ratio else "",
                    with_interval(entry["data_multiplier"], "{:.2f}x") if compared else "",
                    with_interval(entry["compute_multiplier"], "{:.2f}x") if compared else "",
                ]
            )  # fmt: skip
    return list(LADDER_HEADER), rows
