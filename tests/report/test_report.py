"""The report is one safe, self-contained page whatever the runs are like, and pictures what the models do."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.report.synthetic_runs import make_run
from waveletgpt.errors import UserError
from waveletgpt.report.charts import Axis, Drop, Line, chart, push_apart, round_ticks
from waveletgpt.report.figures import kernel_figures
from waveletgpt.report.page import SAMPLE_RENDERERS, write_report
from waveletgpt.report.probing import frequency_response, look_inside
from waveletgpt.runs.folder import RunFolder

EVIL = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"'&`$title`"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects what a page is made of, and checks that its tags nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(folder: Path, runs: list[RunFolder], baseline: str | None = None) -> tuple[str, Page]:
    text = write_report(folder, runs, baseline).read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "link", "form", "base"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), value
    assert "@import" not in text
    assert "url(" not in text
    for points in re.findall(r'points="([^"]*)"', text):
        assert "nan" not in points
        assert "inf" not in points
    return text, page


def curve(final: float) -> list[tuple[int, float]]:
    return [(step, final + 2 * math.exp(-step / 200)) for step in range(0, 1201, 60)]


def comparison(folder: Path, seeds: int = 2) -> list[RunFolder]:
    samples = [{"kind": "text", "prompt": "it was", "text": " good"}]
    return [
        make_run(folder / f"{arm}{seed}", arm, seed, curve(final + 0.01 * seed), windows=windows, samples=samples)
        for arm, final, windows in (
            ("none", 1.6, None),
            ("fixed", 1.4, [2, 4, 8]),
            ("none:n_layer=12,lr=1e-3", 1.7, None),
        )
        for seed in range(seeds)
    ]


def test_a_comparison_says_its_result_in_words_curves_and_tables(tmp_path: Path) -> None:
    text, page = report(tmp_path, comparison(tmp_path), "none")
    assert "reached the baseline's final loss" in page.text
    assert "never reached the baseline's final loss" in page.text
    for section in ("curves", "arms", "mixing", "samples", "setup", "terms"):
        assert f'<section id="{section}"' in text
    for word in ("Step speed-up", "waveletgpt compare reviews.txt", "abc123", "AMD EPYC 7B13", "n_layer=12"):
        assert word in page.text
    pictures = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(pictures) >= 8
    assert all(attributes["aria-label"] for attributes in pictures)


def test_what_users_wrote_is_escaped_everywhere(tmp_path: Path) -> None:
    runs = [
        make_run(
            tmp_path / str(i), arm, 0, curve(1.5 - i / 10), windows=[2, 4],
            samples=[{"kind": EVIL if i else "text", "prompt": EVIL, "text": EVIL, "file": EVIL}],
            recipe={EVIL: EVIL, "differs": f"{EVIL}{i}", "preset": EVIL}, command=EVIL, error=EVIL,
            environment={EVIL: EVIL, "torch": EVIL + str(i)},
        )
        for i, arm in enumerate(["none", EVIL])
    ]  # fmt: skip
    for run in runs:
        data = {**run.info["data"], "name": EVIL, "splits": {EVIL: {EVIL: 1}}, "source": {EVIL: EVIL}}
        run.update_info(data=data)
    text, page = report(tmp_path, runs, "none")
    assert "<script" not in text
    assert "<img" not in text
    assert "alert(1)" in page.text


def test_the_page_forbids_scripts_and_requests(tmp_path: Path) -> None:
    _, page = report(tmp_path, [make_run(tmp_path / "a")])
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert policies
    assert policies[0]
    assert "default-src 'none'" in policies[0]
    assert "script-src" not in policies[0]


def test_one_run_without_samples_windows_or_baseline(tmp_path: Path) -> None:
    _, page = report(tmp_path, [make_run(tmp_path / "a", "none", 0, curve(1.5))])
    assert "ended at 1.505 nats per token after 1200 steps" in page.text
    assert "Samples" not in page.text


@pytest.mark.parametrize(
    ("status", "points"),
    [
        ("running", []),
        ("running", [(0, 3.0)]),
        ("interrupted", [(0, 3.0), (60, 2.5)]),
        ("failed", [(0, 3.0), (60, math.nan)]),
        ("failed", [(0, math.nan)]),
        ("finished", [(0, math.nan), (60, math.nan)]),
    ],
)
@pytest.mark.parametrize("broken", ["none", "fixed"])
def test_runs_that_stopped_anywhere(tmp_path: Path, status: str, points: list, broken: str) -> None:
    runs = [
        make_run(tmp_path / arm, arm, 0, points if arm == broken else curve(1.5), status=status if arm == broken else
                 "finished", windows=[2] if arm == "fixed" else None)
        for arm in ("none", "fixed")
    ]  # fmt: skip
    _, page = report(tmp_path, runs, "none")
    assert "does not count" in page.text


def test_an_arm_that_starts_where_the_baseline_ends(tmp_path: Path) -> None:
    """Its step is 0, and no number is so many times as large."""
    base = make_run(tmp_path / "none-seed0", "none", curve=[(0, 3.3), (10, 3.2)], max_steps=10)
    other = make_run(tmp_path / "fixed-seed0", "fixed", curve=[(0, 3.1), (10, 3.0)], max_steps=10)
    page = write_report(tmp_path / "out", [base, other], "none").read_text()
    assert "after 0 of 10 steps; 1 seed" in page
    assert "Same-performance step" in page


def test_a_run_that_has_only_just_begun(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.write_info({"status": "running"})
    report(tmp_path, [run])
    (run.path / "samples.json").write_text("{")
    report(tmp_path, [run])


def test_many_arms_and_seeds(tmp_path: Path) -> None:
    runs = [
        make_run(
            tmp_path / f"{k}-{seed}", f"fixed:max_window={2**k},lr=1e-3" if k else "none", seed, curve(1.6 - k / 50)
        )
        for k in range(10)
        for seed in range(3)
    ]
    text, _ = report(tmp_path, runs, "none")
    assert text.count('class="drop"') == 2 * 2 * 9


def test_runs_on_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be compared"):
        write_report(tmp_path, [make_run(tmp_path / "a", "none"), make_run(tmp_path / "b", "x", fingerprint="other")])
    assert not (tmp_path / "report.html").exists()


def test_a_modality_can_bring_its_own_kind_of_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLE_RENDERERS, "loud", lambda folder, sample: f"<p>{sample['text'].upper()}</p>")
    run = make_run(tmp_path / "a", samples=[{"kind": "loud", "text": "hear"}, {"kind": "unheard", "file": "x.wav"}])
    _, page = report(tmp_path, [run])
    assert "HEAR" in page.text
    assert "unheard: x.wav" in page.text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with learned kernels, one of which differs from the mean."""
    from waveletgpt.model.configuration import WaveletGPTConfig
    from waveletgpt.model.modeling import WaveletGPTForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = WaveletGPTConfig(
        vocab_size=27, n_positions=32, n_embd=16, n_layer=3, n_head=2, mixing="learnable", max_window=8
    )
    model = WaveletGPTForCausalLM(config)
    with torch.no_grad():
        next(iter(model.model.blocks[0].mixers[0].kernels))[:, 0] = 2.0
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def test_before_and_after_are_the_mixers_own(trained: Path) -> None:
    insight = look_inside(trained, range(27))
    mixed = insight.mixed
    assert mixed is not None
    assert mixed.before.shape == mixed.after.shape == (27, 16)
    assert mixed.n_mixed == 8
    # The other channels pass; a mixed one is the causal mean over its window, as these kernels still are.
    np.testing.assert_array_equal(mixed.before[:, 8:], mixed.after[:, 8:])
    window = mixed.windows[7]
    mean = np.convolve(mixed.before[:, 7], np.full(window, 1 / window))[:27]
    np.testing.assert_allclose(mixed.after[:, 7], mean, atol=1e-5)


