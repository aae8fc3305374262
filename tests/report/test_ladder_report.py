"""ladder.json and the page of a made-up ladder whose law, multipliers and retention are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.report.synthetic_runs import make_run
from tests.report.test_report import EVIL, Page
from waveletgpt.report.ladder import arm_sentence, headline, read_ladder
from waveletgpt.report.ladder_page import write_ladder
from waveletgpt.report.scaling import Law
from waveletgpt.runs.folder import find_runs

TRUE = Law(E=1.0, A=20.0, a=0.3, B=150.0, b=0.33)
SIZES = {"0.3M": (4, 80, 300_000), "1.2M": (6, 128, 1_200_000), "5M": (8, 224, 5_000_000)}
TOKENS = {"5M": 5_000_000, "15M": 15_000_000, "50M": 50_000_000}
VOCABULARY, CONTEXT = 27, 256


def make_ladder(
    folder: Path, gain: float = 1.5, seeds: int = 1, arm: str = "fixed", rates: bool = False, **info: object
) -> Path:
    """Runs that end at `TRUE`, and at `TRUE` of `gain` times the tokens, with seeds 0.2 % apart; 10 % slower."""
    for size, (n_layer, n_embd, n) in SIZES.items():
        for budget, tokens in TOKENS.items():
            steps = tokens // 4096
            for name, worth in (("none", 1.0), (arm, gain)):
                for seed in range(seeds):
                    final = TRUE.loss(n, worth * steps * 4096) * (1 + 0.002 * seed)
                    curve = [(step, final + 2 * (math.exp(-4 * step / steps) - math.exp(-4)))
                             for step in range(0, steps, steps // 10)]  # fmt: skip
                    own = f"{name}{',' if ':' in name else ':'}lr={4 if n < 1e6 else 2}e-3" if rates else name
                    folder_name = f"{'none' if name == 'none' else 'arm'}-seed{seed}"
                    run = make_run(
                        folder / f"{size}-{budget}" / folder_name, own, seed, [*curve, (steps, final)],
                        seconds_per_step=0.1 if name == "none" else 0.1 / 0.9, max_steps=steps, **info,
                    )  # fmt: skip
                    tables = (VOCABULARY + CONTEXT) * n_embd
                    model = {"parameters": n + tables, "n_layer": n_layer, "n_embd": n_embd, "n_head": 4}
                    run.update_info(model={**run.info["model"], **model, "flops_per_token": 6 * n})
    return folder


def test_the_numbers_are_those_it_was_made_of(tmp_path: Path) -> None:
    ladder = write_ladder(make_ladder(tmp_path), replicates=24)
    law = ladder["arms"]["none"]["law"]
    for name in ("E", "A", "a", "B", "b"):
        assert law[name]["value"] == pytest.approx(getattr(TRUE, name), rel=0.01)
        low, high = law[name]["ci95"]
        assert low <= law[name]["value"] * 1.001
        assert high >= law[name]["value"] * 0.999
    assert [rung["rung"] for rung in ladder["rungs"]] == [f"{s}-{t}" for s in SIZES for t in TOKENS]
    for rung in ladder["rungs"]:
        assert rung["parameters"] == SIZES[rung["size"]][2]
        assert rung["compute"] == 6 * rung["parameters"] * rung["tokens"]
        arm = rung["arms"]["fixed"]
        assert arm["data_multiplier"]["value"] == pytest.approx(1.5, rel=0.01)
        assert arm["throughput_ratio"] == pytest.approx(0.9)
        assert arm["compute_multiplier"]["value"] == pytest.approx(1.35, rel=0.01)
    arm = ladder["arms"]["fixed"]
    for over in ("tokens", "parameters", "compute"):
        assert arm["trend"][over]["value"] == pytest.approx(1, abs=0.02)
    # The gap is B (1 - 1.5^-b) / D^b: a power law of its own.
    assert arm["retention"]["value"] == pytest.approx(10**-TRUE.b, rel=0.01)
    assert set(arm["retention_by_size"]) == set(SIZES)
    assert headline(ladder).startswith("`fixed` ends 0.0")
    assert "worth 1.35x" in headline(ladder)
    notes = " ".join(ladder["notes"])
    assert "do not determine" not in notes
    assert "read more than once (up to 5.6 times)" in notes
    assert json.loads((tmp_path / "ladder.json").read_text()) == json.loads(json.dumps(ladder))


def test_the_page_has_all_of_it(tmp_path: Path) -> None:
    ladder = write_ladder(make_ladder(tmp_path, seeds=3), replicates=24)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    for section in ("curves", "worth", "rungs", "law", "setup", "terms"):
        assert f'<section id="{section}"' in text
    assert "ladder.json and ladder.csv hold the numbers" in page.text
    pictures = [attributes["aria-label"] or "" for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(pictures) == 3 + 2
    assert "nan" not in " ".join(pictures)
    # Every gap and multiplier has an interval, in the table and as a bar.
    assert all(rung["arms"]["fixed"]["gap"]["ci95"] for rung in ladder["rungs"])
    assert len((tmp_path / "ladder.csv").read_text().splitlines()) == 1 + 9 * 2 * 3


def test_what_users_wrote_is_escaped(tmp_path: Path) -> None:
    make_ladder(tmp_path, arm=EVIL, recipe={"preset": EVIL}, command=EVIL)
    write_ladder(tmp_path, replicates=0)
    text = (tmp_path / "report.html").read_text()
    Page(text)
    assert "<script" not in text
    assert "<img" not in text


def test_arms_are_the_same_at_all_sizes_whatever_rate_they_have(tmp_path: Path) -> None:
    """Without the sweep's record, too: the names differ in the rate alone."""
    ladder = write_ladder(make_ladder(tmp_path, arm="fixed:max_window=4", rates=True), replicates=0)
    assert list(ladder["arms"]) == ["none", "fixed:max_window=4"]
    assert [rung["arms"]["none"]["settings"] for rung in ladder["rungs"][::3]] == ["lr=4e-3", "lr=2e-3", "lr=2e-3"]
    assert ladder["arms"]["none"]["law"] is not None


