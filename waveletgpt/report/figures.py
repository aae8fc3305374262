"""Figures of the report, from records and their summary. Each function returns HTML, or "" without anything to show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from html import escape

from waveletgpt.report.charts import (
    HALF,
    Axis,
    Drop,
    Line,
    Point,
    chart,
    heat_map,
    heat_map_png,
    responsive,
    shorten,
    swatch,
)
from waveletgpt.report.probing import Insight, Kernel, Mixed, frequency_response
from waveletgpt.report.reading import Record, interpolate
from waveletgpt.report.records import LossArm, LossSummary, baseline_arm
from waveletgpt.report.wording import duration
from waveletgpt.runs.records import LossAtPositions, ModelRecord, NearAttention

Styles = dict[str, int]
# (step, training seconds, loss)
Curve = Sequence[tuple[float, float, float]]


def figure(drawing: str, caption: str, legend: str = "") -> str:
    """A drawing with its caption (HTML) and, on phones, the legend of its lines."""
    return f"<figure>{legend}{drawing}<figcaption>{caption}</figcaption></figure>" if drawing else ""


def legend(styles: Styles) -> str:
    items = "".join(f"<li>{swatch(style)}{escape(name)}</li>" for name, style in styles.items())
    return f'<ul class="legend narrow">{items}</ul>'


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float, float]]:
    """Mean over seeds at the steps of the first curve, as far as all curves go."""
    if len(curves) == 1:
        return list(curves[0])
    out = []
    for step, _, _ in curves[0]:
        seconds = [v for c in curves if (v := interpolate([(s, t) for s, t, _ in c], step)) is not None]
        losses = [v for c in curves if (v := interpolate([(s, loss) for s, _, loss in c], step)) is not None]
        if len(seconds) == len(losses) == len(curves):
            out.append((step, statistics.fmean(seconds), statistics.fmean(losses)))
    return out


def paced(record: Record) -> list[tuple[float, float, float]]:
    """The curve with the run's mean seconds for every step, as the time speed-up counts them."""
    pace = record.seconds / record.steps if record.steps and math.isfinite(record.seconds) else 0.0
    return [(step, step * pace, loss) for step, _, loss in record.curve]


def _loss_lines(records: Sequence[Record], styles: Styles, pick: Callable[[tuple], Point]) -> list[Line]:
    lines = []
    for name, style in styles.items():
        group = [r for r in records if r.arm == name and r.curve]
        counted = [paced(r) for r in group if r.usable]
        if len(counted) > 1:
            lines += [Line([pick(p) for p in curve], style, kind="seed") for curve in counted]
        if counted:
            lines.append(Line([pick(p) for p in mean_curve(counted)], style, name))
        for record in group:
            if not record.usable:
                label = "" if counted else name
                lines.append(Line([pick(p) for p in paced(record)], style, label, "broken"))
    return lines


def loss_range(lines: Sequence[Line]) -> tuple[float, float]:
    """Limits for the part where arms differ; the steep fall at the very start lies above the frame."""
    # Runs that stopped early count only if there are no others.
    lines = [line for line in lines if line.kind != "broken"] or lines
    end = max((p[0] for line in lines for p in line.points), default=1.0)
    finite = [[p for p in line.points if math.isfinite(p[1])] for line in lines]
    lows = [min(y for _, y in points) for points in finite if points]
    if not lows:
        return 0.0, 1.0
    early = [next((y for x, y in points if x >= 0.07 * end), points[-1][1]) for points in finite if points]
    low = min(lows)
    # A run that diverged must not make the other curves flat.
    high = min(max(early), low + 3 * (statistics.median(early) - low) + 1e-3)
    pad = 0.06 * (high - low) if high - low > 1e-2 else 0.1
    return low - pad, high + pad


