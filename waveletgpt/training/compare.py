"""A comparison: arms x seeds on the same batches, one run folder each, then summary and report.

`report/summary.py` has the figures (pure functions over curves), `classify/scores.py` those of classifiers, and
`report/` the page.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waveletgpt.data.parallel import cores
from waveletgpt.errors import UserError, tell
from waveletgpt.recipes import filter_names, load_recipe
from waveletgpt.report import write_results
from waveletgpt.report.reading import windows_of
from waveletgpt.runs.folder import RunFolder
from waveletgpt.settings import check_choice
from waveletgpt.training import processes
from waveletgpt.training.recipe import Recipe, check_settings_are_read
from waveletgpt.training.resuming import check_comparison_folder
from waveletgpt.training.workers import Job, one_by_one, side_by_side, worker_count

if TYPE_CHECKING:
    from waveletgpt.data import Mixture, TokenStore
    from waveletgpt.training.task import HasTask, Task


ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Arm:
    """One line of a comparison: a mixing, and the settings it overrides (`none:n_layer=12,lr=1e-3`)."""

    name: str
    recipe: Recipe

    def folder(self, seed: int) -> str:
        return re.sub(r"[^A-Za-z0-9.=_-]+", "_", self.name) + f"-seed{seed}"


def parse_arms(specs: list[str] | tuple[str, ...], recipe: Recipe) -> list[Arm]:
    """The arms that are named: mixings, or recipes by name or file, with settings of their own; first the baseline.

    Raises:
        UserError: unknown mixing or setting, one of the data or the seed, an arm given twice, no arm.
    """
    if not specs:
        raise UserError("`arms` needs at least one arm, such as none and fixed")
    arms: list[Arm] = []
    for spec in specs:
        first, _, rest = spec.partition(":")
        changes: dict[str, Any] = {}
        if first.endswith((".yaml", ".yml")) or (first not in recipe.mixings() and first in filter_names()):
            changes = {name: value for name, value in load_recipe(first).items() if name not in ("data", "compare")}
            spec = Path(first).stem + (f":{rest}" if rest else "")
        else:
            changes["mixing"] = first
        where = f"`arms={spec}`"
        for part in filter(None, rest.split(",")):
            name, equals, value = part.partition("=")
            if not equals:
                raise UserError(f'{where}: "{part}" is not name=value, as in none:n_layer=12,lr=1e-3')
            changes[name.strip()] = value.strip()
        if first == changes.get("mixing"):
            base = {name: value for name, value in changes.items() if name == "base_model"}
            known = recipe.override(base, where).mixings()
            if first not in known:  # reading all recipes takes a moment: only for the message
                check_choice("`arms`", first, dict.fromkeys((*known, *filter_names())))
        arm = Arm(spec, recipe.override(changes, where))
        own = [*changes.get("model", ()), *(name.replace("-", "_").removeprefix("model.") for name in changes)]
        try:
            check_settings_are_read(arm.recipe, [arm.recipe.mixing], own)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        for name in ("modality", "source", "seed"):
            if getattr(arm.recipe, name) != getattr(recipe, name):
                raise UserError(f"{where}: all arms share the data and the seeds; set them for the comparison")
        same = next((other.name for other in arms if other.folder(0) == arm.folder(0)), None)
        if same is not None:
            raise UserError(f"`arms` names {spec} twice" + (f", once as {same}" if same != spec else ""))
        arms.append(arm)
    check_settings_are_read(recipe, [arm.recipe.mixing for arm in arms])
    return arms


def with_seeds(arms: list[Arm], seeds: int) -> list[tuple[Arm, Recipe]]:
    """The runs of a comparison, in the order in which they are trained: every arm with a seed, then with the next.

    Raises:
        UserError: no seed.
    """
    if seeds < 1:
        raise UserError(f"`seeds` must be at least 1, got {seeds}")
    first = arms[0].recipe.seed
    return [
        (arm, arm.recipe.override({"seed": seed}, "`seeds`")) for seed in range(first, first + seeds) for arm in arms
    ]


def runs_of(recipe: Recipe, out: Path, arms: list[str] | tuple[str, ...], seeds: int) -> list[tuple[Arm, Recipe]]:
    """The runs of a comparison in `out`, in the order in which they are trained.

    All are evaluated on the same windows, also those whose steps or batches differ, and as runs that are there already.

    Raises:
        UserError: see `parse_arms` and `with_seeds`.
    """
    begun = [run for arm in parse_arms(arms, recipe) if (run := RunFolder(out / arm.folder(recipe.seed))).exists()]
    measured = recipe.with_evaluations(begun[0].info["recipe"] if begun else None)
    parsed = parse_arms(arms, recipe.override({"eval_windows": measured.eval_windows}, "compare"))
    return [
        (arm, r.with_evaluations(there.info["recipe"] if there.exists() else measured.as_dict()))
        for arm, r in with_seeds(parsed, seeds)
        for there in [RunFolder(out / arm.folder(r.seed))]
    ]


def plan(
    recipe: Recipe,
    out: str | Path,
    *,
    arms: list[str] | tuple[str, ...],
    seeds: int = 1,
    resume: bool = False,
    workers: str | int = 1,
    engine: str = "local",
) -> list[Arm]:
    """The arms of a comparison that may begin or go on in `out`: all that can be checked before data is prepared.

    Raises:
        UserError: bad arms, seeds or workers, an `out` that holds something else, or a comparison and no `resume`.
    """

    def decide() -> list[Arm]:
        parsed = parse_arms(arms, recipe)
        names = {arm.folder(settings.seed) for arm, settings in with_seeds(parsed, seeds)}
        worker_count(workers, "cpu", len(names))
        check_choice("`engine`", engine, ENGINES)
        if engine == "ray" and workers not in ("auto", 1):
            raise UserError("`engine=ray` decides by itself how many runs there are at a time; leave `workers` out")
        check_comparison_folder(Path(out), names, resume)
        for arm in parsed:
            check_base_model(arm.recipe)
        return parsed

    parsed = processes.from_first(decide)
    processes.check_shared(Path(out))
    return parsed


def check_base_model(recipe: Recipe) -> None:
    """Raises UserError where a recipe's `base_model` is none, or does not take its settings."""
    if recipe.base_model is not None:
        from waveletgpt.integrations.architecture import check

        check(recipe)


