"""The commands of classifiers: lra, classify, predict, and what evaluate prints of one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional, Suppress

from waveletgpt.classify.settings import ClassifierPreset, ClassifierRecipe, TaskSettings
from waveletgpt.cli.arms import Device, Engine, Flat, Mixing, Workers, train_arms
from waveletgpt.cli.printing import say
from waveletgpt.errors import UserError, suggest
from waveletgpt.training import processes


@dataclass(frozen=True)
class ClassifierOptions(ClassifierRecipe):
    base_model: Suppress[str | None] = None
    from_pretrained: Suppress[bool] = False
    pretrained: Suppress[Literal["replace"] | None] = None
    mixing: Mixing = ClassifierRecipe.mixing
    source: Annotated[TaskSettings, Flat] = field(default_factory=TaskSettings)  # type: ignore[assignment]


@dataclass(frozen=True)
class ClipOptions(ClassifierOptions):
    preset: ClassifierPreset = "clips"  # type: ignore[assignment]


@dataclass(frozen=True)
class Lra:
    """Train several arms as classifiers on a task of the Long Range Arena and report their accuracy.

    Tasks: listops, text, retrieval, image, pathfinder, pathx. The first arm is the baseline.
    """

    task: Positional[str] = ""
    """listops, text, retrieval, image, pathfinder or pathx."""
    data: str | None = None
    """Folder or archive with the task's official files; default: generated, or the named data set."""
    out: str | None = None
    """Folder to write: report.html, summary.json, curves.csv, and a run folder per arm and seed (default:
    runs/lra-TASK)."""
    arms: tuple[str, ...] = ("none", "fixed")
    """Arms, the baseline first, as in `waveletgpt compare`."""
    seeds: int = 1
    """Seeds per arm, from --seed on."""
    workers: Workers = "auto"
    engine: Engine = "local"
    resume: bool = False
    """Go on with the comparison in --out."""
    recipe: str | None = None
    """YAML file of settings, or a name such as lra-laptop; options given here win over it."""
    settings: Annotated[ClassifierOptions, Flat] = field(default_factory=ClassifierOptions)

    def run(self) -> None:
        from waveletgpt.classify.long_range_arena import TASKS, prepare_task

        with processes.agreed():
            if self.task not in TASKS:
                raise UserError(f'lra: no task "{self.task}"; there are {", ".join(TASKS)}{suggest(self.task, TASKS)}')
            other = self.settings.modality
            if other not in (None, TASKS[self.task].modality):
                raise UserError(f"lra {self.task} has a modality of its own, not {other}; leave it out")
        out = self.out or f"runs/lra-{self.task}"
        train_arms(
            self, lambda: prepare_task(self.task, self.data, self.settings.source, processes.first()), self.task, out
        )


@dataclass(frozen=True)
class Classify:
    """Train several arms as classifiers of recordings and report accuracy, or mean average precision.

    DATA: a folder per class, or the layout of FSD50K, ESC-50 or the Free Spoken Digit Dataset.
    """

    data: Positional[str] = ""
    """Folder, archive or data set name."""
    out: str = "runs/classify"
    """Folder to write: report.html, summary.json, curves.csv, and a run folder per arm and seed."""
    arms: tuple[str, ...] = ("none", "fixed")
    """Arms, the baseline first, as in `waveletgpt compare`."""
    seeds: int = 1
    """Seeds per arm, from --seed on."""
    workers: Workers = "auto"
    engine: Engine = "local"
    resume: bool = False
    """Go on with the comparison in --out."""
    recipe: str | None = None
    """YAML file of settings, or a name such as lra-laptop; options given here win over it."""
    settings: Annotated[ClipOptions, Flat] = field(default_factory=ClipOptions)

    def run(self) -> None:
        from waveletgpt.classify.clips import prepare_clips

        with processes.agreed():
            if not self.data:
                raise UserError("classify: name a folder of recordings, such as one folder per class")
            if self.settings.modality not in (None, "audio"):
                raise UserError(f"classify reads recordings, not --modality {self.settings.modality}; leave it out")
        train_arms(self, lambda: prepare_clips(self.data, self.settings.source, processes.first()), self.data, self.out)


@dataclass(frozen=True)
class Predict:
    """Tell the classes of files with a classifier's run."""

    run_folder: Positional[str]
    """Run folder of `waveletgpt classify` or `waveletgpt lra`."""
    files: Positional[tuple[str, ...]] = ()
    """Recordings, texts or pictures, as the run was trained on; for retrieval the two texts of each pair in turn."""
    top: int = 3
    """How many of the likeliest classes to print."""
    device: Device = "auto"
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from waveletgpt.classify.prediction import predict_files

        rows = predict_files(self.run_folder, self.files, self.top, self.device)
        if self.json:
            print(json.dumps([{"file": name, "classes": dict(classes)} for name, classes in rows], indent=1))
            return
        for name, classes in rows:
            say(f"{name}: " + ", ".join(f"{label} {share:.1%}" for label, share in classes))


def is_classifier(folder: str) -> bool:
    """Whether a run is a classifier's; raises UserError where there is no run."""
    from waveletgpt.classify.scores import CLASSIFICATION
    from waveletgpt.runs.folder import RunFolder

    return RunFolder.open(folder).info.get("task") == CLASSIFICATION


def print_scores(run_folder: str, split: str, batch_size: int, device: str, as_json: bool) -> None:
    """The scores of a classifier on a split, in a line or as JSON."""
    from waveletgpt.classify.prediction import evaluate_classifier

    found = evaluate_classifier(run_folder, split, batch_size, device)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    scores = ", ".join(f"{name} {found[name]:.2%}" for name in ("accuracy", "map", "top5") if name in found)
    say(f"{found['split']}: {scores} ({found['recordings']:,} examples)")