def loss_figures(records: Sequence[Record], summary: LossSummary, styles: Styles) -> str:
    """Validation loss over steps and over training seconds, with the same-performance lines."""
    by_step = _loss_lines(records, styles, lambda p: (p[0], p[2]))
    if not by_step:
        return ""
    base = baseline_arm(summary)
    target = (base.get("final_nll") or {}).get("mean")
    level = None
    if target is not None and len(styles) > 1:
        level = (float(target), f"final loss of {shorten(str(summary['baseline']), 24)}: {target:.3f}")
    compared = level is not None
    low, high = loss_range(by_step)
    y = Axis("validation loss, nats per token", low, high)
    said = ", ".join(
        f"{name} ends at {arm['final_nll']['mean']:.3f}"
        for name, arm in summary["arms"].items()
        if arm["final_nll"]["mean"] is not None
    )
    seeds = "Thin lines: one seed each; bold: their mean. " if any(line.kind == "seed" for line in by_step) else ""
    crosses = (
        "A cross ends a run that stopped early and does not count. "
        if any(line.kind == "broken" for line in by_step)
        else ""
    )
    cut = "The first steps, above the frame, are cut off. " if any(
        p[1] > high for line in by_step for p in line.points
    ) else ""  # fmt: skip
    vertical = "Vertical lines: where each arm reaches the baseline's final loss. " if compared else ""

    def drops(key: Callable[[LossArm], float | None], text: Callable[[LossArm], str]) -> list[Drop]:
        found = []
        for name, arm in summary["arms"].items():
            at = key(arm) if compared and name != summary["baseline"] else None
            if at is not None:
                found.append(Drop(at, styles[name], f"{shorten(name, 18)}: {text(arm)}"))
        return found

    step_drops = drops(
        lambda arm: arm["same_performance_step"]["mean"],
        lambda arm: (
            f"{arm['same_performance_step']['mean']:.0f}"
            + (f" ({arm['step_speedup']:.2f}x)" if arm["step_speedup"] else "")
        ),
    )
    end = max((p[0] for line in by_step for p in line.points), default=1.0)
    steps = responsive(
        lambda width: chart(by_step, width, Axis("training step", 0, end or 1), y, level=level, drops=step_drops,
                            name=f"Validation loss against training steps: {said}.")
    )  # fmt: skip
    longest = max((p[1] for r in records for p in paced(r)), default=1.0)
    unit, size = ("s", 1.0) if longest < 120 else ("min", 60.0) if longest < 7200 else ("h", 3600.0)
    by_time = _loss_lines(records, styles, lambda p: (p[1] / size, p[2]))
    time_drops = drops(
        lambda arm: None if arm["time_speedup"] is None else arm["same_performance_seconds"] / size,
        lambda arm: f"{duration(arm['same_performance_seconds'])} ({arm['time_speedup']:.2f}x)",
    )
    times = responsive(
        lambda width: chart(by_time, width, Axis(f"training time, {unit}", 0, longest / size or 1), y, level=level,
                            drops=time_drops, name=f"Validation loss against training time in {unit}: {said}.")
    )  # fmt: skip
    key = legend(styles) if len(styles) > 1 else ""
    return figure(steps, f"Validation loss by training step. {vertical}{seeds}{crosses}{cut}", key) + figure(
        times,
        "The same by training time, at each run's mean speed, without evaluation, saving and sampling.",
        key,
    )


