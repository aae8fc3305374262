"""Same-performance step, speed-ups and what a summary refuses: properties, and numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.report.synthetic_runs import make_run
from waveletgpt.errors import UserError
from waveletgpt.report.summary import (
    curves_csv,
    headline,
    markdown_table,
    same_performance_step,
    summarize,
    summary_table,
    write_summary,
)
from waveletgpt.report.wording import gap_table
from waveletgpt.runs.folder import RunFolder

CURVES = st.lists(st.floats(0.5, 5.0), min_size=1, max_size=12).map(
    lambda losses: [(10 * i, loss) for i, loss in enumerate(losses)]
)
TARGETS = st.floats(0.4, 5.1)


@settings(max_examples=200, deadline=None)
@given(CURVES, TARGETS)
def test_step_is_the_first_crossing_of_the_interpolated_curve(curve: list[tuple[int, float]], target: float) -> None:
    steps, losses = zip(*curve, strict=True)
    dense = np.linspace(0, steps[-1], 1000 * (len(steps) - 1) + 1) if len(steps) > 1 else np.array([0.0])
    below = dense[np.interp(dense, steps, losses) <= target]
    found = same_performance_step(curve, target)
    if found is None:
        assert not len(below)
    else:
        # The crossing lies within one dense cell of 0.01 step before the first dense point at or below the target;
        # a dip that touches the target between two dense points is seen by neither.
        assert np.interp(found, steps, losses) <= target + 1e-9
        assert not len(below) or found <= below[0] + 1e-9
        assert not len(below[below < found - 0.011])


@settings(max_examples=200, deadline=None)
@given(CURVES, TARGETS, TARGETS)
def test_a_harder_target_is_never_reached_sooner(curve: list[tuple[int, float]], a: float, b: float) -> None:
    easy, hard = same_performance_step(curve, max(a, b)), same_performance_step(curve, min(a, b))
    assert hard is None or (easy is not None and easy <= hard)


@settings(max_examples=100, deadline=None)
@given(CURVES)
def test_never_is_none_and_the_end_is_always_reached(curve: list[tuple[int, float]]) -> None:
    assert same_performance_step(curve, min(loss for _, loss in curve) - 1e-3) is None
    reached = same_performance_step(curve, curve[-1][1])
    assert reached is not None
    assert reached <= curve[-1][0]


def test_losses_that_are_no_numbers_count_as_not_measured() -> None:
    assert same_performance_step([(0, 3.0), (10, math.nan), (20, 1.0)], 2.0) == 10.0
    assert same_performance_step([(0, math.inf), (10, 1.0)], 2.0) == 10.0
    assert same_performance_step([(0, math.nan)], 2.0) is None
    assert same_performance_step([(0, 1.0)], math.nan) is None
    assert same_performance_step([], 1.0) is None


def two_arms(folder: Path) -> list[RunFolder]:
    """Baseline ends at 1.5 and 1.7; the arm passes these at steps 100 (half way to 1.0) and 80 (2/5 of the way)."""
    return [
        make_run(folder / "b0", "none", 0, [(0, 3.0), (200, 1.5)], seconds_per_step=0.10),
        make_run(folder / "b1", "none", 1, [(0, 3.0), (200, 1.7)], seconds_per_step=0.10),
        make_run(folder / "f0", "fixed", 0, [(0, 2.0), (200, 1.0)], seconds_per_step=0.20, windows=[2, 4]),
        make_run(folder / "f1", "fixed", 1, [(0, 2.1), (200, 1.1)], seconds_per_step=0.20, windows=[2, 4]),
    ]


def test_many_seeds_have_the_interval_of_their_number(tmp_path: Path) -> None:
    """Of tables of Student's t: 2.262, 2.228, 2.093 for 9, 10, 19 degrees of freedom."""
    for seeds, t in ((10, 2.262), (11, 2.228), (20, 2.093)):
        ends = [1.0 + 0.01 * (seed % 3) for seed in range(seeds)]
        runs = [make_run(tmp_path / f"b{seeds}-{seed}", "none", seed, [(0, 3.0), (200, 1.5)]) for seed in range(seeds)]
        runs += [
            make_run(tmp_path / f"f{seeds}-{seed}", "fixed", seed, [(0, 3.0), (200, end)])
            for seed, end in enumerate(ends)
        ]
        found = summarize(runs, "none")["arms"]["fixed"]["final_nll_difference"]["ci95"]
        assert found == pytest.approx(t * statistics.stdev(ends) / math.sqrt(seeds), rel=1e-3)


