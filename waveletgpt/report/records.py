"""The entries of summary.json for both tasks; `report.summary` says what the numbers mean."""

from __future__ import annotations

from typing import Any, Generic, TypedDict, TypeVar

from waveletgpt.runs.records import Breakdown, DataRecord, EnvironmentRecord

Number = Any
"""A number, or None (null in JSON) if it is not known. Not typed `float | None`, because a type checker cannot know
which numbers are known together."""

Arm = TypeVar("Arm", bound="ArmSummary")


class SeedNumbers(TypedDict, total=False):
    """A number over the seeds of an arm: mean, sample standard deviation and one per seed; None if not known."""

    mean: Number
    std: Number
    per_seed: list[float | None]


class Difference(SeedNumbers, total=False):
    """The arm's number minus the baseline's of the same seed; `ci95` is half of the 95 % confidence interval."""

    ci95: Number


class ReachedStep(TypedDict, total=False):
    """The step at which an arm reaches the baseline's final value; `reached` counts the seeds that do."""

    mean: Number
    per_seed: list[float | None]
    reached: int


class ArmSummary(TypedDict, total=False):
    """An arm of either task. The baseline lacks the last four entries."""

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
    # The baseline lacks these
    final_nll_difference: Difference
    gap: dict[str, Number]


class ScoreArm(ArmSummary, total=False):
    """An arm of classifiers. Scores are between 0 and 1; `score` in `ScoreSummary` names their kind."""

    test: SeedNumbers
    validation: SeedNumbers
    best: SeedNumbers
    top5: SeedNumbers
    test_difference: Difference
    """The baseline lacks it."""


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
    """Only if a sweep chose the arms' settings; see `report.summary.with_sweep`."""


class ScoreSummary(Summary[ScoreArm], total=False):
    """summary.json of classifiers."""

    task: str
    score: str
    """accuracy or map."""


def baseline_arm(summary: Summary[Arm]) -> Arm:
    """The baseline's entry of the summary; empty if nothing is compared."""
    empty: Any = {}
    return summary["arms"].get(summary["baseline"] or "", empty)
