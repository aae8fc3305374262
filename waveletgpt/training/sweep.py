"""A sweep: every arm is tried with every combination of some settings, and gets the one that served it best.

One learning rate for all arms misjudges them: models with mixing are best at other rates than models without. The
trials are a comparison of their own, in a folder beside the one they are for, so that they can be read and resumed.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from waveletgpt.errors import UserError
from waveletgpt.report.summary import SWEEP_FILE, sweep_folder
from waveletgpt.runs.folder import COPY, write_json
from waveletgpt.training import processes
from waveletgpt.training.compare import compare, parse_arms
from waveletgpt.training.recipe import Recipe


def parse_grid(specs: Sequence[str]) -> dict[str, list[str]]:
    """`["lr=2e-3,4e-3", "weight_decay=0,0.1"]` -> name and values of each setting.

    Raises:
        UserError: no name, fewer than two values, a setting or a value given twice.
    """
    grid: dict[str, list[str]] = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        name = name.strip()
        values = [value.strip() for value in rest.split(",") if value.strip()]
        if not name or not equals or len(values) < 2:
            raise UserError(f"sweep {spec}: give a setting and two or more values, as in lr=2e-3,4e-3,8e-3")
        if name in grid or len(set(values)) < len(values):
            raise UserError(f"sweep {spec}: {'the setting' if name in grid else 'a value'} is given twice")
        grid[name] = values
    return grid


def variants(arm: str, grid: dict[str, list[str]]) -> dict[tuple[str, ...], str]:
    """Each combination of values -> the arm with it, such as `fixed:max_window=4,lr=4e-3`.

    Raises:
        UserError: the arm sets one of the settings itself.
    """
    mixing, _, own = arm.partition(":")
    parts = [part for part in own.split(",") if part]
    taken = {bare_name(part.partition("=")[0]) for part in parts} & set(map(bare_name, grid))
    if taken:
        raise UserError(f"arm {arm} sets {', '.join(sorted(taken))} itself, which is also swept; leave one of them out")
    return {
        combination: f"{mixing}:" + ",".join([*parts, *map("=".join, zip(grid, combination, strict=True))])
        for combination in itertools.product(*grid.values())
    }


def bare_name(name: str) -> str:
    """A setting's name without its group: `training.weight-decay` is `weight_decay`."""
    return name.strip().replace("-", "_").rpartition(".")[2]


def choose(losses: dict[tuple[str, ...], float | None], grid: dict[str, list[str]]) -> dict[str, Any]:
    """The combination with the lowest loss, and the settings of which it has the first or the last value.

    Returns:
        best (setting -> value), edges (names of settings whose grid ends there), trials ([{"settings", "loss"}, ...]).

    Raises:
        UserError: no trial has a finite loss.
    """
    finite = {key: loss for key, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        raise UserError(f"every trial of {', '.join(grid)} diverged; sweep lower values")
    best = min(finite, key=lambda key: finite[key])
    edges = []
    for (name, values), value in zip(grid.items(), best, strict=True):
        numbers = [number for one in values if (number := _as_number(one)) is not None]
        if len(numbers) == len(values) and _as_number(value) in (min(numbers), max(numbers)):
            edges.append(name)
    return {
        "best": dict(zip(grid, best, strict=True)),
        "edges": edges,
        "trials": [{"settings": dict(zip(grid, key, strict=True)), "loss": loss} for key, loss in losses.items()],
    }


def _as_number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None  # words have no order, and no edge


def sweep(
    recipe: Recipe,
    store: Any,
    out: str | Path,
    *,
    data: str | Sequence[str],
    arms: Sequence[str],
    grid: dict[str, list[str]],
    steps: int | None = None,
    resume: bool = False,
    workers: str | int = 1,
    engine: str = "local",
) -> list[str]:
    """Try every arm with every combination of `grid`, and give each arm its best by loss on the validation split.

    Args:
        out: folder of the comparison that the sweep is for; trials go to `sweep_folder(out)`, with the recipe's seed.
        workers, engine: trials at a time, and where; see `compare`.
        steps: length of a trial, which then draws no samples; None: as long as the comparison's runs, and the best
            trials are used as runs.

    Returns:
        The arms with their best settings, to be compared in `out` with `resume=True`. What was tried is recorded beside
        the trials, where the report finds it.

    Raises:
        UserError: see `parse_grid`, `variants`, `choose` and `compare`.
    """
    named = processes.from_first(lambda: {arm: variants(arm, grid) for arm in arms})
    trials = [variant for combinations in named.values() for variant in combinations.values()]
    # Only the loss of a shortened trial counts; drawing thousands of samples of sound takes longer than the trial.
    changes = {"max_steps": steps, "training": {"samples": 0}}
    shortened = recipe if steps is None else recipe.override(changes, "sweep")
    # Finds mistakes before the first step. An arm from a recipe file has another name than was given.
    parsed = processes.from_first(lambda: parse_arms(trials, shortened))
    called = dict(zip(trials, (arm.name for arm in parsed), strict=True))
    place = sweep_folder(out)
    summary = compare(shortened, store, place, data=data, arms=trials, resume=resume, workers=workers, engine=engine)

    def record() -> list[str]:
        found = {
            arm: choose({key: _final_loss(summary, called[variant]) for key, variant in combinations.items()}, grid)
            for arm, combinations in named.items()
        }
        best = {arm: named[arm][tuple(entry["best"].values())] for arm, entry in found.items()}
        if steps is None:
            for arm in parse_arms(list(best.values()), recipe):  # the trial is that arm's run of the first seed
                _copy_run(place / arm.folder(recipe.seed), Path(out) / arm.folder(recipe.seed))
        write_json(
            place / SWEEP_FILE,
            {
                "grid": grid,
                "steps": shortened.max_steps,
                "seed": recipe.seed,
                "fingerprint": store.fingerprint,
                "arms": {called[best[arm]]: entry for arm, entry in found.items()},
            },
        )
        return list(best.values())

    return processes.from_first(record)


def _copy_run(source: Path, target: Path) -> None:
    """Copy a run folder, whole or not at all, where there is none."""
    if target.exists():
        return
    partial = target.with_name(f".{target.name}{COPY}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(target)


def _final_loss(summary: dict[str, Any], arm: str) -> float | None:
    """None where the trial diverged."""
    value: float | None = summary["arms"].get(arm, {}).get("final_nll", {}).get("mean")
    return value