def test_numbers_worked_out_by_hand(tmp_path: Path) -> None:
    summary = summarize(two_arms(tmp_path), "none")
    none, fixed = summary["arms"]["none"], summary["arms"]["fixed"]
    assert none["final_nll"] == {"mean": 1.6, "std": pytest.approx(math.sqrt(0.02)), "per_seed": [1.5, 1.7]}
    assert fixed["same_performance_step"] == {
        "mean": pytest.approx(90),
        "per_seed": [100, pytest.approx(80)],
        "reached": 2,
    }
    assert fixed["step_speedup"] == pytest.approx(200 / 90)
    # 200 steps of 0.1 s against 90 steps of 0.2 s.
    assert fixed["time_speedup"] == pytest.approx(20 / 18)
    assert fixed["final_nll_difference"]["per_seed"] == pytest.approx([-0.5, -0.6])
    # Student's t for one degree of freedom is 12.706.
    half = 12.706 * statistics.stdev([-0.5, -0.6]) / math.sqrt(2)
    assert fixed["final_nll_difference"]["ci95"] == pytest.approx(half, rel=1e-4)
    assert "same_performance_step" not in none
    assert list(summary["arms"]) == ["none", "fixed"]
    assert headline(summary) == (
        "`fixed` reached the baseline's final loss 1.600 after 90 of 200 steps: 2.22x fewer steps, 1.11x less time; "
        "2 seeds, and the difference in final loss may be chance between seeds."
    )


def test_the_headline_is_about_the_arm_with_the_least_computation(tmp_path: Path) -> None:
    """Not about a larger model that needs fewer steps, nor about one that a machine with less to do ran faster."""
    runs = [
        *two_arms(tmp_path),
        make_run(tmp_path / "d0", "none:n_layer=12", 0, [(0, 2.0), (200, 0.5)], parameters=2_400_000),
        make_run(tmp_path / "e0", "ema", 0, [(0, 2.0), (200, 1.4)], seconds_per_step=0.01),
    ]
    summary = summarize(runs, "none")
    speedups = {name: arm.get("step_speedup") for name, arm in summary["arms"].items()}
    assert speedups["ema"] < speedups["fixed"] < speedups["none:n_layer=12"]
    assert headline(summary).startswith("`fixed` reached")


def test_summary_file_has_the_fields_of_the_contract_and_is_strict_json(tmp_path: Path) -> None:
    runs = [*two_arms(tmp_path), make_run(tmp_path / "x", "bad", 0, [(0, 3.0), (20, math.nan)], status="failed")]
    returned = write_summary(tmp_path, runs, "none")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert summary["arms"] == json.loads(json.dumps(returned["arms"]))
    assert {"schema", "baseline", "data", "recipe", "environment", "arms"} <= set(summary)
    common = {"parameters", "extra_parameters", "flops_per_token", "tokens_per_second", "seconds", "final_nll",
              "bits_per_byte"}  # fmt: skip
    assert all(common <= set(arm) for arm in summary["arms"].values())
    assert {"same_performance_step", "step_speedup", "time_speedup"} <= set(summary["arms"]["fixed"])
    assert summary["arms"]["bad"]["final_nll"]["mean"] is None


def test_one_seed_has_no_standard_deviation(tmp_path: Path) -> None:
    runs = two_arms(tmp_path)
    summary = summarize([runs[0], runs[2]], "none")
    assert summary["arms"]["fixed"]["final_nll"]["std"] is None
    assert summary["arms"]["fixed"]["final_nll_difference"]["ci95"] is None
    assert any("One seed" in note for note in summary["notes"])


def test_never_reached_gives_null_and_is_said(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "b", "none", 0, [(0, 3.0), (200, 1.5)]),
        make_run(tmp_path / "f", "fixed", 0, [(0, 3.0), (200, 1.6)]),
    ]
    summary = summarize(runs, "none")
    arm = summary["arms"]["fixed"]
    assert arm["same_performance_step"] == {"mean": None, "per_seed": [None], "reached": 0}
    assert arm["step_speedup"] is None
    assert arm["time_speedup"] is None
    assert "never reached" in headline(summary)
    assert "0.100 nats above" in headline(summary)
    assert "never" in markdown_table(summary)


def test_a_seed_that_never_reaches_it_leaves_the_arm_without_a_speedup(tmp_path: Path) -> None:
    runs = two_arms(tmp_path)
    runs[3] = make_run(tmp_path / "slow", "fixed", 1, [(0, 3.0), (200, 1.8)])
    arm = summarize(runs, "none")["arms"]["fixed"]
    assert arm["same_performance_step"] == {"mean": None, "per_seed": [100, None], "reached": 1}
    assert arm["step_speedup"] is None
    assert "1 of 2 seeds only" in headline(summarize(runs, "none"))