def difference_figure(records: Sequence[Record], summary: LossSummary, styles: Styles) -> str:
    """Loss of every arm minus the baseline's with the same seed at the same step."""
    base = {r.seed: r for r in records if r.arm == summary["baseline"] and r.usable}
    lines = []
    for name, style in styles.items():
        curves: list[list[tuple[float, float, float]]] = []
        for record in records:
            if record.arm == name and record.usable and record.seed in base and name != summary["baseline"]:
                reference = base[record.seed].losses
                pairs = [(s, loss, interpolate(reference, s)) for s, loss in record.losses]
                curves.append([(s, 0.0, loss - other) for s, loss, other in pairs if other is not None])
        curves = [curve for curve in curves if curve]
        if len(curves) > 1:
            lines += [Line([(s, d) for s, _, d in curve], style, kind="seed") for curve in curves]
        if curves:
            lines.append(Line([(s, d) for s, _, d in mean_curve(curves)], style, name))
    if not lines:
        return ""
    end = max(p[0] for line in lines for p in line.points) or 1.0
    late = [y for line in lines for x, y in line.points if x >= 0.02 * end and math.isfinite(y)] or [0.0]
    low, high = min(0.0, *late), max(0.0, *late)
    pad = 0.06 * (high - low) or 0.1
    drawing = responsive(
        lambda width: chart(lines, width, Axis("training step", 0, end),
                            Axis("loss minus the baseline's, nats per token", low - pad, high + pad),
                            height=270 if width > 500 else 240, level=(0.0, ""),
                            name="Loss of each arm minus the baseline's loss at the same step")
    )  # fmt: skip
    caption = "Difference to the baseline of the same seed at the same step: below zero is better."
    return figure(drawing, caption, legend({n: s for n, s in styles.items() if n != summary["baseline"]}))


def breakdown_figures(summary: LossSummary, styles: Styles) -> str:
    """For every arm: its loss by position in the context, and the share of attention to near tokens in each block."""
    base = baseline_arm(summary).get("breakdown") if len(styles) > 1 else None
    charts = ""
    for name, style in styles.items():
        found = (summary["arms"].get(name) or {}).get("breakdown")
        if not found:
            continue
        theirs = base if base and name != summary["baseline"] else None
        charts += _position_chart(name, style, found["positions"], theirs["positions"] if theirs else None)
        near = found["near_attention"]
        if near:
            lines = [Line(_by_block(near), style, name, "taps")]
            if theirs and theirs["near_attention"]:
                lines.insert(0, Line(_by_block(theirs["near_attention"]), 0, str(summary["baseline"]), "taps"))
            most = max(len(line.points) for line in lines)
            ticks = [(float(b), str(b)) for b in range(1, most + 1, max(1, math.ceil(most / 8)))]
            charts += chart(lines, HALF, Axis("block", 0.8, most + 0.2, ticks),
                            Axis(f"{shorten(name, 24)}: attention within 2 tokens", 0, 1), height=210,
                            name=f"Share of attention within 2 tokens by block of {name}")  # fmt: skip
    if not charts:
        return ""
    key = "".join(f"<li>{swatch(style)}{escape(name)}</li>" for name, style in styles.items())
    left = "the loss by the number of tokens of context" + (
        "; for the other arms, their loss minus the baseline's (below zero is better)" if base else ""
    )
    return figure(
        f'<ul class="legend">{key}</ul><div class="multiples">{charts}</div>',
        f"Left of each pair: {left}. Right: share of each block's attention that goes to the token itself and the two "
        "before it, mean over heads and over the later half of a few windows.",
    )


def _by_block(near: NearAttention) -> list[Point]:
    return [(float(block), share) for block, share in enumerate(near["by_block"], 1)]


def _position_chart(
    arm: str, style: int, places: Sequence[LossAtPositions], base: Sequence[LossAtPositions] | None
) -> str:
    """Loss of an arm, or its difference to the baseline's, in each bin of positions, drawn at the bin's middle."""
    points = [
        (math.log2(math.sqrt(place["first"] * place["last"])), place["nll"] - (base[i]["nll"] if base else 0.0))
        for i, place in enumerate(places)
        if place["nll"] is not None and (base is None or base[i]["nll"] is not None)
    ]
    if not points:
        return ""
    values = [y for _, y in points]
    low, high = min(values + [0.0] * bool(base)), max(values + [0.0] * bool(base))
    pad = 0.08 * (high - low) or 0.1
    last = places[-1]["last"]
    every = max(1, math.ceil(math.log2(last) / 8)) if last > 1 else 1
    ticks = [(float(k), f"{2**k:,}") for k in range(0, int(math.log2(last)) + 1, every)]
    what = "loss minus the baseline's" if base else "loss, nats per token"
    return chart([Line(points, style, arm, "taps")], HALF, Axis("tokens of context", -0.2, math.log2(last) + 0.2,
    ticks),
                 Axis(f"{shorten(arm, 24)}: {what}", low - pad, high + pad), height=210,
                 level=(0.0, "") if base else None,
                 name=f"{what} by position, {arm}: " + ", ".join(f"{2**x:.0f} {y:.3f}" for x, y in points))  # fmt: skip


