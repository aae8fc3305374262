"""The one trainer: a recipe and a store of tokens or labelled examples in, a run folder out (see `runs/folder.py`).

A thin layer over the transformers `Trainer`, which brings DDP, FSDP, bf16, compilation and accumulation. Added here:
batches that depend on the seed and the step alone, checkpoints that appear whole or not at all, a clock that counts
training only, and plain words when something goes wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging as transformers_logging

from waveletgpt.data import Mixture, TokenStore
from waveletgpt.data.mixture import said
from waveletgpt.errors import UserError, tell
from waveletgpt.integrations.architecture import check_identity
from waveletgpt.model.cost import describe, mixers_in
from waveletgpt.runs.environment import command, environment, peak_flops
from waveletgpt.runs.folder import STAGING, RunFolder, disk_errors, publish, write_json
from waveletgpt.runs.records import ResultRecord, RunRecord
from waveletgpt.training import processes, sharding
from waveletgpt.training.progress import ProgressBar
from waveletgpt.training.recipe import Recipe
from waveletgpt.training.resuming import claimed, find_start, global_batch
from waveletgpt.training.task import HasTask, Task, task_of


class Diverged(RuntimeError):
    """The loss became NaN or infinite."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run is saved and can go on."""


class Stopwatch:
    """Seconds of training: runs from `start`, stands still inside `paused`."""

    def __init__(self, seconds: float = 0.0):
        self.before = seconds
        self.since: float | None = None

    def start(self) -> None:
        self.since = time.perf_counter()

    def read(self) -> float:
        return self.before + (time.perf_counter() - self.since if self.since is not None else 0.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.before, self.since = self.read(), None
        try:
            yield
        finally:
            self.start()


def mixing_kernels(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Learned weights of the mixers."""
    return [p for mixer in mixers_in(model) for p in mixer.parameters()]


class RunTrainer(Trainer):
    """`Trainer` that writes a run folder."""

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, run: RunFolder, recipe: Recipe, task: Task, tokens_per_step: int, **kwargs: Any):
        self.run, self.recipe, self.task, self.tokens_per_step = run, recipe, task, tokens_per_step
        self.clock = Stopwatch()
        self.waited = self.resumed_at = 0.0
        self._output_dir: str | None = None
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Matrices only: no biases, no norms, and no mixing kernels, which decay would pull away from averages."""
        kernels = {id(kernel) for kernel in mixing_kernels(model)}
        return [n for n, p in model.named_parameters() if p.ndim >= 2 and id(p) not in kernels]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW in the groups of transformers, and one more for mixing kernels that have a rate of their own."""
        optimizer = super().create_optimizer(model)
        scale = self.recipe.training.kernel_lr_scale
        trained: Any = self.model if model is None else model
        kernels = mixing_kernels(trained)
        if kernels and scale is not None:
            apart = {id(kernel) for kernel in kernels}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in apart]
            rate = scale * self.args.learning_rate
            optimizer.add_param_group({"params": kernels, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own; those of transformers ask for `labels` beside the `shift_labels` that they use then."""
        if "shift_labels" in inputs:
            inputs = {"labels": inputs["shift_labels"], **inputs}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Counts the seconds that training waits for data."""
        start = time.perf_counter()
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self.waited += time.perf_counter() - start

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.clock.paused():
            return super()._evaluate(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self._output_dir or super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if (
            state_dict is not None
        ):  # gathered from all processes: tied weights are in it twice, and no longer one tensor
            tied: Any = self.model.all_tied_weights_keys  # type: ignore[union-attr]
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.recipe.training.fsdp:
            return super()._save_optimizer_and_scheduler(output_dir)
        sharding.save_optimizer(self.model, self.optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.recipe.training.fsdp or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        sharding.load_optimizer(self.model, self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return sharding.load_weights(self.model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Written beside its place, then moved there: a killed run leaves whole checkpoints only."""
        step = self.state.global_step
        staging = self.run.path / STAGING
        seconds = self.clock.read()
        with self.clock.paused(), disk_errors(self.run.path):
            self._output_dir = str(staging)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._output_dir = None
            self.accelerator.wait_for_everyone()
            processes.from_first(lambda: self._publish_checkpoint(staging / f"checkpoint-{step}", seconds))

    def _publish_checkpoint(self, folder: Path, seconds: float) -> None:
        write_json(folder / "clock.json", {"seconds": seconds})
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        publish(folder, self.run.path / folder.name)
        for _, old in self.run.checkpoints()[: -self.recipe.training.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)


class Recorder(TrainerCallback):
    """Writes metrics.jsonl, watches for NaN, and turns Ctrl-C into a saved stop."""

    def __init__(self, trainer: RunTrainer):
        self.trainer = trainer
        self.interrupted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A signal may have reached one process only, or several of them in different steps: they stop together.
        if processes.any_of(self.interrupted):
            self.interrupted = True
            control.should_save = control.should_training_stop = True
        if control.should_save or control.should_evaluate:
            # Logging notices a NaN before a checkpoint of it is saved.
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            row = {"loss": logs["loss"], "lr": logs["learning_rate"], "grad_norm": logs.get("grad_norm")}
            if not math.isfinite(logs["loss"]):
                raise Diverged(
                    f"the training loss became {logs['loss']} by step {state.global_step} "
                    f"(lr {logs['learning_rate']:.3g}, gradient norm {logs.get('grad_norm')}); "
                    f"try a lower `lr` than {self.trainer.recipe.lr:g}, a longer `training.warmup_steps`, or fp32"
                )
        elif "eval_loss" in logs:
            row = {"nll": logs["eval_loss"], **{name: logs[f"eval_{name}"] for name in self.trainer.task.measures}}
            if not math.isfinite(logs["eval_loss"]):
                raise Diverged(
                    f"the validation loss became {logs['eval_loss']} at step {state.global_step}; "
                    f"try a lower `lr` than {self.trainer.recipe.lr:g}"
                )
        else:
            return
        if state.is_world_process_zero:
            step = state.global_step
            tokens = step * self.trainer.tokens_per_step
            seconds = round(self.trainer.clock.read(), 4)
            self.trainer.run.append_metrics({"step": step, "tokens": tokens, "seconds": seconds, **row})


def train(
    recipe: Recipe,
    store: TokenStore | Mixture | HasTask,
    out: str | Path,
    *,
    data: str | Sequence[str],
    arm: str | None = None,
    resume: bool = False,
    show_progress: bool = True,
    at_once: int = 1,
) -> RunFolder:
    """Train one model and leave a run folder at `out`.

    Args:
        store: tokens to model, or a store that brings another task (`HasTask`).
        data: the name or path the store was made of, for the record; of a mixture one `NAME=WEIGHT` for each source.
        arm: name of the arm in a comparison; default: the mixing.
        resume: go on from the newest checkpoint of `out`; a finished run is left as it is.
        at_once: how many runs share the machine meanwhile, for the record.

    Raises:
        UserError: bad settings, too little data, an `out` that holds another run, resuming with other settings, a
            broken checkpoint, a full disk.
        Diverged: the loss became NaN or infinite; run.json says so, earlier checkpoints are kept.
        Interrupted: Ctrl-C; a checkpoint was saved first.
    """
    run = RunFolder(out)
    with contextlib.ExitStack() as ours:
        processes.from_first(lambda: ours.enter_context(claimed(run.path)))
        return _train(recipe, store, run, data, arm or recipe.mixing, resume, show_progress, at_once)


def _train(
    recipe: Recipe,
    store: TokenStore | Mixture | HasTask,
    run: RunFolder,
    data: str | Sequence[str],
    arm: str,
    resume: bool,
    show_progress: bool,
    at_once: int,
) -> RunFolder:
    """`train`, in a folder that this process has locked."""
    recipe = recipe.with_evaluations(run.info["recipe"] if run.exists() else None)
    transformers_logging.disable_progress_bar()
    # A comparison trains arm after arm in one process; each starts from its own precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    with processes.agreed():
        device_arguments = choose_device(recipe)
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)
    task = task_of(store)
    arguments = training_arguments(recipe, run.path, {**task.arguments(), **device_arguments})
    _ = arguments.device  # joins the process group, where there is one
    if arguments.fsdp:
        sharding.tell_accelerate()
    elif recipe.training.fsdp and show_progress:
        tell("one process: `training.fsdp` has nothing to share out, the model is whole")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # or a process that sees several would split and enlarge its batches
    processes.check_shared(run.path)
    checkpoint, finished, fingerprint = processes.from_first(
        lambda: (find_start(run, recipe, task.fingerprint, resume), run.finished, task.fingerprint)
    )
    # The start is evaluated once, not again at every resumption.
    arguments.eval_on_start = checkpoint is None
    with processes.agreed():
        if task.fingerprint != fingerprint:
            raise UserError(
                f"{said(data)} is not the data of process 0: {task.fingerprint[:12]}, not {fingerprint[:12]}; "
                "give all machines the same"
            )
        if finished:
            return run
        model = task.build_model(recipe)
        if run.exists():
            check_identity(model, run.info.get("model") or {}, recipe.base_model)
    main = processes.first()
    sequences = global_batch(recipe.as_dict(), processes.count())
    info: RunRecord = {
        "status": "running",
        "task": task.name,
        "arm": arm,
        "seed": recipe.seed,
        "command": command(),
        "recipe": {"data": data if isinstance(data, str) else list(data), **recipe.as_dict()},
        "data": task.describe(data),
        "model": describe(model),
        "environment": {**environment(), "at_once": at_once},
        "probe": task.probe(model),
    }

    def begin() -> None:
        if checkpoint:  # the most that ever shared the machine
            info["environment"]["at_once"] = max(at_once, run.info["environment"].get("at_once", 1))
        with disk_errors(run.path):
            shutil.rmtree(run.path / STAGING, ignore_errors=True)
            run.write_info(info)
            run.truncate_metrics(checkpoint[0] if checkpoint else -1)

    processes.from_first(begin)

    trainer = RunTrainer(
        run,
        recipe,
        task,
        sequences * task.sequence_tokens(model),
        model=model,
        args=arguments,
        train_dataset=task.train_data(recipe, model, recipe.max_steps * sequences),
        eval_dataset=task.eval_data(recipe, model),
        data_collator=task.collate,
        compute_metrics=task.measure,
        processing_class=task.tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    if show_progress and main:
        trainer.add_callback(ProgressBar(trainer, info["arm"], recipe.seed))
    if checkpoint:
        trainer.clock.before = trainer.resumed_at = json.loads((checkpoint[1] / "clock.json").read_text())["seconds"]

    try:
        with stop_signals(recorder), disk_errors(run.path):
            trainer.train(resume_from_checkpoint=str(checkpoint[1]) if checkpoint else None)
    except Diverged as error:
        if main:
            run.update_info(status="failed", error=str(error))
        raise
    if recorder.interrupted and trainer.state.global_step < recipe.max_steps:
        processes.from_first(lambda: run.update_info(status="interrupted"))
        raise Interrupted(f"saved {run.path} at step {trainer.state.global_step} of {recipe.max_steps}")
    finish(trainer)
    return run


def finish(trainer: RunTrainer) -> None:
    """Put the final model, what it makes, and the result into the run folder; `status` turns "finished" last."""
    run = trainer.run
    staging = run.path / STAGING

    def complete() -> None:
        # The weights move last: with them the folder counts as a model.
        for file in sorted(staging.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            # run.json says what the pickled arguments of transformers say, and is safe to read.
            if file.is_file() and file.name != TRAINING_ARGS_NAME:
                os.replace(file, run.path / file.name)
        shutil.rmtree(staging, ignore_errors=True)
        more = trainer.task.finish(run, trainer.recipe, trainer.args.device)
        # Of this process: a resumed run does not know how long those before it waited.
        waiting = trainer.waited / max(trainer.clock.read() - trainer.resumed_at, 1e-9)
        run.update_info(status="finished", result={**result(run), "waiting_for_data": round(waiting, 4), **more})

    with disk_errors(run.path):
        trainer.save_model(str(staging))
        trainer.accelerator.wait_for_everyone()
        processes.from_first(complete)


def result(run: RunFolder) -> ResultRecord:
    """Final validation loss and speed. Tokens per second: median over the logging intervals, so that compilation
    and busy moments do not count; `mfu`: the model's FLOPs as a share of what the GPU can do (arXiv 2204.02311,
    Appendix B), None where that is not known."""
    rows = run.metrics()
    last = [row for row in rows if "nll" in row][-1]
    ticks = [row for row in rows if "loss" in row]
    rates = [
        (b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"])
        for a, b in itertools.pairwise(ticks)
        if b["seconds"] > a["seconds"]
    ]
    info = run.info
    speed = statistics.median(rates) if rates else last["tokens"] / max(last["seconds"], 1e-9)
    flops = speed * info["model"]["flops_per_token"]
    peak = peak_flops(info["environment"]["gpu"], info["recipe"]["training"]["precision"])
    processes = info["environment"]["processes"]
    return {
        "final_nll": last["nll"],
        "seconds": last["seconds"],
        "tokens_per_second": speed,
        "flops_per_second": flops,
        "mfu": flops / (peak * processes) if peak else None,
        "steps": last["step"],
        "tokens": last["tokens"],
    }


def training_arguments(recipe: Recipe, folder: Path, more: dict[str, Any]) -> TrainingArguments:
    """The recipe in the words of transformers, and `more` of them."""
    t = recipe.training
    schedules: dict[str, tuple[str, dict[str, Any]]] = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        "linear": ("linear", {}),
        "constant": ("constant_with_warmup", {}),
        "plateau": ("reduce_lr_on_plateau", {"factor": 0.1, "patience": 3}),
    }
    schedule, schedule_arguments = schedules[t.schedule]
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=t.accumulation,
        learning_rate=recipe.lr,
        weight_decay=t.weight_decay,
        adam_beta2=t.beta2,
        max_grad_norm=t.clip,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=schedule_arguments,
        warmup_steps=0 if t.schedule == "plateau" else recipe.warmup_steps,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=t.log_every,
        eval_strategy="steps",
        eval_steps=recipe.eval_every,
        save_strategy="steps",
        save_steps=recipe.save_every,
        bf16=t.precision == "bf16",
        torch_compile=t.compile,
        # The field is declared str for old command lines; True is what it wants.
        fsdp=True if t.fsdp and processes.count() > 1 else None,  # type: ignore[arg-type]
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_num_workers=t.workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # all of them are used, and looking costs a pass at every step
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="no",
        report_to=["tensorboard"],
        disable_tqdm=True,
        log_level="error",
        **more,
    )


def choose_device(recipe: Recipe) -> dict[str, Any]:
    """TrainingArguments that select the device.

    Raises:
        UserError: a device this machine or this torch does not have, or settings it can't train with.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if recipe.device != "auto" and not available[recipe.device]:
        have = ", ".join(name for name, there in available.items() if there)
        raise UserError(f"`device={recipe.device}`: this torch ({torch.__version__}) finds none; it has {have}")
    if recipe.device == "cpu" or (recipe.device == "auto" and not any((available["cuda"], available["mps"]))):
        if recipe.training.attention == "flex_attention":
            raise UserError("training.attention=flex_attention has no backward pass on CPUs; use sdpa or eager")
        return {"use_cpu": True, **({"ddp_backend": "gloo"} if processes.count() > 1 else {})}
    # Batches are in pinned memory: without waiting for their copies the CPU runs ahead of the GPU.
    return {"accelerator_config": {"non_blocking": True}} if available["cuda"] else {}


@contextlib.contextmanager
def stop_signals(recorder: Recorder) -> Iterator[None]:
    """Ctrl-C or SIGTERM saves and stops at the end of the step; a second one stops at once."""

    def stop(number: int, frame: Any) -> None:
        if recorder.interrupted:
            raise KeyboardInterrupt
        recorder.interrupted = True
        print("\nsaving, then stopping (once more to stop at once)", file=sys.stderr)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    except ValueError:
        pass  # Not the main thread: signals stay whose they are.
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
