"""Writes ladder.json, ladder.csv and report.html: the losses of all rungs with the fitted law, and the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from waveletgpt.report.charts import HALF, Axis, Line, Point, chart, swatch
from waveletgpt.report.figures import Styles, figure, mean_curve
from waveletgpt.report.ladder import (
    PARAMETERS,
    Rung,
    arm_sentence,
    count_name,
    find_sweeps,
    headline,
    ladder_csv,
    ladder_table,
    read_ladder,
    summarize_ladder,
    told_retention,
    top_rung,
    with_interval,
)
from waveletgpt.report.page import frame, notes, rich, setup, styles_of, table, tiles
from waveletgpt.report.scaling import Law
from waveletgpt.report.wording import plural, quantity
from waveletgpt.runs.folder import write_atomically, write_json

Ladder = dict[str, Any]


def render(rungs: Sequence[Rung], ladder: Ladder) -> str:
    """The page as text; `ladder` is the content of ladder.json."""
    styles = styles_of(ladder)
    top = next(rung for rung in rungs if rung.name == top_rung(ladder)["rung"])
    sections = [
        ("curves", "Loss by tokens, size by size", _curves(rungs, ladder, styles)),
        ("worth", "What the lead is worth, and whether it lasts", _worth(ladder)),
        ("rungs", "The rungs in numbers", _rungs(ladder, styles)),
        ("law", "The law", _law(ladder, styles)),
        ("sweep", "Settings tried", _sweeps(ladder)),
        ("setup", f"Set-up of the top rung, {escape(top.name)}", setup(top.records, top.summary)),
        ("terms", "How the numbers are defined", _TERMS),
    ]
    title = f"WaveletGPT ladder: {ladder['data'].get('name') or 'runs'}, {' vs '.join(ladder['arms'])}"
    count = sum(len(rung.records) for rung in rungs)
    return frame(title, _header(ladder), sections, ladder, count, "ladder.json and ladder.csv")


def _header(ladder: Ladder) -> str:
    recipe, data = ladder["recipe"], ladder["data"]
    facts = ["ladder", data.get("name"), data.get("modality"), recipe.get("architecture")]
    best = headline(ladder)
    arms = [arm for arm in ladder["arms"] if arm != ladder["baseline"]]
    others = [text for arm in arms if not best.startswith((text := arm_sentence(ladder, arm))[:-1])]
    items = "".join(f"<li>{rich(text)}</li>" for text in others)
    return "\n".join(
        [
            f'<p class="brand"><b>WaveletGPT</b> · {escape(" · ".join(str(fact) for fact in facts if fact))}</p>',
            f"<h1>{rich(best)}</h1>",
            items and f'<ul class="others">{items}</ul>',
            tiles(_tiles(ladder, best)),
            notes(ladder["notes"]),
        ]
    )


def _tiles(ladder: Ladder, best: str) -> list[tuple[str, str, str]]:
    """The main numbers of the arm in the headline."""
    top = top_rung(ladder)
    arm = next((arm for arm in ladder["arms"] if best.startswith(f"`{arm}` ends ")), None)
    if arm is None:
        return []
    at, entry = top["arms"][arm], ladder["arms"][arm]

    def tile(title: str, value: dict[str, Any], form: str, small: str) -> tuple[str, str, str]:
        whole = with_interval(value, form)
        number, _, interval = whole.partition(" [")
        return title, number.replace("-", "−"), f"{small}{interval and f'; 95 % [{interval}'}"

    found = [tile("Gap at the top rung", at["gap"], "{:.3f}", "nats per token below the baseline")]
    if at["compute_multiplier"]["value"] is not None:
        found.append(tile("Compute multiplier", at["compute_multiplier"], "{:.2f}×", f"at {top['rung']}"))
    if entry["trend"]["compute"]["value"] is not None:
        found.append(tile("Its trend", entry["trend"]["compute"], "×{:.2f}", "per tenfold compute"))
    retained = told_retention(ladder, arm)
    if retained["value"] is not None:
        found.append(tile("Retention", retained, "{:.2f}", "of the gap, per tenfold data"))
    return found


def log_ticks(low: float, high: float, name: Any = count_name, most: int = 6) -> list[tuple[float, str]]:
    """Round numbers from 10^low to 10^high for a logarithmic axis: (log10 of the number, its text)."""
    found: list[tuple[float, str]] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        values = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in digits]
        found = [(math.log10(v), name(round(v))) for v in values if low - 1e-9 <= math.log10(v) <= high + 1e-9]
        if len(found) <= most:
            break
    return found


def _flops(value: float) -> str:
    return f"{value:.0e}".replace("e+", "e")


def _key(styles: Styles) -> str:
    items = "".join(f"<li>{swatch(style)}{escape(name)}</li>" for name, style in styles.items())
    return f'<ul class="legend">{items}</ul>'


def _law_of(entry: dict[str, Any] | None) -> Law | None:
    return None if entry is None else Law(**{name: entry[name]["value"] for name in PARAMETERS})


def _curves(rungs: Sequence[Rung], ladder: Ladder, styles: Styles) -> str:
    """For each size: the curves of all runs (means over seeds), their ends, and the law fitted to the ends."""
    entries = {entry["rung"]: entry for entry in ladder["rungs"]}
    charts = []
    for size in dict.fromkeys(rung.size for rung in rungs):
        own = [rung for rung in rungs if rung.size == size]
        budgets = [entries[rung.name]["tokens"] for rung in own]
        low, high = math.log10(min(budgets) / 8), math.log10(max(budgets)) + 0.05
        lines, ends = [], []
        for arm, style in styles.items():
            last: list[Point] = []
            for rung in own:
                usable = [r for r in rung.records if r.arm == arm and r.usable]
                if not usable:
                    continue
                per_step = usable[0].tokens_per_step or 1.0
                curve = [(math.log10(step * per_step), loss) for step, _, loss in
                         mean_curve([[(s, 0.0, v) for s, v in r.losses] for r in usable]) if step]  # fmt: skip
                lines.append(Line([p for p in curve if p[0] >= low], style, kind="seed"))
                final = entries[rung.name]["arms"][arm]["final_nll"]["mean"]
                if final is not None:  # there is none where the baseline has not finished with the arm's seeds
                    last.append((math.log10(entries[rung.name]["tokens"]), final))
            arms = ladder["arms"][arm]
            law = _law_of(arms["law"]) or _law_of(arms["size_laws"].get(size))
            if law is not None and last:
                n = entries[own[0].name]["parameters"]
                xs = [last[0][0] + (high - last[0][0]) * i / 40 for i in range(41)]
                lines.append(Line([(x, law.loss(n, 10**x)) for x in xs], style, kind="plain"))
            lines.append(Line(last, style, kind="points" if law is not None else "taps"))
            ends += [loss for _, loss in last]
        if not ends:
            continue
        pad = 0.08 * (max(ends) - min(ends)) + 0.02
        said = "; ".join(
            f"{name} {arm} {entry['final_nll']['mean']:.3f}"
            for name in (rung.name for rung in own)
            for arm, entry in entries[name]["arms"].items()
            if entry["final_nll"]["mean"] is not None
        )
        charts.append(
            chart(lines, HALF, Axis("tokens", low, high, log_ticks(low, high)),
                  Axis(f"{size}: validation loss, nats per token", min(ends) - pad, max(ends) + 2.5 * pad), height=300,
                  name=f"Validation loss against tokens of the models of size {size}: {said}")
        )  # fmt: skip
    lawful = any(entry["law"] or entry["size_laws"] for entry in ladder["arms"].values())
    through = "The bold lines are the law fitted to these. " if lawful else ""
    return figure(
        f'{_key(styles)}<div class="multiples">{"".join(charts)}</div>',
        "Thin: validation loss during training, mean over seeds. Every rung has its own run, with its own decay, which "
        f"ends at a marker. {through}Tokens are on a logarithmic scale.",
    )


def _worth(ladder: Ladder) -> str:
    """For each arm: its gap by tokens and its multiplier by compute, one line per size; and how both change."""
    sizes = {size: i + 1 for i, size in enumerate(dict.fromkeys(rung["size"] for rung in ladder["rungs"]))}
    html, rows = "", []
    for arm, entry in ladder["arms"].items():
        if arm == ladder["baseline"]:
            continue
        gaps = _by_size(ladder, arm, sizes, "tokens", "gap")
        worths = _by_size(ladder, arm, sizes, "compute", "compute_multiplier")
        drawn = _scatter(gaps, "tokens", count_name, "gap, nats per token", 0.0, f"Gap of {arm} by tokens")
        drawn += _scatter(worths, "compute of the baseline, FLOPs", _flops, "compute multiplier", 1.0,
                          f"Compute multiplier of {arm} by compute")  # fmt: skip
        if drawn:
            said = f"{'Left: its' if worths else 'Its'} gap to the baseline, by tokens."
            said += " Right: by which factor the baseline of the same size needs more compute." if worths else ""
            bars = " Vertical bars: 95 % intervals." if any(line.kind == "plain" for line in [*gaps, *worths]) else ""
            html += figure(
                f'{_key(sizes)}<div class="multiples">{drawn}</div>',
                f"<b>{escape(arm)}</b>, one line per size. {said}{bars}",
            )
        missing = {"value": None, "ci95": None}
        kept = [entry["retention_by_size"].get(size, missing) for size in sizes]
        cells = [_small(with_interval(value, "{:.2f}")) for value in [*kept, entry["retention"]]]
        trends = [entry["trend"][over] for over in ("tokens", "parameters", "compute")]
        rows.append([escape(arm), *cells, *(_small(with_interval(value, "×{:.2f}")) for value in trends)])
    if not rows:
        return ""
    head = ["arm", *(f"retention, {escape(size)}" for size in sizes), "retention, all sizes"]
    head += ["trend, 10× tokens", "trend, 10× size", "trend, 10× compute"]
    # Without a law there is no trend. With one size, or one number of tokens, there is only one.
    keep = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    head, rows = [head[i] for i in keep], [[row[i] for i in keep] for row in rows]
    text = (
        '<p class="small">Retention: the share of the gap that is left with ten times as many tokens (1: all of it). '
        "Trend: the factor by which the compute multiplier changes (1: it does not) with ten times the tokens at the "
        "same size, with ten times the parameters at the same tokens, and with ten times the compute, shared equally "
        "between the two.</p>"
    )
    return html + text + table(head, rows, "arms", "Retention and trend")


def _small(text: str) -> str:
    """A number with its interval below it in small print."""
    number, _, interval = text.partition(" [")
    return number + (f"<small>[{interval}</small>" if interval else "")


def _by_size(ladder: Ladder, arm: str, sizes: Styles, across: str, what: str) -> list[Line]:
    """Lines of (log10 of `across`, value of `what`), one per size, and a bar for each interval."""
    lines: list[Line] = []
    for size, style in sizes.items():
        points: list[Point] = []
        for rung in ladder["rungs"]:
            value = (rung["arms"].get(arm) or {}).get(what) or {}
            if rung["size"] == size and value.get("value") is not None and rung[across]:
                x = math.log10(rung[across])
                points.append((x, value["value"]))
                if value["ci95"] and None not in value["ci95"]:
                    lines.append(Line([(x, end) for end in value["ci95"]], style, kind="plain"))
        if points:
            lines.append(Line(points, style, kind="taps"))
    return lines


def _scatter(lines: Sequence[Line], title: str, name: Any, what: str, level: float, said: str) -> str:
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    points = [y for line in lines if line.kind == "taps" for _, y in line.points]
    # A very wide interval must not make the other points flat.
    reach = max(points) - min(points) + 0.3 * max(abs(y - level) for y in points) + 1e-3
    ends = [y for line in lines for _, y in line.points if min(points) - 2 * reach <= y <= max(points) + 2 * reach]
    low, high = min(level, *ends), max(level, *ends)
    pad = 0.08 * (high - low) or 0.01
    left, right = min(xs) - 0.08, max(xs) + 0.08
    told = "; ".join(f"{name(round(10**x))} {y:.3f}" for line in lines if line.kind == "taps" for x, y in line.points)
    return chart(lines, HALF, Axis(title, left, right, log_ticks(left, right, name)), Axis(what, low - pad, high + pad),
                 height=280, level=(level, ""), name=f"{said}: {told}")  # fmt: skip


def _rungs(ladder: Ladder, styles: Styles) -> str:
    shapes = [
        [
            escape(rung["rung"]),
            f"{rung['n_layer']} × {rung['n_embd']}<small>{plural(rung['n_head'] or 0, 'head')}</small>",
            quantity(rung["parameters"]),
            quantity(rung["all_parameters"]),
            quantity(rung["tokens"]),
            "–" if rung["epochs"] is None else f"{rung['epochs']:.2f}",
            f"{rung['steps']:,}",
            f"{rung['compute']:.2e}".replace("e+", "e"),
        ]
        for rung in ladder["rungs"]
    ]
    head = ["rung", "blocks × width", "N", "all parameters", "tokens D", "epochs", "steps", "FLOPs of the baseline"]
    header, rows = ladder_table(ladder)
    cells, before = [], None
    for rung, arm, *rest in rows:
        first = "" if rung == before else escape(rung)
        before = rung
        cells.append([first, f"{swatch(styles[arm])}{escape(arm)}", *(_cell(text) for text in rest)])
    return (
        table(head, shapes, "arms", "Models and data of the rungs")
        + "<h3>Results</h3>"
        + table(list(map(escape, header)), cells, "arms rungs", "Losses, gaps and multipliers of the rungs")
    )


def _cell(text: str) -> str:
    """An escaped cell; text that qualifies its number goes below the number."""
    for mark in (" [", " (", " ±"):
        number, found, rest = text.partition(mark)
        if found:
            number, rest = (part.replace("-", "−") for part in (number, rest))
            return f"{escape(number)}<small>{escape(mark.strip() + rest)}</small>"
    return escape(text.replace("-", "−") if text[:1] in "-+" else text)


def _law(ladder: Ladder, styles: Styles) -> str:
    forms = {"E": "{:.3f}", "A": "{:.3g}", "a": "{:.3f}", "B": "{:.3g}", "b": "{:.3f}"}
    rows = []
    for arm, entry in ladder["arms"].items():
        # With a law of all sizes, from more rungs, those of single sizes are not needed.
        for size, law in [("all", entry["law"])] if entry["law"] else entry["size_laws"].items():
            if law is not None:
                cells = [_small(with_interval(law[name], form)) for name, form in forms.items()]
                if size != "all":
                    cells[1] = cells[2] = "–"
                rows.append([f"{swatch(styles[arm])}{escape(arm)}", escape(size), *cells])
    if not rows:
        return ""
    text = (
        "<p>L(N, D) = E + A / N<sup>a</sup> + B / D<sup>b</sup>: N parameters in the blocks, D tokens, L nats per "
        "token. It is fitted to the final loss of every run by least squares of log L with a Huber loss (δ = 0.001), "
        "as in Hoffmann et al. 2022, <i>approach 3</i>. For a single size, E includes the term of the parameters. "
        "Intervals hold 95 % of 100 bootstrap replicates over rungs and seeds. Few rungs determine E, A and B only "
        "roughly, and their errors depend on each other: trust the losses between the rungs more than the parameters, "
        "and nothing far beyond the rungs.</p>"
    )
    return text + table(["arm", "size", *forms], rows, "arms", "Parameters of the laws")


def _sweeps(ladder: Ladder) -> str:
    """Loss of each trial, one row for each sweep and arm, the best in bold."""
    html = ""
    for sweep in ladder["sweeps"]:
        head, rows = [], []
        for arm, entry in sweep["arms"].items():
            head = [
                ", ".join(f"{name} {value}" for name, value in trial["settings"].items()) for trial in entry["trials"]
            ]
            cells = []
            for trial in entry["trials"]:
                loss = "diverged" if trial["loss"] is None else f"{trial['loss']:.4f}"
                cells.append(f"<strong>{loss}</strong>" if trial["settings"] == entry["best"] else loss)
            edge = f" (best {escape(', '.join(entry['edges']))} at the edge)" if entry["edges"] else ""
            rows.append([escape(arm) + edge, *cells])
        html += f"<h3>{escape(sweep['rung'])}</h3>" + table(
            ["chosen", *map(escape, head)], rows, "arms", f"Settings tried at {sweep['rung']}"
        )
    text = (
        "<p>At these rungs every arm was tried with every setting below, with one seed. The rung, and those of its "
        "size without a sweep of their own, use the setting with the lowest validation loss (bold).</p>"
    )
    return html and text + html


_TERMS = """<dl class="terms">
<dt>Rung</dt><dd>A size of model, named by the parameters in its blocks (embeddings, norms and biases not counted), and
a number of tokens it is trained on. Each rung has its own runs, whose learning rate decays until their end. A longer
run has a higher loss at the same number of tokens, as it has not decayed yet.</dd>
<dt>Gap</dt><dd>The baseline's final loss minus the arm's, over the seeds that both have.</dd>
<dt>Step speed-up</dt><dd>Within the rung: the baseline's steps divided by the steps until the arm has the baseline's
final loss. The arm's learning rate has not decayed there, so the true speed-up is higher.</dd>
<dt>Data multiplier</dt><dd>Factor by which the baseline of the same size, with its own decay, needs more tokens for the
arm's final loss. It is computed from the baseline's law, shifted so that it goes through the baseline's loss at the
rung.</dd>
<dt>Compute multiplier</dt><dd>The data multiplier times the arm's tokens per second divided by the baseline's
("throughput"). Of each, the fastest run at that size counts, because other work on the machine can only slow a run
down. Above 1, the arm saves compute.</dd>
<dt>Trend</dt><dd>Least squares of log multiplier over log parameters and log tokens, over all rungs. A fit over compute
alone would not separate the two: a lead that shrinks with more tokens could seem to last because larger models are
among the rungs.</dd>
<dt>Retention</dt><dd>10 to the power of the slope of log10 gap over log10 tokens, with a separate level for each size:
gap(10 D) / gap(D).</dd> </dl>"""


def write_ladder(
    folder: str | Path, baseline: str | None = None, out: str | Path | None = None, replicates: int = 100
) -> dict[str, Any]:
    """Write ladder.json, ladder.csv and report.html for the rungs in `folder`, into it or into `out`.

    `replicates` is the number of bootstrap replicates. Returns the content of ladder.json. Raises UserError: see
    `read_ladder`.
    """
    folder = Path(folder)
    place = Path(out) if out is not None else folder
    rungs = read_ladder(folder, baseline)
    ladder = summarize_ladder(rungs, find_sweeps(folder), replicates)
    write_json(place / "ladder.json", ladder)
    write_atomically(place / "ladder.csv", ladder_csv(rungs))
    write_atomically(place / "report.html", render(rungs, ladder))
    return ladder
