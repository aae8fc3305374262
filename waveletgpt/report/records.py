"""What summary.json holds, entry by entry, for both tasks; see `report.summary` for what the numbers mean."""

from __future__ import annotations

from typing import Any, Generic, TypedDict, TypeVar

from waveletgpt.runs.records import Breakdown, DataRecord, EnvironmentRecord

Number = Any
"""A number, or None (null in JSON) where it is not known. Not `float | None`: which numbers are known together a type
checker cannot tell."""

Arm = TypeVar("Arm", bound="ArmSummary")


class SeedNumbers(TypedDict, total=False):
    """A number over the seeds of an arm: mean, sample standard deviation, each; None where it is not known."""

    mean: Number
    std: Number
    per_seed: list[float | None]


class Difference(SeedNumbers, total=False):
    """The arm's number minus the baseline's of the same seed; `ci95` is half of the 95 % confidence interval."""

    ci95: Number


class ReachedStep(TypedDict, total=False):
    """When an arm had what the baseline ended with; `reached` counts the seeds that ever had."""

    mean: Number
    per_seed: list[float | None]
    reached: int


class ArmSummary(TypedDict, total=False):
    """An arm of either task. The last four are missing in the baseline's."""

    parameters: Number
    extra_parameters: Number
    flops_per_token: Number
    tokens_per_second: Number
    seconds: Number
    steps: Number
    seeds: list[int]
    final_nll: SeedNumbers
    same_performance_step: ReachedStep
    same_performance_seconds: Number
    step_speedup: Number
    time_speedup: Number


class LossArm(ArmSummary, total=False):
    """An arm of language models."""

    mixing_flops_per_token: Number
    bits_per_byte: Number
    breakdown: Breakdown | None
    # Missing in the baseline's
    final_nll_difference: Difference
    gap: dict[str, Number]


class ScoreArm(ArmSummary, total=False):
    """An arm of classifiers. Scores are shares, of `score` in `ScoreSummary`."""

    test: SeedNumbers
    validation: SeedNumbers
    best: SeedNumbers
    top5: SeedNumbers
    test_difference: Difference
    """Missing in the baseline's."""


class Summary(TypedDict, Generic[Arm], total=False):
    """summary.json of either task."""

    schema: int
    baseline: str | None
    steps: int
    data: DataRecord
    recipe: dict[str, Any]
    environment: EnvironmentRecord
    at_once: int
    arms: dict[str, Arm]
    notes: list[str]


class LossSummary(Summary[LossArm], total=False):
    """summary.json of language models."""

    sweep: dict[str, Any]
    """Of a comparison whose arms were chosen by one; see `report.summary.with_sweep`."""


class ScoreSummary(Summary[ScoreArm], total=False):
    """summary.json of classifiers."""

    task: str
    score: str
    """accuracy or map."""


def baseline_arm(summary: Summary[Arm]) -> Arm:
    """What the summary has of the baseline; empty where nothing is compared."""
    empty: Any = {}
    return summary["arms"].get(summary["baseline"] or "", empty)