def test_only_seeds_that_both_have_count_and_notes_say_so(tmp_path: Path) -> None:
    runs = two_arms(tmp_path)
    runs += [
        make_run(tmp_path / "b2", "none", 2, [(0, 3.0), (90, 2.0)], status="interrupted"),
        make_run(tmp_path / "f2", "fixed", 2, [(0, 3.0), (200, 1.0)]),
        make_run(tmp_path / "e1", "ema", 1, [(0, 3.0), (200, 1.0)]),
    ]
    summary = summarize(runs, "none")
    assert summary["arms"]["fixed"]["seeds"] == [0, 1]
    assert summary["arms"]["ema"]["seeds"] == [1]
    notes = " ".join(summary["notes"])
    assert "`none` seed 2 was interrupted at step 90" in notes
    assert "`fixed` seed 2 does not count" in notes
    assert "`ema` has no run of seed 0" in notes
    # The arm's speed-up compares with the same seeds of the baseline only.
    assert summary["arms"]["ema"]["final_nll_difference"]["per_seed"] == pytest.approx([-0.7])


def test_a_baseline_that_did_not_finish_compares_with_nothing(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "b", "none", 0, [(0, 3.0)], status="running"),
        make_run(tmp_path / "f", "fixed", 0, [(0, 3.0), (200, 1.0)]),
    ]
    summary = summarize(runs, "none")
    assert summary["arms"]["fixed"]["final_nll"]["mean"] == 1.0
    assert summary["arms"]["fixed"]["step_speedup"] is None
    assert "nothing can be compared" in summary["notes"][0]
    assert headline(summary).startswith("`fixed` ended at 1.000")


def test_a_baseline_that_was_as_good_before_its_end_is_told(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "b", "none", 0, [(0, 3.0), (100, 1.4), (200, 1.5)]),
        make_run(tmp_path / "f", "fixed", 0, [(0, 3.0), (100, 1.3), (200, 1.2)]),
    ]
    notes = " ".join(summarize(runs, "none")["notes"])
    # 3.0 -> 1.4 in 100 steps passes 1.5 at step 93.75.
    assert "reached its final loss at step 94 of 200" in notes
    assert "53 % smaller" in notes


def test_other_data_or_other_windows_are_refused_and_both_runs_named(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", "none")
    for key, other in {
        "data": make_run(tmp_path / "other_data", "fixed", fingerprint="zzz"),
        "evaluation windows": make_run(tmp_path / "other_windows", "fixed", recipe={"training": {"eval_windows": 7}}),
    }.items():
        with pytest.raises(UserError, match=key) as caught:
            summarize([first, other], "none")
        assert str(first.path) in str(caught.value)
        assert str(other.path) in str(caught.value)


def test_bad_calls_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "none")
    with pytest.raises(UserError, match="no run of the baseline arm 'fixed'; the arms are none"):
        summarize([run], "fixed")
    with pytest.raises(UserError, match="no run to summarize"):
        summarize([], None)
    with pytest.raises(UserError, match="named twice"):
        summarize([run, RunFolder(run.path / ".." / run.path.name)], None)
    with pytest.raises(UserError, match="named twice"):
        summarize([run, RunFolder(tmp_path / "a")], "none")


def test_a_setting_that_came_later_makes_no_other_arm(tmp_path: Path) -> None:
    before = make_run(tmp_path / "before", "fixed", 0, recipe={"lr": 1e-3})
    after = make_run(tmp_path / "after", "fixed", 1, recipe={"lr": 1e-3, "training": {"kernel_lr_scale": None}})
    assert list(summarize([before, after], "fixed")["arms"]) == ["fixed"]


def test_different_runs_with_the_same_name_become_arms_of_their_own(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "slow", "fixed", 0, recipe={"lr": 1e-4}),
        make_run(tmp_path / "fast", "fixed", 1, recipe={"lr": 1e-2}),
    ]
    summary = summarize(runs, "fixed")
    assert list(summary["arms"]) == ["fixed (slow)", "fixed (fast)"]
    assert summary["baseline"] == "fixed (slow)"
    assert "Several different runs are called `fixed`" in summary["notes"][0]


def test_where_a_run_was_made_does_not_make_it_another_arm(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", "fixed", 0, recipe={"device": "cpu", "data": "/a/x.txt"}),
        make_run(tmp_path / "b", "fixed", 1, recipe={"device": "cuda", "data": "/b/x.txt"}),
    ]
    assert list(summarize(runs, "fixed")["arms"]) == ["fixed"]


