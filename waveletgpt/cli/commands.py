"""The commands. Each is a dataclass: its fields are the options, its docstring the help, `run` the work.

Those of language models and of reports are here; `COMMANDS` has all. Heavy libraries are imported inside `run`, so that
--help is instant and a mistake is told before they load.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from waveletgpt.classify.settings import CLASSIFIER_PRESETS
from waveletgpt.cli import wording
from waveletgpt.cli.arms import Device, Engine, Flat, Mixing, Workers, plain, train_arms
from waveletgpt.cli.classifiers import Classify, Lra, Predict, is_classifier, print_scores
from waveletgpt.cli.data import DEFAULT_DATA, DataList, DataPrepare, named, prepare_store
from waveletgpt.cli.printing import by_source, print_ladder, print_summary, say
from waveletgpt.data.settings import DataSettings
from waveletgpt.errors import UserError, suggest
from waveletgpt.training import processes
from waveletgpt.training.recipe import Recipe, check_settings_are_read


@dataclass(frozen=True)
class Settings(Recipe):
    base_model: Annotated[str | None, arg(name="model", aliases=("--base-model",))] = None
    mixing: Mixing = Recipe.mixing
    source: Annotated[DataSettings, Flat] = field(default_factory=DataSettings)


@dataclass(frozen=True)
class Train:
    """Train one model on DATA: a file, a folder, an archive, or a name from `waveletgpt data list`."""

    data: Positional[tuple[str, ...]] = (DEFAULT_DATA,)
    """File, folder, archive, address (https://, s3://, gs://, az://, hf://datasets/), data set name, or hf:OWNER/NAME;
    several, each with a weight, are mixed: a/=0.7 b/=0.3."""
    out: str = "runs/train"
    """Run folder to write."""
    arm: str | None = None
    """What reports call the run (default: the mixing)."""
    resume: bool = False
    """Go on with the run in --out, exactly where it was saved."""
    recipe: str | None = None
    """YAML file of settings, or a name such as demo; options given here win over it."""
    settings: Annotated[Settings, Flat] = field(default_factory=Settings)

    def run(self) -> None:
        from waveletgpt.runs.folder import RunFolder
        from waveletgpt.training.compare import check_base_model
        from waveletgpt.training.resuming import check_run_folder
        from waveletgpt.training.trainer import train

        recipe, run = plain(self.settings), RunFolder(self.out)
        check_settings_are_read(recipe, [recipe.mixing])
        processes.from_first(lambda: check_run_folder(run, self.resume))
        processes.check_shared(run.path)
        processes.from_first(lambda: check_base_model(recipe))
        with processes.agreed():
            store = prepare_store(self.data, self.settings, self.out)
        train(recipe, store, run.path, data=named(self.data), arm=self.arm, resume=self.resume)
        if not processes.first():
            return
        result = run.info["result"]
        bits = f", {result['bits_per_byte']:.4f} bits per byte" if result["bits_per_byte"] else ""
        say(f"validation loss {result['final_nll']:.4f} nats per token{bits}{by_source(result['breakdown'])}")
        share = f", {result['mfu']:.1%} of this GPU's peak" if result["mfu"] else ""
        say(
            f"{result['tokens_per_second']:,.0f} tokens/s, {result['flops_per_second'] / 1e9:,.3g} GFLOP/s of the model"
            f"{share}; {result['waiting_for_data']:.1%} of the time waiting for data"
        )
        say(f"run folder: {run.path}   (waveletgpt report {run.path}, waveletgpt generate {run.path})")


@dataclass(frozen=True)
class Compare:
    """Train several arms on the same batches of DATA and report how much sooner each reaches the baseline's loss.

    The first arm is the baseline. An arm is a mixing, with settings of its own if need be: none:n_layer=12,lr=1e-3
    """

    data: Positional[tuple[str, ...]] = (DEFAULT_DATA,)
    """File, folder, archive, address (https://, s3://, gs://, az://, hf://datasets/), data set name, or hf:OWNER/NAME;
    several, each with a weight, are mixed: a/=0.7 b/=0.3."""
    out: str = "runs/compare"
    """Folder to write: report.html, summary.json, curves.csv, and a run folder per arm and seed."""
    arms: tuple[str, ...] = ("none", "fixed")
    """Arms, the baseline first: mixings, or recipes (haar-inputs, canon-a, my.yaml), with :name=value,... if needed."""
    seeds: int = 1
    """Seeds per arm, from --seed on."""
    sweep: tuple[str, ...] = ()
    """Settings to try with every arm, each as NAME=V1,V2,...: lr=2e-3,4e-3,8e-3. An arm gets those with the lowest
    validation loss; one rate for all misjudges arms."""
    sweep_steps: int | None = None
    """Steps of a trial of --sweep (default: as many as of a run, and the best trial is a run). Much shorter trials find
    other rates than the run needs."""
    workers: Workers = "auto"
    engine: Engine = "local"
    print_runs: bool = False
    """Train nothing, but print a command for each arm and seed, for machines of their own; `waveletgpt report` gathers
    their folders."""
    resume: bool = False
    """Go on with the comparison in --out."""
    recipe: str | None = None
    """YAML file of settings, or a name such as demo; options given here win over it."""
    settings: Annotated[Settings, Flat] = field(default_factory=Settings)

    def run(self) -> None:
        if self.print_runs:
            for line in self.commands():
                say(line)
            return
        if not self.sweep:
            if self.sweep_steps is not None:
                raise UserError("--sweep-steps has no effect without --sweep")
            train_arms(self, lambda: prepare_store(self.data, self.settings, self.out), named(self.data), self.out)
            return
        from waveletgpt.training.compare import plan
        from waveletgpt.training.sweep import parse_grid, sweep

        recipe, grid = plain(self.settings), processes.from_first(lambda: parse_grid(self.sweep))
        chosen: dict[str, Any] = {
            name: getattr(self, name) for name in ("arms", "seeds", "resume", "workers", "engine")
        }
        plan(recipe, self.out, **chosen)
        with processes.agreed():
            store = prepare_store(self.data, self.settings, self.out)
        best = sweep(
            recipe,
            store,
            self.out,
            data=named(self.data),
            arms=self.arms,
            grid=grid,
            steps=self.sweep_steps,
            resume=self.resume,
            workers=self.workers,
            engine=self.engine,
        )
        train_arms(dataclasses.replace(self, arms=tuple(best), resume=True), lambda: store, named(self.data), self.out)

    def commands(self) -> list[str]:
        """The command of each run; all can go on where they were stopped."""
        from waveletgpt.training.compare import runs_of

        if self.sweep:
            raise UserError("--print-runs does not go with --sweep: the arms are known when the trials have ended")
        lines = []
        for arm, recipe in runs_of(plain(self.settings), Path(self.out), self.arms, self.seeds):
            out = str(Path(self.out) / arm.folder(recipe.seed))
            words = ["waveletgpt", "train", *self.data, "--out", out, "--arm", arm.name, "--resume"]
            lines.append(shlex.join(words + options(recipe)))
        return lines


@dataclass(frozen=True)
class Ladder:
    """Compare arms at every size of model and number of tokens, and tell what their lead is worth and whether it lasts.

    Each rung (a size and a number of tokens) is a comparison with its own learning-rate decay. From three sizes and
    three numbers of tokens on, a law L = E + A / N^a + B / D^b is fitted. Rungs set the steps and the models' depth,
    width and heads; --max-steps and the settings of these have no effect.
    """

    data: Positional[tuple[str, ...]] = (DEFAULT_DATA,)
    """File, folder, archive, address (https://, s3://, gs://, az://, hf://datasets/), data set name, or hf:OWNER/NAME;
    several, each with a weight, are mixed: a/=0.7 b/=0.3."""
    out: str = "runs/ladder"
    """Folder to write: report.html, ladder.json, ladder.csv, and a comparison per rung, SIZE-TOKENS."""
    arms: tuple[str, ...] = ("none", "fixed")
    """Arms, the baseline first, as in `waveletgpt compare`."""
    sizes: tuple[str, ...] = ("0.1M", "0.3M", "1.2M")
    """Parameters of the models' blocks, embeddings not counted; width and depth follow from them."""
    tokens: tuple[str, ...] = ("0.5M", "1.5M", "5M")
    """Tokens to train on, each in runs of its own."""
    seeds: int = 1
    """Seeds per arm and rung, from --seed on."""
    sweep: tuple[str, ...] = ()
    """Settings to try with every arm, each as NAME=V1,V2,...: lr=2e-3,4e-3,8e-3."""
    sweep_every: Literal["size", "rung"] = "size"
    """Where --sweep tries them: at each size, on its fewest tokens, or at each rung. Longer runs are best at lower
    rates, which only `rung` sees; it takes so many times as long as there are values."""
    resume: bool = False
    """Go on with the ladder in --out, or make it larger."""
    workers: Workers = "auto"
    engine: Engine = "local"
    recipe: str | None = None
    """YAML file of settings, or a name such as demo; options given here win over it."""
    settings: Annotated[Settings, Flat] = field(default_factory=Settings)

    def run(self) -> None:
        from waveletgpt.training.ladder import check_data, plan, train_ladder
        from waveletgpt.training.sweep import parse_grid

        recipe = plain(self.settings)
        if self.sweep_every == "rung" and not self.sweep:
            raise UserError("--sweep-every has no effect without --sweep")
        grid = processes.from_first(lambda: parse_grid(self.sweep))
        planned: dict[str, Any] = {"arms": self.arms, "sizes": self.sizes, "tokens": self.tokens, "seeds": self.seeds}
        planned |= {"grid": grid, "resume": self.resume}
        # Tells of a mistake before minutes are spent on the data.
        rungs = processes.from_first(lambda: plan(recipe, self.out, **planned))
        with processes.agreed():
            store = prepare_store(self.data, self.settings, self.out)
            check_data(store, rungs)
        if processes.first():
            for rung in rungs:
                shape = rung.shape
                say(f"{rung.name}: {shape.n_layer} blocks of {shape.n_embd}, {rung.recipe.max_steps:,} steps")
        planned |= {"sweep_every": self.sweep_every, "workers": self.workers, "engine": self.engine}
        ladder = train_ladder(recipe, store, self.out, data=named(self.data), **planned)
        if processes.first():
            print_ladder(ladder, Path(self.out))


@dataclass(frozen=True)
class Evaluate:
    """Loss, perplexity and bits per byte of a run's model on held-out data; of a classifier its accuracy."""

    run_folder: Positional[str]
    """Run folder."""
    split: Literal["train", "validation", "test"] = "validation"
    """Which part of the data."""
    windows: int | None = None
    """Windows to read; default: the whole split, without overlap. Classifiers always read all of it."""
    context: int | None = None
    """Tokens of a window, also more than the model was trained on (default: as many); not for classifiers."""
    batch_size: int = 16
    """Windows at once."""
    device: Device = "auto"
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        if is_classifier(self.run_folder):
            if self.context is not None:
                raise UserError("--context: a classifier reads whole examples; leave it out")
            print_scores(self.run_folder, self.split, self.batch_size, self.device, self.json)
            return
        from waveletgpt.runs.evaluation import evaluate_run

        value = evaluate_run(
            self.run_folder, self.split, self.windows, self.batch_size, self.device, context=self.context
        )
        if self.json:
            print(json.dumps(value, indent=1))
            return
        bits = f", {value['bits_per_byte']:.4f} bits per byte" if value["bits_per_byte"] else ""
        say(
            f"{value['split']}: {value['nll']:.4f} nats per token, perplexity {value['perplexity']:.3f}{bits} "
            f"({value['tokens']:,} tokens){by_source(value)}"
        )


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a run's model."""

    run_folder: Positional[str]
    """Run folder."""
    prompt: str | None = None
    """Text to continue, or a file where data are not text; default: a new document."""
    tokens: int | None = None
    """New tokens at most; default: what suits the modality, 200 for text."""
    out: str | None = None
    """Folder for samples that are no text; default: RUN/generated."""
    samples: int = 1
    """How many samples."""
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens that make up this probability."""
    seed: int = 0
    """Seed of the samples."""
    device: Device = "auto"

    def run(self) -> None:
        if is_classifier(self.run_folder):
            raise UserError(f"{self.run_folder} is a classifier's run; ask it with `waveletgpt predict`")
        from waveletgpt.runs.evaluation import print_samples

        print_samples(
            self.run_folder,
            self.prompt,
            tokens=self.tokens,
            out=self.out,
            samples=self.samples,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            device=self.device,
        )


@dataclass(frozen=True)
class Report:
    """Write report.html (and summary.json, curves.csv) from run folders or comparisons, without training.

    Of the folder of a ladder: report.html, ladder.json and ladder.csv.
    """

    runs: Positional[tuple[str, ...]]
    """Run folders, or folders that hold them."""
    baseline: str | None = None
    """Arm to compare with; default: "none" if there is one, else the first."""
    out: str | None = None
    """Folder to write; default: the first one given."""

    def run(self) -> None:
        from waveletgpt.report import write_results
        from waveletgpt.report.ladder import find_rungs
        from waveletgpt.report.ladder_page import write_ladder
        from waveletgpt.report.reading import arm_of
        from waveletgpt.report.summary import passed_over, read_sweep, sweep_folder
        from waveletgpt.runs.folder import RunFolder, find_runs

        if not self.runs:
            raise UserError("name at least one run folder")
        if len(self.runs) == 1 and find_rungs(self.runs[0]):
            print_ladder(write_ladder(self.runs[0], self.baseline, self.out), Path(self.out or self.runs[0]))
            return
        # Where there is no run, `open` says why.
        found = [run for folder in self.runs for run in list(find_runs(folder)) or [RunFolder.open(folder)]]
        sweep = read_sweep(sweep_folder(self.runs[0])) if len(self.runs) == 1 else None
        if sweep is not None:
            older = passed_over(Path(self.runs[0]), map(arm_of, found), sweep["grid"])
            found = [run for run in found if arm_of(run) not in older]
            if older:
                say(f"left out, as a sweep has chosen other settings since: {', '.join(older)}")
        arms = list(dict.fromkeys(map(arm_of, found)))
        baseline = self.baseline or next((arm for arm in arms if arm.split(":")[0] == "none"), arms[0])
        if baseline not in arms:
            raise UserError(
                f'--baseline: no arm "{baseline}" in these runs; there are {", ".join(arms)}{suggest(baseline, arms)}'
            )
        found.sort(key=lambda run: arm_of(run) != baseline)
        out = Path(self.out or self.runs[0])
        print_summary(write_results(out, found, baseline))
        say(f"report: {out / 'report.html'}")


@dataclass(frozen=True)
class Info:
    """Parameters, FLOPs and state that mixing adds, and its windows, for a preset or a run."""

    what: Positional[str] = "small"
    """A preset (tiny, small, paper, gpt2, lra-small, lra-image, ...) or a run folder."""
    vocabulary: int = 256
    """Vocabulary of a preset's model, in tokens."""
    settings: Annotated[Settings, Flat] = field(default_factory=Settings)

    def run(self) -> None:
        from waveletgpt.runs.evaluation import print_info

        print_info(self.what, plain(self.settings), self.vocabulary, CLASSIFIER_PRESETS)


def options(recipe: Recipe) -> list[str]:
    """The options of `waveletgpt train` that give this recipe."""
    from waveletgpt.report.reading import flatten

    default, known = flatten(Recipe().as_dict()), wording.options(Train)
    changed = {name: value for name, value in flatten(recipe.as_dict()).items() if value != default[name]}
    return [known[name.removeprefix("source.")].given(value, "=") for name, value in changed.items()]


COMMANDS: dict[str, type] = {
    "train": Train,
    "compare": Compare,
    "ladder": Ladder,
    "lra": Lra,
    "classify": Classify,
    "predict": Predict,
    "evaluate": Evaluate,
    "generate": Generate,
    "report": Report,
    "info": Info,
    "data list": DataList,
    "data prepare": DataPrepare,
}
