"""Run folders -> report.html: one self-contained page with the result, the curves, the models' insides and the set-up.

The page loads nothing and runs no script (its Content-Security-Policy forbids both). Every string from a recipe, the
data or a sample is escaped.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from waveletgpt.report.charts import swatch
from waveletgpt.report.figures import (
    breakdown_figures,
    difference_figure,
    embedding_figure,
    kernel_figures,
    loss_figures,
    schedule_figure,
)
from waveletgpt.report.reading import Record, flatten, read_records, settings_of
from waveletgpt.report.records import LossArm, LossSummary, Summary, baseline_arm
from waveletgpt.report.summary import summarize_records, with_sweep
from waveletgpt.report.wording import (
    TABLE_HEADER,
    arm_sentence,
    breakdown_table,
    duration,
    gap_table,
    headline,
    headline_arm,
    plural,
    plus_minus,
    quantity,
    sources_table,
    summary_table,
)
from waveletgpt.runs.folder import RunFolder, write_atomically

_INSIGHTS = 4  # at most this many models are loaded and drawn: each costs seconds and about 150 kB


def write_report(out: Path, runs: Iterable[RunFolder], baseline: str | None = None) -> Path:
    """Write report.html into `out`, atomically, for one run or for a comparison; return its path.

    Args:
        runs: run folders in the order in which the arms are to appear.
        baseline: name of the arm to compare with. None takes the arm "none" if there are other arms too.

    Raises:
        UserError: if there is no run, or the runs cannot be compared.
    """
    records = read_records(runs)
    names = list(dict.fromkeys(record.arm for record in records))
    if baseline is None and len(names) > 1 and "none" in names:
        baseline = "none"
    summary = with_sweep(summarize_records(records, baseline), out)
    path = Path(out) / "report.html"
    write_atomically(path, render(records, summary))
    return path


def render(records: Sequence[Record], summary: LossSummary) -> str:
    """The page as text."""
    names = list(summary["arms"])
    styles = styles_of(summary)
    pictures, troubles = inside(records, names)
    sections = [
        ("curves", "Learning curves", _curves(records, summary, styles)),
        ("arms", "The arms in numbers", _arms(summary, styles)),
        ("breakdown", "Where the loss is", _breakdown(summary, styles)),
        ("sweep", "Settings tried", _sweep(summary)),
        ("mixing", "What is mixed", schedule_figure(records, styles) + pictures["mixing"]),
        ("kernels", "Kernels", pictures["kernels"]),
        ("samples", "Samples", _samples(records, styles)),
        ("setup", "Set-up", setup(records, summary)),
        ("terms", "How the numbers are defined", _TERMS),
    ]
    title = f"WaveletGPT: {summary['data'].get('name') or 'run'}, {' vs '.join(names)}"
    return frame(title, _header(records, summary, troubles), sections, summary, len(records))


def styles_of(summary: Mapping[str, Any]) -> dict[str, int]:
    """Style of every arm: grey for the baseline, then the palette in order."""
    names = list(summary["arms"])
    others = [name for name in names if name != summary["baseline"] or len(names) == 1]
    return {name: 1 + others.index(name) if name in others else 0 for name in names}


def frame(
    title: str,
    header: str,
    sections: Sequence[tuple[str, str, str]],
    summary: Mapping[str, Any],
    runs: int,
    files: str = "summary.json and curves.csv",
) -> str:
    """The page with a header and sections (key, title, HTML). Sections without content are left out."""
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections)
    template = Template(resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        header=header + f'<nav aria-label="Sections">{links}</nav>',
        main="".join(
            f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{heading}</h2>{body}</section>'
            for key, heading, body in sections
        ),
        footer=f"Written by waveletgpt {escape(str(summary['environment'].get('waveletgpt') or ''))} from "
        f"{plural(runs, 'run folder')}; {files} hold the numbers.",
    )


def rich(text: str) -> str:
    """Escaped text in which a `name` in backticks becomes code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _header(records: Sequence[Record], summary: LossSummary, troubles: Sequence[str]) -> str:
    recipe, data = summary["recipe"], summary["data"]
    model = [recipe["base_model"]] if recipe.get("base_model") else [recipe.get("architecture"), recipe.get("preset")]
    facts = [data.get("name"), data.get("modality"), *model]
    parts = [f'<p class="brand"><b>WaveletGPT</b> · {escape(" · ".join(str(f) for f in facts if f))}</p>']
    parts.append(f"<h1>{rich(headline(summary))}</h1>")
    told = (summary["baseline"], headline_arm(summary))
    others = [name for name, arm in summary["arms"].items() if name not in told and arm["seeds"]]
    if others:
        items = "".join(f"<li>{rich(arm_sentence(summary, name))}</li>" for name in others)
        parts.append(f'<ul class="others">{items}</ul>')
    parts.append(tiles(_tiles(summary)))
    parts.append(notes([*summary["notes"], *troubles]))
    return "\n".join(parts)