def test_kernels_of_all_blocks_and_windows_are_found(trained: Path) -> None:
    kernels = look_inside(trained, [0]).kernels
    assert [(k.label, k.window) for k in kernels] == [(f"block {b}", w) for b in (1, 2, 3) for w in (2, 4, 8)]
    assert kernels[0].taps.tolist() == [2.0, 0.5]


def test_a_wavelets_filters_are_shown_once(tmp_path: Path) -> None:
    from waveletgpt.model.configuration import WaveletGPTConfig
    from waveletgpt.model.modeling import WaveletGPTForCausalLM

    config = WaveletGPTConfig(
        vocab_size=27, n_positions=32, n_embd=16, n_layer=3, n_head=2, max_window=4,
        mixing="wavelet", mix_wavelet="haar", mix_band="both",
    )  # fmt: skip
    WaveletGPTForCausalLM(config).save_pretrained(tmp_path)
    kernels = look_inside(tmp_path, [0]).kernels
    assert [(k.label, k.taps.tolist()) for k in kernels] == [
        ("approximation", [0.5, 0.5]),
        ("detail", [0.5, -0.5]),
        ("approximation", [0.25, 0.25, 0.25, 0.25]),
        ("detail", [0.25, 0.25, -0.25, -0.25]),
    ]
    assert "approximation" in kernel_figures("wavelet", kernels)