def test_runs_of_settings_that_a_sweep_has_not_chosen_do_not_count(tmp_path: Path) -> None:
    """A rung that got a sweep of its own after it was trained with what the sweep of its size had chosen."""
    make_ladder(tmp_path, rates=True)
    before = write_ladder(tmp_path, replicates=0)["rungs"][0]
    trials = [{"settings": {"lr": value}, "loss": loss} for value, loss in (("1e-3", 9.0), ("4e-3", 2.0))]
    entry = {"best": {"lr": "4e-3"}, "edges": ["lr"], "trials": trials}
    record = {"grid": {"lr": ["1e-3", "4e-3"]}, "steps": 1, "seed": 0, "fingerprint": "abc123"}
    record["arms"] = {"none:lr=4e-3": entry, "fixed:lr=4e-3": entry}
    summary = {"baseline": "none:lr=4e-3", "arms": record["arms"]}
    (tmp_path / "0.3M-5M" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "0.3M-5M-sweep").mkdir()
    (tmp_path / "0.3M-5M-sweep/sweep.json").write_text(json.dumps(record))
    make_run(tmp_path / "0.3M-5M" / "other-seed0", "fixed:lr=1e-3", 0, [(0, 10.0), (1220, 9.0)], max_steps=1220)
    ladder = write_ladder(tmp_path, replicates=0)
    assert list(ladder["arms"]) == ["none", "fixed"]
    assert ladder["rungs"][0]["arms"]["fixed"]["settings"] == "lr=4e-3"
    assert ladder["rungs"][0]["arms"]["fixed"]["final_nll"] == before["arms"]["fixed"]["final_nll"]
    assert "0.3M-5M: `fixed:lr=1e-3` does not count, because a sweep has chosen" in " ".join(ladder["notes"])
    assert "At 0.3M-5M the best setting of `fixed`, lr 4e-3, is at the edge" in " ".join(ladder["notes"])


def test_a_ladder_that_still_trains_does_not_mix_arms_that_differ_in_the_rate(tmp_path: Path) -> None:
    """One run of a third arm is missing: the rates were compared, no sweep chose them."""
    make_ladder(tmp_path, arm="fixed:lr=1e-3")
    for rung in list(SIZES)[:2]:
        for budget, tokens in TOKENS.items():
            steps = tokens // 4096
            make_run(
                tmp_path / f"{rung}-{budget}/more-seed0", "fixed:lr=2e-3", 0, [(0, 9.0), (steps, 1.5)], max_steps=steps
            )
    ladder = write_ladder(tmp_path, replicates=0)
    assert list(ladder["arms"]) == ["none", "fixed:lr=1e-3", "fixed:lr=2e-3"]
    assert all(len(arm["seeds"]) <= 1 for rung in ladder["rungs"] for arm in rung["arms"].values())


def test_a_baseline_that_failed_with_one_seed(tmp_path: Path) -> None:
    """And an arm that failed with the other: nothing is left to compare at that rung, and the page says so."""
    make_ladder(tmp_path, seeds=2)
    for run in find_runs(tmp_path / "0.3M-5M"):
        if (run.info["arm"], run.info["seed"]) in (("none", 0), ("fixed", 1)):
            run.update_info(status="failed")
    ladder = write_ladder(tmp_path, replicates=0)
    arms = ladder["rungs"][0]["arms"]
    assert arms["none"]["final_nll"]["mean"] is not None
    assert arms["fixed"]["final_nll"]["mean"] is None
    assert "None" not in (tmp_path / "report.html").read_text()
    assert "`fixed` seed 1 failed" in " ".join(ladder["notes"])