def schedule_figure(records: Sequence[Record], styles: Styles) -> str:
    """Window of every channel; arms with the same windows share a line."""
    found: dict[tuple[int, ...], list[str]] = {}
    width_of = 1
    for name in styles:
        models = [r.info.get("model") for r in records if r.arm == name]
        model: ModelRecord = (models[0] if models else None) or {}
        windows = tuple(int(w) for w in model.get("windows") or ())
        if windows and min(windows) >= 1:
            found.setdefault(windows, []).append(name)
            width_of = max(width_of, int(model.get("mix_width") or model.get("n_embd") or len(windows)), len(windows))
    if not found:
        return ""
    lines = []
    for windows, names in found.items():
        points: list[Point] = []
        for j, window in enumerate([*windows, *([1] * (width_of - len(windows)))]):
            points += [(j, math.log2(window)), (j + 1, math.log2(window))]
        corners = [p for i, p in enumerate(points) if i in (0, len(points) - 1)
                   or not points[i - 1][1] == p[1] == points[i + 1][1]]  # fmt: skip
        lines.append(Line(corners, styles[names[0]], ", ".join(names), "plain"))
    top = max(1, math.ceil(max(math.log2(max(w)) for w in found)))
    ticks = [(float(k), f"{2**k:,}") for k in range(0, top + 1, 1 if top <= 10 else 2)]
    text = "; ".join(f"{', '.join(names)}: {min(w)} to {max(w)}" for w, names in found.items())
    drawing = responsive(
        lambda width: chart(lines, width, Axis("channel", 0, width_of),
                            Axis("window, tokens", -0.15, top + 0.15, ticks), height=260,
                            name=f"Window of every mixed channel, in tokens: {text}")
    )  # fmt: skip
    key = legend({", ".join(names): styles[names[0]] for names in found.values()})
    return figure(
        drawing,
        "Window of each channel (of one head, where heads are mixed); 1 means that the channel is not mixed.",
        key,
    )


def embedding_figure(arm: str, insight: Insight) -> str:
    """The paper's Figure 3: one block's output on the probe, before and after mixing."""
    import numpy as np

    if insight.mixed is None:
        return ""
    mixed = insight.mixed
    before, after = mixed.before[:256].T, mixed.after[:256].T
    every = max(1, math.ceil(before.shape[0] / 256))
    before, after = before[::every], after[::every]
    # Channels differ in size by orders of magnitude: scale each by its standard deviation before mixing.
    center, size = before.mean(1, keepdims=True), before.std(1, keepdims=True)
    before, after = ((values - center) / np.maximum(size, 1e-12) for values in (before, after))
    rows, columns = before.shape
    panels = "".join(
        heat_map(heat_map_png(values, 2.5), rows, columns, _bands(mixed, every, rows), title=title,
                 name=f"{title} of {mixed.place} of {arm}: {rows} channels by {columns} tokens")
        for title, values in (("before mixing", before), ("after mixing", after))
    )  # fmt: skip
    stride = f" Every {every}th channel." if every > 1 else ""
    excerpt = f" Text: <q>{escape(shorten(insight.text, 160))}</q>" if insight.text else ""
    return figure(
        f'<div class="pair">{panels}</div>',
        f"<b>{escape(arm)}</b>, {mixed.place}: every row is one channel, every column "
        "a token of a validation excerpt. In both pictures red is above and blue below the channel's mean before "
        "mixing; colours are full at 2.5 of its standard deviations. At the right: the window of the rows."
        f"{stride}{excerpt}",
    )


