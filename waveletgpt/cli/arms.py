"""What the commands that train arms share: options, and the work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from waveletgpt.classify.settings import ClassifierRecipe
from waveletgpt.cli.printing import print_summary, say
from waveletgpt.training import processes
from waveletgpt.training.recipe import DeviceName, Recipe, added_mixing_names, mixing_names

Flat = arg(name="")
Mixing = Annotated[
    str,
    arg(help=f"The filter over time: {', '.join(mixing_names())}; with --model: {', '.join(added_mixing_names())}."),
]
_WORKERS = (
    "Runs at a time, each in a process of its own and, where there are any, on a GPU of its own: a number, or auto (as "
    "many as GPUs; 1 on CPUs)."
)
Workers = Annotated[str, arg(help=_WORKERS)]
_ENGINE = "ray: each run is a task of a Ray cluster, which decides how many run at a time."
Device = Annotated[DeviceName, arg(help="Where it computes; auto: on a GPU if there is one.")]
Engine = Annotated[Literal["local", "ray"], arg(help=_ENGINE)]


def plain(settings: Recipe) -> Any:
    """The parsed settings as a `Recipe` or `ClassifierRecipe` proper."""
    kind = ClassifierRecipe if isinstance(settings, ClassifierRecipe) else Recipe
    return kind(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(kind)})


def train_arms(command: Any, prepare: Callable[[], Any], data: str | list[str], out: str) -> None:
    """Train the arms of a command on the store that `prepare` makes, print the table and where the report is.

    `command` has `settings`, `arms`, `seeds`, `resume`, `workers` and `engine`.
    """
    from waveletgpt.training.compare import compare, plan

    recipe = plain(command.settings)
    planned: dict[str, Any] = {
        name: getattr(command, name) for name in ("arms", "seeds", "resume", "workers", "engine")
    }
    plan(recipe, out, **planned)  # tells of a mistake before minutes are spent on the data
    with processes.agreed():
        store = prepare()
    summary = compare(recipe, store, out, data=data, **planned)
    print_summary(summary)
    say(f"report: {Path(out) / 'report.html'}")