def test_pictures_of_the_model_are_in_the_report(tmp_path: Path, trained: Path) -> None:
    run = make_run(tmp_path / "a", "learnable", 0, curve(1.4), windows=[2, 4, 8])
    for file in trained.iterdir():
        (run.path / file.name).write_bytes(file.read_bytes())
    text, page = report(tmp_path, [run])
    assert "could not be loaded and drawn" not in page.text
    assert text.count("data:image/png;base64,") == 2
    assert '<section id="kernels"' in text
    (run.path / "model.safetensors").write_bytes(b"cut short")
    _, page = report(tmp_path, [run])
    assert "could not be loaded and drawn" in page.text


def test_frequency_response_of_the_mean_is_the_known_one() -> None:
    # |H(f)| of the mean of w values is |sin(pi w f) / (w sin(pi f))|.
    octaves = np.linspace(-6, -1.5, 40)
    f = 2.0**octaves
    expected = 20 * np.log10(np.abs(np.sin(np.pi * 4 * f) / (4 * np.sin(np.pi * f))))
    got = frequency_response(np.full(4, 0.25), octaves, averaged=1)
    away = expected > -60
    np.testing.assert_allclose(got[away], expected[away], atol=1e-6)


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0, 1200), (1.37, 2.52), (-0.4, 0.02), (0, 1e-4), (0, 3e6)):
        ticks = round_ticks(low, high, 5)
        assert 3 <= len(ticks) <= 11
        assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in ticks)
        # What is written is what is meant.
        assert all(float(text.replace(",", "").replace("−", "-")) == pytest.approx(value) for value, text in ticks)


def test_labels_are_moved_apart_in_order() -> None:
    placed = push_apart([50, 51, 52, 300], 16, 0, 310)
    assert all(b - a >= 16 for a, b in itertools.pairwise(placed))
    assert push_apart([305, 306], 16, 0, 310) == [294, 310]


def test_charts_are_well_formed_whatever_the_numbers() -> None:
    lines = [Line([(0, math.nan), (1, 2.0), (2, math.inf), (3, 1e300), (4, -1e300)], style, "a<b", kind)
             for style, kind in enumerate(["mean", "seed", "broken", "plain", "fine", "taps"])]  # fmt: skip
    for x, y in ((Axis("x", 0, 4), Axis("y", 0, 3)), (Axis("x", 0, 0), Axis("y", 1, 1))):
        text = chart(lines, 400, x, y, name='"quoted"', level=(1.0, "l"), drops=[Drop(3.0, 9, "d")])
        Page(text)
        assert "nan" not in text
        assert "inf" not in text