def notes(texts: Sequence[str]) -> str:
    """What a reader should know before trusting the rest."""
    items = "".join(f"<li>{rich(text)}</li>" for text in texts)
    return items and f'<aside class="notes"><b>What to keep in mind</b><ul>{items}</ul></aside>'


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """Big numbers: (what, value, small print)."""
    items = "".join(
        f"<div><dt>{escape(t)}</dt><dd>{escape(v)}<small>{escape(s)}</small></dd></div>" for t, v, s in values
    )
    return items and f'<dl class="tiles">{items}</dl>'


def _tiles(summary: LossSummary) -> list[tuple[str, str, str]]:
    """The main numbers of the arm in the headline, or of the only arm."""
    arms, name = summary["arms"], headline_arm(summary)
    arm, base = arms.get(name or "") or LossArm(), baseline_arm(summary)
    found: list[tuple[str, str, str]] = []
    difference = arm.get("final_nll_difference") or {}
    if difference.get("mean") is not None:
        step = arm["same_performance_step"]["mean"]
        if not arm["step_speedup"]:
            value = "never" if step is None else f"{step:.0f}"
            found.append(("Same-performance step", value, f"of {summary['steps']} steps"))
        else:
            found.append(("Step speed-up", f"{arm['step_speedup']:.2f}×", f"{step:.0f} of {summary['steps']} steps"))
        if arm["time_speedup"] is not None:
            time = f"{duration(arm['same_performance_seconds'])} of {duration(base['seconds'])}"
            found.append(("Time speed-up", f"{arm['time_speedup']:.2f}×", time))
        ci = difference["ci95"]
        doubt = "one seed: no interval" if ci is None else f"95 % interval ±{ci:.3f} over seeds"
        change = f"{difference['mean']:+.3f}".replace("-", "−")
        found.append(("Final loss", change, f"nats per token; {doubt}"))
        added, share = arm["extra_parameters"], _added_share(arm, base)
        found.append(("Parameters of mixing", quantity(added) if added else "0", share))
    elif len(arms) == 1 and arm.get("seeds"):
        found.append(("Final loss", plus_minus(arm["final_nll"]), "nats per token, validation"))
        if arm["bits_per_byte"] is not None:
            found.append(("Bits per byte", f"{arm['bits_per_byte']:.3f}", "validation"))
        found.append(("Parameters", quantity(arm["parameters"]), f"{quantity(arm['flops_per_token'])} FLOPs per token"))
        speed = arm["tokens_per_second"]
        found.append(("Training", duration(arm["seconds"]), "" if speed is None else f"{speed:,.0f} tokens per second"))
    return found


def _added_share(arm: LossArm, base: LossArm) -> str:
    ours, theirs = arm.get("flops_per_token"), base.get("flops_per_token")
    return f"{100 * (ours / theirs - 1):+.2g} % FLOPs per token" if ours and theirs else ""


def _curves(records: Sequence[Record], summary: LossSummary, styles: dict[str, int]) -> str:
    return loss_figures(records, summary, styles) + difference_figure(records, summary, styles) + _gaps(summary, styles)


def _gaps(summary: LossSummary, styles: dict[str, int]) -> str:
    """How each arm's lead changes during training; empty if nothing is compared."""
    header, rows = gap_table(summary)
    if not rows:
        return ""
    cells = [
        [f"{swatch(styles[row[0]])}{escape(row[0])}", *(cell.replace("-", "−") for cell in row[1:])] for row in rows
    ]
    return (
        '<p class="small">Loss of the baseline minus that of each arm at the same step, in nats per token, mean over '
        "seeds. If the lead shrinks, the arm has a head start and the baseline catches up.</p>"
        + table(header, cells, "arms", "Lead over the baseline during training")
    )