def test_a_broken_record_of_a_sweep_is_none(tmp_path: Path) -> None:
    make_ladder(tmp_path, rates=True)
    (tmp_path / "0.3M-5M-sweep").mkdir()
    for text in ("{}", "[]", "null", "{"):
        (tmp_path / "0.3M-5M-sweep/sweep.json").write_text(text)
        assert write_ladder(tmp_path, replicates=0)["sweeps"] == []


def test_a_busy_machine_does_not_make_an_arm_slow(tmp_path: Path) -> None:
    """One rung's run at a tenth of the speed: at its size the arm is as fast as it was at its best."""
    make_ladder(tmp_path)
    for run in find_runs(tmp_path / "1.2M-15M"):
        if run.info["arm"] == "fixed":
            run.update_info(result={**run.info["result"], "tokens_per_second": 4000.0})
    ladder = write_ladder(tmp_path, replicates=0)
    slow = next(rung for rung in ladder["rungs"] if rung["rung"] == "1.2M-15M")["arms"]["fixed"]
    assert slow["tokens_per_second"] == 4000
    assert slow["throughput_ratio"] == pytest.approx(0.9)
    assert slow["compute_multiplier"]["value"] == pytest.approx(1.35, rel=0.01)


def test_gaps_close_to_nothing_are_warned_of(tmp_path: Path) -> None:
    make_ladder(tmp_path)
    for run in find_runs(tmp_path / "0.3M-5M"):
        if run.info["arm"] == "fixed":
            final = TRUE.loss(3e5, 1220 * 4096) - 0.001
            run.update_info(result={**run.info["result"], "final_nll": final})
    ladder = write_ladder(tmp_path, replicates=0)
    assert "go from 0.0010 to 0.1" in " ".join(ladder["notes"])
    assert "Its retention depends on the smallest" in " ".join(ladder["notes"])
    assert ladder["arms"]["fixed"]["retention"]["value"] is not None
    assert "tenfold data" not in headline(ladder)


def test_unfinished_runs_are_left_out_and_said_to_be(tmp_path: Path) -> None:
    make_ladder(tmp_path)
    for run in find_runs(tmp_path / "5M-50M"):
        run.update_info(status="interrupted")
    ladder = write_ladder(tmp_path, replicates=0)
    assert ladder["rungs"][-1]["arms"]["fixed"]["gap"]["value"] is None
    assert "5M-50M: `none` seed 0 was interrupted" in " ".join(ladder["notes"])
    assert "at the top rung, 5M-15M" in arm_sentence(ladder, "fixed")
    assert ladder["rungs"][0]["arms"]["fixed"]["data_multiplier"]["value"] is not None


def test_a_loss_out_of_reach_is_said_to_be(tmp_path: Path) -> None:
    make_ladder(tmp_path)
    for run in find_runs(tmp_path / "5M-50M"):
        if run.info["arm"] == "fixed":
            run.update_info(result={**run.info["result"], "final_nll": 0.5})
    ladder = write_ladder(tmp_path, replicates=0)
    top = ladder["rungs"][-1]["arms"]["fixed"]
    assert top["data_multiplier"]["value"] is None
    assert top["data_multiplier"]["out_of_reach"]
    assert ladder["arms"]["fixed"]["trend"]["compute"]["value"] is None
    assert "At 5M-50M the baseline of the same size never reaches the loss of `fixed`" in " ".join(ladder["notes"])
    assert "∞" in (tmp_path / "report.html").read_text()


def test_an_arm_behind_has_no_retention(tmp_path: Path) -> None:
    ladder = write_ladder(make_ladder(tmp_path, gain=0.8), replicates=0)
    assert ladder["arms"]["fixed"]["retention"]["value"] is None
    assert "`fixed` has no lead at" in " ".join(ladder["notes"])
    assert "nats above the baseline" in headline(ladder)
    assert ladder["rungs"][0]["arms"]["fixed"]["data_multiplier"]["value"] == pytest.approx(0.8, rel=0.01)


def test_another_baseline(tmp_path: Path) -> None:
    rungs = read_ladder(make_ladder(tmp_path), "fixed")
    assert {rung.summary["baseline"] for rung in rungs} == {"fixed"}
    ladder = write_ladder(tmp_path, "fixed", tmp_path / "elsewhere", 0)
    assert ladder["rungs"][0]["arms"]["none"]["data_multiplier"]["value"] == pytest.approx(1 / 1.5, rel=0.01)
    assert not (tmp_path / "ladder.json").exists()
