"""Run folders read for a report: their curves, and whether their losses can be compared. No torch, no plots."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from waveletgpt.errors import UserError
from waveletgpt.runs.folder import RunFolder
from waveletgpt.runs.records import RunRecord

# Recipe keys that may differ between the seeds of one arm, because they do not change what is trained.
_INCIDENTAL = {
    "seed", "data", "device", "training.threads", "training.workers", "training.keep_checkpoints", "source.cache_dir",
    "source.data_dir",
}  # fmt: skip


def same_performance_step(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """First step at which the loss is at or below `target`, linearly interpolated between evaluations.

    Args:
        curve: (step, loss in nats) in order of step. Losses that are not finite count as not measured.
        target: the loss to reach, in nats.

    Returns:
        The step, not rounded, or None if the curve never reaches the target (or `target` is not finite).
    """
    if not math.isfinite(target):
        return None
    before: tuple[float, float] | None = None
    for step, loss in curve:
        if not math.isfinite(loss):
            continue
        if loss <= target:
            if before is None:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def interpolate(curve: Sequence[tuple[float, float]], x: float) -> float | None:
    """Value of a piecewise linear curve at `x`; None outside it."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return curve[0][1] if curve and x == curve[0][0] else None


@dataclass(frozen=True)
class Record:
    """The content of a run folder. Its numbers count if it is `usable`: finished with a finite loss."""

    arm: str
    seed: int
    path: Path
    info: RunRecord
    metrics: list[dict[str, Any]] = field(repr=False)

    @property
    def curve(self) -> list[tuple[float, float, float]]:
        """(step, training seconds, validation loss) for every evaluation."""
        return [(row["step"], row["seconds"], number(row["nll"])) for row in self.metrics if "nll" in row]

    @property
    def losses(self) -> list[tuple[float, float]]:
        return [(step, loss) for step, _, loss in self.curve]

    @property
    def final_nll(self) -> float:
        """The final loss of the result or, before that is written, of the last evaluation. NaN without either."""
        value = (self.info.get("result") or {}).get("final_nll")
        return number(value) if value is not None else (self.losses[-1][1] if self.losses else math.nan)

    @property
    def steps(self) -> int:
        return int((self.info.get("result") or {}).get("steps") or (self.curve[-1][0] if self.curve else 0))

    @property
    def seconds(self) -> float:
        value = (self.info.get("result") or {}).get("seconds")
        return number(value) if value is not None else (self.curve[-1][1] if self.curve else math.nan)

    @property
    def tokens_per_step(self) -> float | None:
        rows = [row for row in self.metrics if row.get("step") and row.get("tokens")]
        return rows[-1]["tokens"] / rows[-1]["step"] if rows else None

    @property
    def was_disturbed(self) -> bool:
        """Whether the mean speed is more than 15 % below the median speed."""
        result = self.info.get("result") or {}
        tokens, seconds, median = (number(result.get(key)) for key in ("tokens", "seconds", "tokens_per_second"))
        return seconds > 0 and tokens / seconds < 0.85 * median

    @property
    def usable(self) -> bool:
        return self.info.get("status") == "finished" and bool(self.curve) and math.isfinite(self.final_nll)


def arm_of(run: RunFolder) -> str:
    """The name of a run's arm; of its folder, where run.json has none."""
    return str(run.info.get("arm") or run.path.name)


def read_records(runs: Iterable[RunFolder]) -> list[Record]:
    """Read run folders, grouped by arm in the order given, seeds ascending.

    Runs with the same arm name but different recipes, or with the same name and seed, are different arms. The name of
    their folder is then added to the arm's.

    Raises:
        UserError: if a folder cannot be read, is named twice, or the runs cannot be compared (see `check_comparable`).
    """
    records: list[Record] = []
    for run in runs:
        info = run.info
        if any(record.path.resolve() == run.path.resolve() for record in records):
            raise UserError(f"run folder {run.path} is named twice: name it once")
        records.append(Record(arm_of(run), int(info.get("seed") or 0), run.path, info,
                              run.metrics()))  # fmt: skip
    by_arm: dict[str, list[Record]] = {}
    for record in records:
        by_arm.setdefault(record.arm, []).append(record)
    grouped: list[Record] = []
    for name, group in by_arm.items():
        same_recipe = all(_training_of(r.info) == _training_of(group[0].info) for r in group)
        if same_recipe and len({r.seed for r in group}) == len(group):
            grouped += sorted(group, key=lambda r: r.seed)
        else:
            unique = len({r.path.name for r in group}) == len(group)
            grouped += [
                Record(f"{name} ({r.path.name if unique else r.path})", r.seed, r.path, r.info, r.metrics)
                for r in group
            ]
    check_comparable(grouped)
    return grouped


def check_comparable(records: Sequence[Record]) -> None:
    """Check that all runs have the same validation windows of the same data, so that their losses can be compared.

    Raises:
        UserError: naming the two runs and what differs.
    """
    for record in records[1:]:
        for what, read in (("data", data_of), ("evaluation windows", windows_of)):
            ours, theirs = read(records[0].info), read(record.info)
            if ours != theirs:
                raise UserError(
                    f"{records[0].path} and {record.path} cannot be compared: their {what} differ ({ours} and {theirs})"
                )


def data_of(info: RunRecord) -> str:
    """Text that identifies a run's data. It is not the name, because one folder can have several names."""
    data = info.get("data") or {}
    return f"fingerprint {data.get('fingerprint')}, {data.get('vocab_size')} tokens in vocabulary"


def windows_of(info: RunRecord) -> str:
    """The settings that determine the validation windows of a run."""
    windows = {
        key: value
        for key, value in flatten(info.get("recipe") or {}).items()
        if key.split(".")[-1] in ("eval_windows", "eval_split")
    }
    windows["context"] = (info.get("model") or {}).get("n_positions")
    return ", ".join(f"{key} {value}" for key, value in windows.items())


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"n_head": 4}} -> {"model.n_head": 4}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def settings_of(info: RunRecord) -> dict[str, Any]:
    """The flattened recipe, without the seed and settings that do not change the training (folders, flags).

    Settings that are None are left out too, because runs of earlier versions lack newer settings.
    """
    recipe = flatten(info.get("recipe") or {})
    return {key: value for key, value in recipe.items() if key not in _INCIDENTAL and value is not None}


def _training_of(info: RunRecord) -> dict[str, Any]:
    """`settings_of`, with the batch of all processes together instead of the batch of each."""
    settings = settings_of(info)
    dealt = [settings.pop(key, 1) for key in ("batch_size", "training.accumulation")]
    return {**settings, "sequences": math.prod([*dealt, (info.get("environment") or {}).get("processes", 1)])}


def number(value: Any) -> float:
    """A number as it stands in a record; NaN for anything else."""
    return float(value) if isinstance(value, int | float) else math.nan