def _breakdown(summary: LossSummary, styles: dict[str, int]) -> str:
    """Loss by kind of token and by position, and attention to near tokens; empty for runs that did not record them."""
    header, rows = breakdown_table(summary)
    if not rows:
        return ""
    cells = [
        [
            f"{swatch(styles[row[0]])}{escape(row[0])}",
            row[1],
            *(re.sub(r" (\(.*)$", r"<small>\1</small>", cell.replace("-", "−")) for cell in row[2:]),
        ]
        for row in rows
    ]
    return (
        "<p>A token completes a seen pair if the same two tokens, the one before it and itself, occur earlier in the "
        "same window, so that a model can copy it from its context. In brackets: difference to the baseline.</p>"
        + table(header, cells, "arms", "Loss by kind of token")
        + _sources(summary, styles)
        + breakdown_figures(summary, styles)
    )


def _sources(summary: LossSummary, styles: dict[str, int]) -> str:
    header, rows = sources_table(summary)
    if not rows:
        return ""
    cells = [[f"{swatch(styles[arm])}{escape(arm)}", *(cell.replace("-", "−") for cell in row)] for arm, *row in rows]
    told = "<p>Loss on each source of the mixture:</p>"
    return told + table([escape(name) for name in header], cells, "arms", "Loss by source")


def _sweep(summary: LossSummary) -> str:
    """The settings that a sweep tried for each arm, with a note if the best is at the grid's edge; empty without a
    sweep."""
    found = summary.get("sweep")
    if not found:
        return ""
    rows, warnings = [], []
    for arm, entry in found["arms"].items():
        for trial in entry["trials"]:
            best = trial["settings"] == entry["best"]
            loss = "diverged" if trial["loss"] is None else f"{trial['loss']:.4f}"
            values = ", ".join(f"{name} {value}" for name, value in trial["settings"].items())
            rows.append([escape(arm) if best else "", escape(values), f"<strong>{loss}</strong>" if best else loss])
        if entry["edges"]:
            names = ", ".join(entry["edges"])
            warnings.append(
                f"`{arm}`: its best {names} is at the edge of the grid; a wider sweep may find a better one."
            )
    text = (
        f"Each arm was tried with every setting below for {found['steps']} steps with seed {found['seed']}. The "
        "comparison uses the setting with the lowest validation loss."
    )
    return f"<p>{text}</p>" + notes(warnings) + table(["arm", "settings", "loss"], rows, "arms", "Settings tried")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], css: str, label: str) -> str:
    """A table of HTML cells in a box that scrolls; the first cell of each row is its header."""
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label, quote=True)}"><table class="{css}">'
        f"<thead><tr>{header}</tr></thead><tbody>{_rows(rows)}</tbody></table></div>"
    )


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )


def _arms(summary: LossSummary, styles: dict[str, int]) -> str:
    _, rows = summary_table(summary)
    keep = [i for i in range(len(TABLE_HEADER)) if i == 0 or any(row[i] not in ("", "–") for row in rows)]
    cells = []
    for row in rows:
        name = f'{swatch(styles[row[0]])}<span title="{escape(row[0], quote=True)}">{escape(row[0])}</span>'
        # Text that qualifies a number goes below it, or the table gets too wide.
        others = [re.sub(r" ((\(|±|of ).*)$", r"<small>\1</small>", escape(row[i].replace("-", "−"))) for i in keep[1:]]
        cells.append([name, *others])
    html = table([TABLE_HEADER[i] for i in keep], cells, "arms", "Numbers of every arm")
    per_seed = "; ".join(
        f"`{name}` " + ", ".join(f"{loss:.4f}" for loss in arm["final_nll"]["per_seed"])
        for name, arm in summary["arms"].items()
        if len(arm["seeds"]) > 1
    )
    note = f'<p class="small">Final loss by seed: {rich(per_seed)}.</p>' if per_seed else ""
    return html + note


