"""Run folders of classifiers -> report.html: scores, curves, confusion, published results, examples, set-up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from waveletgpt.classify.long_range_arena import PUBLISHED, TASKS
from waveletgpt.classify.scores import (
    NAMES,
    best_arm,
    best_score,
    percent,
    score_curve,
    score_headline,
    score_sentence,
    score_table,
    summarize_scores,
)
from waveletgpt.report.charts import Axis, Drop, Line, chart, heat_map, heat_map_png, responsive, shorten, swatch
from waveletgpt.report.figures import Styles, figure, legend, mean_curve, schedule_figure
from waveletgpt.report.page import frame, inside, notes, rich, setup, shown, styles_of, table, tiles
from waveletgpt.report.reading import Record, read_records
from waveletgpt.report.records import ScoreSummary, baseline_arm
from waveletgpt.report.wording import duration
from waveletgpt.runs.folder import RunFolder, write_atomically


def write_score_report(out: Path, runs: Iterable[RunFolder], baseline: str | None = None) -> Path:
    """Write report.html into `out`, atomically, for classifiers' runs; return its path.

    Raises:
        UserError: if there is no run, or the runs cannot be compared.
    """
    records = read_records(runs)
    summary = summarize_scores(records, baseline)
    path = Path(out) / "report.html"
    write_atomically(path, render(records, summary))
    return path


def render(records: Sequence[Record], summary: ScoreSummary) -> str:
    """The page as text."""
    styles = styles_of(summary)
    pictures, troubles = inside(records, list(styles))
    predictions = {name: _predictions(records, name) for name in styles}
    sections = [
        ("curves", "Learning curves", _curves(records, summary, styles)),
        ("arms", "The arms in numbers", _arms(summary, styles)),
        ("published", "Published results", _published(summary)),
        ("confusion", "Confusion", _confusion(predictions)),
        ("mixing", "What is mixed", schedule_figure(records, styles) + pictures["mixing"]),
        ("kernels", "Kernels", pictures["kernels"]),
        ("examples", "Examples", _examples(records, predictions, styles)),
        ("setup", "Set-up", setup(records, summary)),
        ("terms", "How the numbers are defined", _TERMS),
    ]
    facts = [summary["data"].get("name"), summary["data"].get("modality"), summary["recipe"].get("architecture")]
    told = (summary["baseline"], best_arm(summary))
    others = [name for name, arm in summary["arms"].items() if name not in told and arm["seeds"]]
    header = "\n".join(
        [
            f'<p class="brand"><b>WaveletGPT</b> · {escape(" · ".join(str(f) for f in facts if f))}</p>',
            f"<h1>{rich(score_headline(summary))}</h1>",
            f'<ul class="others">{"".join(f"<li>{rich(score_sentence(summary, n))}</li>" for n in others)}</ul>'
            if others
            else "",
            tiles(_tiles(summary)),
            notes([*summary["notes"], *troubles]),
        ]
    )
    title = f"WaveletGPT: {summary['data'].get('name') or 'run'}, {' vs '.join(styles)}"
    return frame(title, header, sections, summary, len(records))


def _tiles(summary: ScoreSummary) -> list[tuple[str, str, str]]:
    arms, base = summary["arms"], baseline_arm(summary)
    arm = arms[best_arm(summary)]
    if arm["test"]["mean"] is None:
        return []
    measure = NAMES[summary["score"]]
    found = [
        (measure.capitalize(), f"{100 * arm['test']['mean']:.1f} %", f"baseline {percent(base.get('test') or {})} %")
    ]
    difference = arm.get("test_difference") or {}
    if difference.get("mean") is not None:
        ci = difference["ci95"]
        doubt = "one seed: no interval" if ci is None else f"95 % interval ±{100 * ci:.1f} over seeds"
        found.append(("Points", percent({"mean": difference["mean"]}, sign=True).replace("-", "−"), doubt))
        step = arm["same_performance_step"]["mean"]
        if not arm["step_speedup"]:
            value = "never" if step is None else f"{step:.0f}"
            found.append(("Same-accuracy step", value, f"of {summary['steps']} steps"))
        else:
            found.append(("Step speed-up", f"{arm['step_speedup']:.2f}×", f"{step:.0f} of {summary['steps']} steps"))
            if arm["time_speedup"] is not None:
                time = f"{duration(arm['same_performance_seconds'])} of {duration(base['seconds'])}"
                found.append(("Time speed-up", f"{arm['time_speedup']:.2f}×", time))
    return found


def _lines(
    records: Sequence[Record], styles: Styles, curve: Callable[[Record], list[tuple[float, float]]]
) -> list[Line]:
    lines = []
    for name, style in styles.items():
        curves = [curve(r) for r in records if r.arm == name and r.usable and curve(r)]
        if len(curves) > 1:
            lines += [Line(points, style, kind="seed") for points in curves]
        if curves:
            middle = mean_curve([[(x, 0.0, y) for x, y in points] for points in curves])
            lines.append(Line([(x, y) for x, _, y in middle], style, name))
    return lines


def _curves(records: Sequence[Record], summary: ScoreSummary, styles: Styles) -> str:
    """Score and loss on validation examples over steps, with a line at the baseline's best score."""
    html = ""
    measure = NAMES[summary["score"]]
    by_step = _lines(records, styles, lambda r: [(s, 100 * v) for s, v in score_curve(r)])
    if not by_step:
        return ""
    end = max(p[0] for line in by_step for p in line.points) or 1.0
    values = [p[1] for line in by_step for p in line.points]
    pad = 0.06 * (max(values) - min(values)) or 1.0
    base = [best_score(r) for r in records if r.arm == summary["baseline"] and r.usable]
    level, drops = None, []
    if base and len(styles) > 1:
        best = 100 * sum(base) / len(base)
        level = (best, f"best of {shorten(str(summary['baseline']), 24)}: {best:.1f} %")
        for name, arm in summary["arms"].items():
            step = (arm.get("same_performance_step") or {}).get("mean")
            if step is not None:
                # An arm that is there before the first step has no ratio.
                ratio = f" ({arm['step_speedup']:.2f}x)" if arm["step_speedup"] else ""
                drops.append(Drop(step, styles[name], f"{shorten(name, 18)}: {step:.0f}{ratio}"))
    y = Axis(f"{measure}, %", max(0.0, min(values) - pad), min(100.0, max(values) + pad))
    drawing = responsive(
        lambda width: chart(by_step, width, Axis("training step", 0, end), y, level=level, drops=drops,
                            name=f"{measure} on validation examples against training steps")
    )  # fmt: skip
    key = legend(styles) if len(styles) > 1 else ""
    seeds = " Thin lines: one seed each; bold: their mean." if any(line.kind == "seed" for line in by_step) else ""
    vertical = " Vertical lines: where each arm reaches the baseline's best." if level else ""
    words = f"{measure.capitalize()} on validation examples by training step.{vertical}{seeds}"
    html += figure(drawing, words, key)
    losses = _lines(records, styles, lambda r: r.losses)
    values = [p[1] for line in losses for p in line.points]
    pad = 0.06 * (max(values) - min(values)) or 0.1
    drawing = responsive(
        lambda width: chart(losses, width, Axis("training step", 0, end),
                            Axis("validation loss, nats per example", min(values) - pad, max(values) + pad),
                            height=280, name="Validation loss against training steps")
    )  # fmt: skip
    return html + figure(drawing, "Validation loss on the same examples.", key)