def compare(
    recipe: Recipe,
    store: TokenStore | Mixture | HasTask,
    out: str | Path,
    *,
    data: str | Sequence[str],
    arms: list[str] | tuple[str, ...],
    seeds: int = 1,
    resume: bool = False,
    workers: str | int = 1,
    engine: str = "local",
) -> dict[str, Any]:
    """Train every arm with every seed, and write summary.json, curves.csv and report.html in `out`.

    Finished runs are kept and unfinished ones go on, so an interrupted comparison continues with `resume=True`. The
    report is renewed after every run. An arm that diverges is reported as failed; the others go on.

    Args:
        workers: runs at a time, each in a process of its own; "auto": one for each GPU, without GPUs one. Workers know
            the package, but nothing that was registered with it from outside.
        engine: "local", or "ray" for tasks of a Ray cluster, which then decides how many run at a time.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: see `plan`; a setting that the model does not take, or other than the runs in `out` have.
        Interrupted: Ctrl-C; what was trained is saved.
        Diverged: every run did.
    """
    from waveletgpt.training.task import task_of
    from waveletgpt.training.trainer import Diverged

    out = Path(out)
    plan(recipe, out, arms=arms, seeds=seeds, resume=resume, workers=workers, engine=engine)
    runs = runs_of(recipe, out, arms, seeds)
    parsed = [arm for arm, _ in runs[: len(arms)]]
    begun = [run for arm in parsed if (run := RunFolder(out / arm.folder(recipe.seed))).exists()]
    processes.from_first(lambda: check_models(parsed, task_of(store), begun))
    count = processes.from_first(lambda: worker_count(workers, recipe.device, len(runs)))
    if count > 1 and engine == "local":  # runs that share the machine share its cores, too
        share = max(1, cores() // count)
        runs = [(arm, r.override({"threads": r.training.threads or share}, "`workers`")) for arm, r in runs]
    jobs = [Job(r, store, out / arm.folder(r.seed), data, arm.name, resume, count) for arm, r in runs]
    ended: set[Path] = set()
    summary: dict[str, Any] = {}

    def renew() -> dict[str, Any]:
        """The summary of the runs that have ended; empty before one of the baseline has, unless all have."""
        begun = [job.run for job in jobs if job.folder in ended and job.run.exists()]
        baseline = next((arm for run in begun if (arm := run.info["arm"]) == parsed[0].name), None)
        if not begun or (baseline is None and len(ended) < len(jobs)):
            return {}
        return write_results(out, begun, baseline)

    if engine == "ray":
        from waveletgpt.training.ray_engine import on_ray

        ends = on_ray(jobs)
    else:
        ends = side_by_side(jobs, count) if count > 1 else one_by_one(jobs)
    with contextlib.closing(ends):
        for job, error in ends:
            if error is not None and processes.first():
                tell(f"waveletgpt: {job.title}: {error}")
            ended.add(job.folder)
            gc.collect()
            summary = processes.from_first(renew)
    if not processes.from_first(lambda: any(job.run.finished for job in jobs)):
        raise Diverged("no run came to its end: see above")
    return summary


def check_models(arms: list[Arm], task: Task, begun: list[RunFolder]) -> None:
    """Build the model of each arm, so that wrong settings are found before hours of training.

    Raises:
        UserError: settings that the model does not take, arms that are measured on other windows than the first, or an
            architecture other than the one that a run of the arm has `begun` with.
    """
    from waveletgpt.integrations.architecture import check_identity

    windows = []
    models = {run.info["arm"]: run.info.get("model") or {} for run in begun}
    for arm in arms:
        model = task.build_model(arm.recipe)
        check_identity(model, models.get(arm.name) or {}, arm.recipe.base_model)
        context = task.sequence_tokens(model)
        windows.append(windows_of({"recipe": arm.recipe.as_dict(), "model": {"n_positions": context}}))
        if windows[-1] != windows[0]:
            raise UserError(
                f"`arms={arm.name}` cannot be compared with {arms[0].name}: their evaluation windows would differ "
                f"({windows[-1]} and {windows[0]}); set these for the comparison, not for an arm"
            )
