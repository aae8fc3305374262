"""A comparison: arms x seeds on the same batches, one run folder each, then summary and report.

`report/summary.py` has the figures (pure functions over curves), `classify/scores.py` those of classifiers, and
`report/` the page.
"""

from __future__ import annotations

import gc
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waveletgpt.errors import UserError
from waveletgpt.model.configuration import MIXINGS
from waveletgpt.report import write_results
from waveletgpt.report.summary import windows_of
from waveletgpt.runs.folder import RunFolder
from waveletgpt.training.recipe import Recipe, check_choice
from waveletgpt.training.resuming import check_comparison_folder

if TYPE_CHECKING:
    from waveletgpt.classify.examples import ExampleStore
    from waveletgpt.data import TokenStore


@dataclass(frozen=True)
class Arm:
    """One line of a comparison: a mixing, and the settings it overrides (`none:n_layer=12,lr=1e-3`)."""

    name: str
    recipe: Recipe

    def folder(self, seed: int) -> str:
        return re.sub(r"[^A-Za-z0-9.=_-]+", "_", self.name) + f"-seed{seed}"


def parse_arms(specs: list[str] | tuple[str, ...], recipe: Recipe) -> list[Arm]:
    """The arms that `--arms` names; the first is the baseline.

    Raises:
        UserError: unknown mixing or setting, one of the data or the seed, an arm given twice, no arm.
    """
    if not specs:
        raise UserError("--arms needs at least one arm, such as `--arms none fixed`")
    arms: list[Arm] = []
    for spec in specs:
        mixing, _, rest = spec.partition(":")
        check_choice("--arms", mixing, MIXINGS)
        changes: dict[str, Any] = {"mixing": mixing}
        for part in filter(None, rest.split(",")):
            name, equals, value = part.partition("=")
            if not equals:
                raise UserError(f'--arms {spec}: "{part}" is not name=value, as in none:n_layer=12,lr=1e-3')
            changes[name.strip()] = value.strip()
        arm = Arm(spec, recipe.override(changes, f"--arms {spec}"))
        for name in ("modality", "source", "seed"):
            if getattr(arm.recipe, name) != getattr(recipe, name):
                raise UserError(f"--arms {spec}: all arms share the data and the seeds; set them for the comparison")
        same = next((other.name for other in arms if other.folder(0) == arm.folder(0)), None)
        if same is not None:
            raise UserError(f"--arms names {spec} twice" + (f", once as {same}" if same != spec else ""))
        arms.append(arm)
    return arms


def plan(
    recipe: Recipe, out: str | Path, *, arms: list[str] | tuple[str, ...], seeds: int = 1, resume: bool = False
) -> list[Arm]:
    """The arms of a comparison that may begin or go on in `out`: all that can be checked before data is prepared.

    Raises:
        UserError: bad arms or seeds, an `out` that holds something else, or a comparison and no `resume`.
    """
    parsed = parse_arms(arms, recipe)
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    names = {arm.folder(seed) for arm in parsed for seed in range(recipe.seed, recipe.seed + seeds)}
    check_comparison_folder(Path(out), names, resume)
    return parsed


def compare(
    recipe: Recipe,
    store: TokenStore | ExampleStore,
    out: str | Path,
    *,
    data: str,
    arms: list[str] | tuple[str, ...],
    seeds: int = 1,
    resume: bool = False,
) -> dict[str, Any]:
    """Train every arm with every seed, and write summary.json, curves.csv and report.html in `out`.

    Finished runs are kept and unfinished ones go on, so an interrupted comparison continues with `resume=True`. The
    report is renewed after every run. An arm that diverges is reported as failed; the others go on.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: see `plan`; a setting that the model does not take, or other than the runs in `out` have.
        Interrupted: Ctrl-C; what was trained is saved.
        Diverged: every run did.
    """
    from waveletgpt.training.trainer import Diverged, task_of, train

    out = Path(out)
    planned = plan(recipe, out, arms=arms, seeds=seeds, resume=resume)
    # All arms are measured alike, whatever they say of steps and batches, and as those that are there already.
    begun = [run for arm in planned if (run := RunFolder(out / arm.folder(recipe.seed))).exists()]
    measured = recipe.with_evaluations(begun[0].info["recipe"] if begun else None)
    parsed = parse_arms(arms, recipe.override({"eval_windows": measured.eval_windows}, "compare"))
    windows = []
    for arm in parsed:  # tells of settings that do not go before hours are spent
        model = task_of(store).build_model(arm.recipe)
        windows.append(windows_of({"recipe": arm.recipe.as_dict(), "model": {"n_positions": model.config.n_positions}}))
        if windows[-1] != windows[0]:
            raise UserError(
                f"--arms {arm.name} cannot be compared with {parsed[0].name}: their evaluation windows would differ "
                f"({windows[-1]} and {windows[0]}); set these for the comparison, not for an arm"
            )

    runs: list[RunFolder] = []
    summary: dict[str, Any] = {}
    for seed in range(recipe.seed, recipe.seed + seeds):
        for arm in parsed:
            folder = out / arm.folder(seed)
            there = RunFolder(folder).info["recipe"] if RunFolder(folder).exists() else measured.as_dict()
            settings = arm.recipe.with_evaluations(there).override({"seed": seed}, "--seeds")
            try:
                runs.append(train(settings, store, folder, data=data, arm=arm.name, resume=resume))
            except Diverged as error:
                print(f"waveletgpt: {arm.name} seed {seed}: {error}", file=sys.stderr)
                runs.append(RunFolder(folder))
            gc.collect()
            if any(run.info["arm"] == parsed[0].name for run in runs):
                summary = write_results(out, runs, parsed[0].name)
    if not any(run.finished for run in runs):
        raise Diverged("no run came to its end: see above")
    return summary