def _arms(summary: ScoreSummary, styles: Styles) -> str:
    head, rows = score_table(summary)
    keep = [i for i in range(len(head)) if i == 0 or any(row[i] not in ("", "–") for row in rows)]
    cells = [
        [
            f"{swatch(styles[row[0]])}<span>{escape(row[0])}</span>",
            *(escape(row[i].replace("-", "−")) for i in keep[1:]),
        ]
        for row in rows
    ]
    html = table([head[i] for i in keep], cells, "arms", "Numbers of every arm")
    per_seed = "; ".join(
        f"`{name}` " + ", ".join("–" if v is None else f"{100 * v:.1f}" for v in arm["test"]["per_seed"])
        for name, arm in summary["arms"].items()
        if len(arm["seeds"]) > 1
    )
    return html + (f'<p class="small">Test score by seed, in percent: {rich(per_seed)}.</p>' if per_seed else "")


def _published(summary: ScoreSummary) -> str:
    """Published results on the full benchmark beside this page's arms."""
    data = summary["data"]
    task = str(data.get("name"))
    if task not in TASKS or data.get("modality") != TASKS[task].modality:
        return ""
    source = escape(str((data.get("source") or {}).get("name") or task))
    sizes = ", ".join(f"{escape(k)} {v['examples']:,}" for k, v in (data.get("splits") or {}).items())
    here = f"this page: {source}, {sizes} examples of at most {data.get('max_length'):,} tokens"
    rows = []
    for row in PUBLISHED:
        score = row.accuracies[task]
        value = "fails (chance)" if score is None else f"{score:.2f}"
        rows.append([escape(row.name), value, escape(f"{row.protocol}; {row.source}")])
    rows += [[f"<b>{escape(n)}</b>", percent(arm["test"]), here] for n, arm in summary["arms"].items() if arm["seeds"]]
    text = (
        "<p>Accuracy on the test split in percent. Rows of different scale or protocol (last column) cannot be ranked "
        "against each other.</p>"
    )
    return text + table(["model", "accuracy, %", "protocol and scale"], rows, "key", "Published results")