def inside(records: Sequence[Record], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Pictures that need the trained models. A model that cannot be loaded becomes a note; the report goes on."""
    html = {"mixing": "", "kernels": ""}
    troubles: list[str] = []
    looked = 0
    for name in names:
        record = next((r for r in records if r.arm == name and r.usable), None)
        mixing = str((record.info.get("recipe") or {}).get("mixing") or "") if record else "none"
        if record is None or mixing == "none" or looked == _INSIGHTS:
            continue
        looked += 1
        try:
            from waveletgpt.report.probing import look_inside

            insight = look_inside(RunFolder(record.path).model_path(), record.info.get("probe") or [])
        except Exception as error:  # a checkpoint may be broken in any way
            reason = str(error).strip().splitlines() or [type(error).__name__]
            troubles.append(f"The model of `{name}` could not be loaded and drawn: {reason[0][:300]}")
            continue
        html["mixing"] += embedding_figure(name, insight)
        html["kernels"] += kernel_figures(name, insight.kernels)
    return html, troubles


def _text_sample(folder: Path, sample: dict[str, Any]) -> str:
    text, prompt = str(sample.get("text", "")), str(sample.get("prompt") or "")
    start = f"<mark>{escape(prompt)}</mark>" if prompt else ""
    return f'<p class="text">{start}{escape(text)}</p>'


def _other_sample(folder: Path, sample: dict[str, Any]) -> str:
    parts = [str(sample[key]) for key in ("file", "text") if sample.get(key)] or ["nothing to show"]
    what = f"{sample.get('kind')}: {', '.join(parts)}"
    return f'<p class="text">{escape(what)}</p>'


def _embedded(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _player(path: Path) -> str:
    """An audio player with the sound inside the page, if the file is small enough."""
    if not path.is_file() or path.stat().st_size > _EMBEDDED:
        return ""
    return f'<audio controls src="{_embedded("audio/wav", path.read_bytes())}"></audio>'


def _image(data: bytes, what: str) -> str:
    return f'<img src="{_embedded("image/png", data)}" alt="{escape(what)}">'


def _audio_sample(folder: Path, sample: dict[str, Any]) -> str:
    from waveletgpt.data.modalities.audio import picture

    path = _file(folder, sample)
    return _player(path) + _image(picture(path), "waveform and spectrogram") + _caption(sample)


def _music_sample(folder: Path, sample: dict[str, Any]) -> str:
    from waveletgpt.data.modalities.midi import picture

    path = _file(folder, sample)
    return _player(path.with_suffix(".wav")) + _image(picture(path), "piano roll") + _caption(sample)


def _image_sample(folder: Path, sample: dict[str, Any]) -> str:
    return _image(_file(folder, sample).read_bytes(), "generated picture") + _caption(sample)


def _file(folder: Path, sample: dict[str, Any]) -> Path:
    """The sample's file. Raises ValueError if samples.json points outside the run folder."""
    path = (folder / str(sample.get("file"))).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{sample.get('file')} is outside the run folder")
    return path


def _caption(sample: dict[str, Any]) -> str:
    words = f"{sample.get('prompt') or ''} ({sample.get('file')})"
    return f'<p class="text"><mark>{escape(words)}</mark></p>'


_EMBEDDED = 1 << 20  # bytes of sound that one sample may add to the page

# How a sample of each kind is shown: (run folder, entry of samples.json) -> HTML. A modality adds its own line.
SAMPLE_RENDERERS: dict[str, Callable[[Path, dict[str, Any]], str]] = {
    "text": _text_sample,
    "audio": _audio_sample,
    "music": _music_sample,
    "image": _image_sample,
}


def shown(folder: Path, sample: dict[str, Any]) -> str:
    """A sample of a run folder as HTML."""
    try:
        return SAMPLE_RENDERERS.get(str(sample.get("kind", "text")), _other_sample)(folder, sample)
    except Exception as error:  # a missing file or library must not stop the report
        return _other_sample(folder, {**sample, "text": str(error)})


def _samples(records: Sequence[Record], styles: dict[str, int]) -> str:
    """Samples of every arm side by side, prompt by prompt, from the first seed of each arm that has samples."""
    found: dict[str, tuple[Record, list[dict[str, Any]]]] = {}
    for record in records:
        if record.arm not in found:
            try:
                samples = [s for s in RunFolder(record.path).samples() if isinstance(s, dict)]
            except (OSError, ValueError, TypeError):
                samples = []
            if samples:
                found[record.arm] = record, samples
    html = ""
    for row in range(max((len(samples) for _, samples in found.values()), default=0)):
        cards = ""
        for arm, (record, samples) in found.items():
            if row < len(samples):
                sample = samples[row]
                cards += (
                    f'<article class="sample"><h4>{swatch(styles[arm])}{escape(arm)}, seed {record.seed}</h4>'
                    f"{shown(record.path, sample)}</article>"
                )
        html += f'<div class="samples">{cards}</div>'
    intro = "All arms have the same prompts (grey) and random seed." if len(found) > 1 else "Prompts are grey."
    return html and f"<p>{intro}</p>{html}"


def setup(records: Sequence[Record], summary: Summary[Any]) -> str:
    """Recipe, data, environment, model, commands."""
    by_arm: dict[str, Record] = {}
    for record in records:
        by_arm.setdefault(record.arm, record)
    settings = {arm: settings_of(record.info) for arm, record in by_arm.items()}
    keys = list(dict.fromkeys(key for values in settings.values() for key in values))
    differing = [k for k in keys if len({repr(values.get(k)) for values in settings.values()}) > 1]
    parts = []
    if differing:
        rows = [[escape(arm), *(_value(values.get(key)) for key in differing)] for arm, values in settings.items()]
        parts.append("<h3>What differs between the arms</h3>")
        parts.append(table(["arm", *map(escape, differing)], rows, "key", "Settings that differ between arms"))
    first = next(iter(settings.values()))
    seeds = sorted({record.seed for record in records})
    # Settings that are not set come from the preset: the model's configuration has their values.
    common = {"seeds": ", ".join(map(str, seeds))}
    common |= {key: value for key, value in first.items() if key not in differing}
    pictured = next((r for r in records if r.arm != summary["baseline"] and r.usable), records[0])
    data = {key: value for key, value in summary["data"].items() if key not in ("splits", "bytes_per_token")}
    parts += [
        '<div class="columns">',
        _facts("Recipe, the same for all arms" if len(by_arm) > 1 else "Recipe", common),
        _facts("Data", flatten(data), _splits(summary["data"])),
        _facts("Environment", summary["environment"]),
        _facts(f"Model of {pictured.arm}", _configuration(pictured)),
        "</div>",
    ]
    commands = list(dict.fromkeys(str(r.info.get("command") or "") for r in records))
    text = "\n".join(command for command in commands if command)
    if text:
        parts.append(f"<h3>To run it again</h3><pre>{escape(text)}</pre>")
    return "".join(parts)


def _configuration(record: Record) -> dict[str, Any]:
    """All settings of a run's model, from its config.json; only its sizes before that is written."""
    model = {key: value for key, value in (record.info.get("model") or {}).items() if key != "windows"}
    try:
        config = json.loads((RunFolder(record.path).model_path() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return model
    skip = ("architectures", "auto_map", "transformers_version", "model_type", "use_cache")
    return flatten({key: value for key, value in {**model, **config}.items() if key not in skip})


def _facts(title: str, values: Mapping[str, Any], after: str = "") -> str:
    rows = [[escape(str(key)), _value(value)] for key, value in values.items()]
    if not rows:
        return ""
    return f'<div><h3>{escape(title)}</h3><table class="key facts"><tbody>{_rows(rows)}</tbody></table>{after}</div>'


def _splits(data: Mapping[str, Any]) -> str:
    """Size of train, validation and test as a small table."""
    splits, sizes = data.get("splits") or {}, data.get("bytes_per_token") or {}
    columns = list(dict.fromkeys(key for split in splits.values() for key in split))
    rows = [
        [escape(name), *(escape(quantity(split.get(key))) for key in columns), _value(sizes.get(name))]
        for name, split in splits.items()
    ]
    head = "".join(f"<th>{escape(title)}</th>" for title in ["split", *columns, "B/token"])
    html = f'<table class="key"><thead><tr>{head}</tr></thead><tbody>{_rows(rows)}</tbody></table>'
    return html if rows else ""


def _value(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, float) and math.isfinite(value):
        return escape(f"{value:.6g}")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}"
    return escape(str(value))


_TERMS = """<dl class="terms">
<dt>Loss</dt><dd>Validation loss: the mean negative log-likelihood in nats per token over a fixed set of validation
windows, the same for all arms. Bits per byte are the loss divided by ln 2 and by the mean number of bytes per token, so
that models with different vocabularies can be compared.</dd>
<dt>Same-performance step</dt><dd>The first step at which an arm's validation loss is at or below the final loss of the
baseline with the same seed, linearly interpolated between evaluations. The mean over seeds exists only if every seed
reaches it.</dd>
<dt>Step speed-up</dt><dd>The baseline's number of steps divided by the mean same-performance step.</dd>
<dt>Time speed-up</dt><dd>The baseline's training seconds divided by the arm's training seconds up to its
same-performance step, both at the run's mean seconds per step. Evaluation, saving and sampling do not count.</dd>
<dt>±</dt><dd>Sample standard deviation over seeds; there is none with one seed. “vs baseline” is the mean difference to
the baseline with the same seed, so that effects of a seed on both arms cancel. The 95 % interval is Student's t over
those differences.</dd>
<dt>FLOPs per token</dt><dd>Counted from the architecture, mixing included; in brackets the change against the baseline.
With several arms the headline names the one that needs the fewest FLOPs to its same-performance step.</dd>
</dl>"""