def _bands(mixed: Mixed, every: int, rows: int) -> list[tuple[int, int, str]]:
    """Rows with the same window: (first, last + 1, label)."""
    if not mixed.windows:
        end = -(-mixed.n_mixed // every)
        bands = [(0, end, "mixed")]
    else:
        labels = [f"w={w}" for w in mixed.windows[::every]]
        starts = [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1]]
        bands = [(a, b, labels[a]) for a, b in zip(starts, [*starts[1:], len(labels)], strict=True)]
    return bands if bands[-1][1] >= rows else [*bands, (bands[-1][1], rows, "as is")]


def kernel_figures(arm: str, kernels: Sequence[Kernel]) -> str:
    """Impulse and frequency responses of kernels against the mean of the same length."""
    import numpy as np

    if not kernels:
        return ""
    windows = sorted({k.window for k in kernels})
    windows = sorted({windows[0], windows[len(windows) // 2], windows[-1]})
    labels = list(dict.fromkeys(k.label for k in kernels))
    labels = list(dict.fromkeys([labels[0], labels[len(labels) // 2], labels[-1]]))
    charts = []
    for window in windows:
        shown = [("mean (Haar)", 0, np.full(window, 1 / window))]
        for style, label in enumerate(labels, 1):
            taps = [k.taps for k in kernels if k.label == label and k.window == window]
            shown += [(label, style, np.asarray(taps[0], dtype=float))] if taps else []
        impulse = [Line(list(zip(map(float, range(window)), map(float, taps), strict=True)), style, label,
                        "taps" if window <= 16 else "fine")
                   for label, style, taps in shown]  # fmt: skip
        values = [y for line in impulse for _, y in line.points]
        low, high = min(0.0, *values), max(0.0, *values)
        pad = 0.08 * (high - low or 1)
        steps = [0, window // 2, window - 1] if window > 2 else [0, 1]
        charts.append(
            chart(impulse, HALF, Axis("tokens ago", 0, window - 1 or 1, [(s, str(s)) for s in steps]),
                  Axis(f"window {window}: weight", low - pad, high + pad), height=230,
                  name=f"Impulse response of kernels with window {window}")
        )  # fmt: skip
        octaves = np.linspace(math.log2(1 / (4 * window)), -1, 120)
        response = [
            Line(list(zip(octaves.tolist(), gains.tolist(), strict=True)), style, label, "fine")
            for label, style, taps in shown
            for gains in [frequency_response(taps, octaves)]
        ]
        slowest = int(math.log2(4 * window))
        marks = [(-float(k), f"1/{2**k}") for k in range(slowest, 0, -max(1, math.ceil(slowest / 5)))]
        peak = max(0.0, *(y for line in response for _, y in line.points))
        charts.append(
            chart(response, HALF, Axis("cycles per token", -slowest, -1, marks),
                  Axis(f"window {window}: response, dB", -50, peak + 3), height=230,
                  name=f"Frequency response of kernels with window {window}")
        )  # fmt: skip
    key = "".join(f"<li>{swatch(style)}{escape(label)}</li>" for style, label in enumerate(["mean (Haar)", *labels]))
    learned = " If every channel has its own kernel, that of the middle channel of its window is drawn."
    return figure(
        f'<ul class="legend">{key}</ul><div class="multiples">{"".join(charts)}</div>',
        f"<b>{escape(arm)}</b>: kernels against the plain mean of the same length. Left of each pair: weight of each "
        "past token; right: the filter's gain by frequency." + (learned if kernels[0].learned else ""),
    )