def _predictions(records: Sequence[Record], name: str) -> tuple[Record, dict[str, Any]] | None:
    """predictions.json of the first seed of an arm that has a complete one."""
    for record in records:
        if record.arm == name and record.usable:
            try:
                value = json.loads((record.path / "predictions.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if _is_whole(value):
                return record, value
    return None


def _is_whole(value: Any) -> bool:
    try:
        told = all(example["said"][0][0] and example["truth"] is not None for example in value["examples"])
        return told and len(value.get("confusion") or value["classes"]) == len(value["classes"])
    except (TypeError, KeyError, IndexError, AttributeError):
        return False


def _confusion(predictions: dict[str, Any]) -> str:
    import numpy as np

    panels = ""
    for name, found in predictions.items():
        if found is None or not found[1].get("confusion"):
            continue
        counts = np.asarray(found[1]["confusion"], dtype=float)
        classes = [str(c) for c in found[1]["classes"]]
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        if len(classes) <= 12:
            head = ["true \\ said", *map(escape, classes)]
            rows = [
                [
                    escape(classes[i]),
                    *(f'<span style="opacity:{0.35 + 0.65 * v:.2f}">{100 * v:.0f}</span>' for v in row),
                ]
                for i, row in enumerate(shares)
            ]
            body = table(head, rows, "key", f"Confusion of {name}")
        else:
            size = len(classes)
            body = heat_map(
                heat_map_png(shares, 1.0),
                size,
                size,
                [],
                title=f"{size} classes, from 0 (top) to {size - 1} (bottom)",
                name=f"Confusion of {name}",
                across="the model's answer",
            )
            numbered = ", ".join(f"{i} {escape(label)}" for i, label in enumerate(classes))
            body += f'<details><summary>Classes</summary><p class="small">{numbered}</p></details>'
        panels += f"<div><h3>{escape(name)}, seed {found[0].seed}</h3>{body}</div>"
    intro = "<p>Percent of the examples of each class (row) that the model assigns to each class (column).</p>"
    return panels and f'{intro}<div class="pair">{panels}</div>'


def _examples(records: Sequence[Record], predictions: dict[str, Any], styles: Styles) -> str:
    """The same examples with every arm's answers."""
    arms = {name: found for name, found in predictions.items() if found is not None}
    first = next(iter(arms.values()), None)
    if first is None:
        return ""
    html = ""
    for k, example in enumerate(first[1].get("examples") or []):
        said = ""
        for name, (_, value) in arms.items():
            examples = value.get("examples") or []
            if k < len(examples):
                guesses = ", ".join(f"{escape(str(c))} {100 * p:.0f} %" for c, p in examples[k]["said"])
                right = examples[k]["said"][0][0] in examples[k]["truth"]
                said += f'<p class="small">{swatch(styles[name])}{escape(name)}: {guesses} {"✓" if right else "✗"}</p>'
        truth = escape(", ".join(map(str, example["truth"])) or "none")
        html += f'<article class="sample"><h4>{truth}</h4>{shown(first[0].path, example)}{said}</article>'
    where = escape(str(first[1].get("split")))
    return html and f'<p>From the {where} split; title: the true class.</p><div class="samples">{html}</div>'


_TERMS = """<dl class="terms">
<dt>Test</dt><dd>Share of right answers (or mean average precision, if examples have several classes) of the last model
on the test split, which is used once, at the end. If recordings are cut into pieces, the probabilities of the pieces
are averaged first.</dd>
<dt>Validation, best</dt><dd>The highest score of any evaluation during training, on validation examples that are the
same for all arms.</dd>
<dt>Same-accuracy step</dt><dd>The first step at which an arm's validation score is at or above the best score that the
baseline with the same seed had at any evaluation, linearly interpolated between evaluations. The mean over seeds exists
only if every seed reaches it.</dd>
<dt>Speed-ups</dt><dd>The baseline's steps divided by that step; the same in training seconds, at each run's mean
seconds per step.</dd>
<dt>±</dt><dd>Sample standard deviation over seeds; there is none with one seed. The 95 % interval is Student's t over
the differences to the baseline with the same seed.</dd>
</dl>"""