def test_importing_the_report_is_cheap() -> None:
    code = (
        "import sys; import waveletgpt.report.summary; "
        "print([m for m in ('torch', 'matplotlib', 'transformers', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_sounds_and_pictures_travel_inside_the_page(tmp_path: Path) -> None:
    """A player and pictures as data URIs; a file outside the run folder or a broken one is named, not shown."""
    import wave

    from PIL import Image

    run = make_run(tmp_path / "a", "none", 0, curve(1.5))
    folder = run.path / "samples"
    folder.mkdir()
    with wave.open(str(folder / "0.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(3200))
    Image.new("L", (8, 8), 128).save(folder / "1.png")
    (folder / "2.wav").write_bytes(b"no sound")
    (tmp_path / "secret.png").write_bytes((folder / "1.png").read_bytes())
    rows = [
        {"kind": "audio", "file": "samples/0.wav", "prompt": "the first 5 tokens"},
        {"kind": "image", "file": "samples/1.png"},
        {"kind": "audio", "file": "samples/2.wav"},
        {"kind": "image", "file": "../secret.png"},
        {"kind": "music", "file": "samples/gone.mid"},
    ]
    (run.path / "samples.json").write_text(json.dumps(rows))
    page = write_report(tmp_path, [run]).read_text()
    assert page.count('<audio controls src="data:audio/wav;base64,') == 1
    assert page.count('<img src="data:image/png;base64,') >= 2
    assert "outside the run folder" in page
    assert "samples/2.wav" in page
    assert "samples/gone.mid" in page


def broken_down(seen: float, new: float, near: float) -> dict[str, Any]:
    return {
        "pairs": {"seen": {"nll": seen, "tokens": 300}, "new": {"nll": new, "tokens": 100}},
        "positions": [
            {"first": 1, "last": 1, "nll": new, "tokens": 100},
            {"first": 2, "last": 2, "nll": None, "tokens": 0},
            {"first": 3, "last": 4, "nll": seen, "tokens": 300},
        ],
        "near_attention": {"share": near, "by_block": [near, near], "windows": 4},
    }


def test_where_the_loss_is_stands_in_a_table_and_a_figure_for_each_arm(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{arm}{seed}", arm, seed, curve(1.5))
        for arm in ("none", "fixed", "ema")
        for seed in (0, 1)
    ]
    for run, found in zip(
        runs, [(1.0, 3.0, 0.5), (1.2, 3.0, 0.5), (0.9, 2.5, 0.25), (1.1, 2.5, 0.25), None, (1.0, 2.0, 0.3)], strict=True
    ):
        if found is not None:
            run.update_info(result={**run.info["result"], "breakdown": broken_down(*found)})
    text, page = report(tmp_path, runs, "none")
    assert '<section id="breakdown"' in text
    rows = re.search(r'aria-label="Loss by kind of token">(.*?)</table>', text)
    assert rows is not None
    # Means over seeds, and minus the baseline's: 1.1 and 1.0.
    for cell in ("75%", "1.100", "1.000<small>(−0.100)</small>", "2.500<small>(−0.500)</small>", "25.0%"):
        assert cell in rows[1]
    assert "ema" not in rows[1]  # one of its runs is of an earlier version
    names = [a["aria-label"] for tag, a in page.tags if tag == "svg" and "position" in (a.get("aria-label") or "")]
    assert names == ["loss, nats per token by position, none: 1 3.000, 3 1.100",
                     "loss minus the baseline's by position, fixed: 1 -0.500, 3 -0.100"]  # fmt: skip


def test_runs_of_earlier_versions_have_no_such_section(tmp_path: Path) -> None:
    text, _ = report(tmp_path, comparison(tmp_path), "none")
    assert 'id="breakdown"' not in text