def test_batches_dealt_to_more_processes_make_no_other_arm(tmp_path: Path) -> None:
    """16 sequences of one process are 8 of each of two; 16 of each of two are something else."""
    one = make_run(tmp_path / "one", "none", 0)
    two = make_run(tmp_path / "two", "none", 1, recipe={"batch_size": 8})
    other = make_run(tmp_path / "other", "none", 2)
    for run in (two, other):
        run.update_info(environment={**run.info["environment"], "processes": 2})
    assert list(summarize([one, two], "none")["arms"]) == ["none"]
    assert len(summarize([one, two, other], "none")["arms"]) == 3


def test_runs_that_shared_the_machine_are_told(tmp_path: Path) -> None:
    alone, shared = (make_run(tmp_path / name, "none", seed) for seed, name in enumerate(("alone", "shared")))
    assert summarize([alone], "none")["at_once"] == 1
    shared.update_info(environment={**shared.info["environment"], "at_once": 3})
    summary = summarize([alone, shared], "none")
    assert summary["at_once"] == 3
    assert any("Up to 3 runs at once shared the machine" in note for note in summary["notes"])


def test_curves_have_one_line_per_loss(tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(curves_csv(two_arms(tmp_path)))))
    assert list(rows[0]) == ["arm", "seed", "step", "tokens", "seconds", "split", "loss"]
    # Per run: two evaluations, and a training loss at the one step after 0.
    assert len(rows) == 4 * 3
    last = rows[-1]
    assert (last["arm"], last["seed"], last["step"], last["split"], float(last["loss"])) == (
        "fixed", "1", "200", "validation", 1.1)  # fmt: skip
    assert float(last["seconds"]) == pytest.approx(40)


def test_tables_have_a_row_per_arm_and_escape_bars(tmp_path: Path) -> None:
    runs = [*two_arms(tmp_path), make_run(tmp_path / "p", "a|b", 0)]
    header, rows = summary_table(summarize(runs, "none"))
    assert [row[0] for row in rows] == ["none", "fixed", "a|b"]
    assert all(len(row) == len(header) for row in rows)
    assert all(line.replace("\\|", "").count("|") == markdown_table(summarize(runs, "none")).split("\n")[0].count("|")
               for line in markdown_table(summarize(runs, "none")).splitlines())  # fmt: skip


def test_a_disturbed_machine_is_told(tmp_path: Path) -> None:
    """Median 1,000 tokens/s but a mean of half of it: other work ran beside the training."""
    runs = [make_run(tmp_path / arm, arm, 0, [(0, 3.0), (100, 2.0)]) for arm in ("none", "fixed")]
    for run, seconds in zip(runs, (100.0, 200.0), strict=True):
        result = {**run.info["result"], "tokens": 100_000, "seconds": seconds, "tokens_per_second": 1000.0}
        run.update_info(result=result)
    notes = " ".join(summarize(runs, "none")["notes"])
    assert "busy with other work at times (`fixed`)" in notes


def test_the_gap_is_followed_to_the_end(tmp_path: Path) -> None:
    """Worked out by hand: 0.4 ahead at a quarter, 0.3 at half (between two evaluations), 0.1 at the end."""
    base = make_run(tmp_path / "a", "none", curve=[(0, 4.0), (100, 3.0), (400, 2.0)])
    arm = make_run(tmp_path / "b", "fixed", curve=[(0, 4.0), (100, 2.6), (300, 2.1333333), (400, 1.9)])
    gap = summarize([base, arm], "none")["arms"]["fixed"]["gap"]
    assert gap["quarter"] == pytest.approx(0.4)
    assert gap["half"] == pytest.approx(2.0 + 2 / 3 - (2.6 + 2.1333333) / 2)
    assert gap["end"] == pytest.approx(0.1)
    header, [row] = gap_table(summarize([base, arm], "none"))
    assert row == ["fixed", "+0.400", "+0.300", "+0.100", "25%"]
    assert len(header) == len(row)


def test_no_gap_beyond_the_end_of_an_arm(tmp_path: Path) -> None:
    base = make_run(tmp_path / "a", "none", curve=[(0, 4.0), (400, 2.0)])
    arm = make_run(tmp_path / "b", "fixed", curve=[(0, 4.0), (200, 2.5)])
    summary = summarize([base, arm], "none")
    assert summary["arms"]["fixed"]["gap"] == {"quarter": pytest.approx(0.25), "half": pytest.approx(0.5), "end": None}
    assert gap_table(summary)[1] == []


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "none", 0, [(0, 3.0), (100, 2.0), (200, 1.5)])
    whole = run.metrics()
    damaged = ['{"step": 50, "sec~nds": 1, "nll": 9.0}', '{"step": "x", "seconds": 1}', '{"step": 7, "nll"', "[3]"]
    run.metrics_path.write_text(run.metrics_path.read_text() + "\n".join(damaged) + "\n")
    assert run.metrics() == whole
    assert summarize([run], None)["arms"]["none"]["final_nll"]["mean"] == 1.5
