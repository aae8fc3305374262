"""How long the recipes of the Long Range Arena take: a training step of every task and arm, times the recipe's steps.

    python benchmarks/lra.py --device cuda [--compile] [--tasks image listops] [--out FOLDER]
    python benchmarks/lra.py --count

Batches are random, of the recipe's size and the task's published length, so no data is needed; reading data,
evaluation and saving come on top, and so does the mask of shorter texts, without which attention is faster. Arms take
turns, so that a busy machine slows all of them. `--batch-size` and `--length` are for machines the published sizes
don't fit on; hours are then not the recipe's, and not printed. `--count` measures nothing: it counts the FLOPs of a
run (forward and backward, as `waveletgpt info` does), and divides them by `--tflops`.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Report, in_turn, ratio, training_step

from waveletgpt import WaveletGPTConfig, WaveletGPTForSequenceClassification
from waveletgpt.classify.long_range_arena import TASKS, Task
from waveletgpt.classify.settings import ClassifierRecipe
from waveletgpt.model.cost import flops_per_token
from waveletgpt.recipes import load_recipe

ARMS = ("none", "fixed", "learnable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="torch.compile: about a minute more for each model")
    parser.add_argument("--seconds", type=float, default=10, help="about, for each task")
    parser.add_argument("--batch-size", type=int, help="instead of the recipe's")
    parser.add_argument("--length", type=int, help="instead of the published one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--count", action="store_true", help="only count FLOPs")
    parser.add_argument("--tflops", type=float, default=50, help="FLOPs a second to divide them by, in 10^12")
    parser.add_argument("--out", type=Path, help="folder for results (JSON)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("lra", options.out, device=options.device, compile=options.compile, threads=options.threads)
    if options.count:
        columns = ["task", "arm", "parameters", "tokens a run", "FLOPs a run", f"hours at {options.tflops:g} TFLOP/s"]
        report.table("counted, not measured", columns, [row for name in options.tasks for row in counts(name, options)])
        return
    columns = ["arm", "parameters", "inputs", "ms/step", "x none", "steps", "hours a run"]
    for name in options.tasks:
        try:
            report.table(name, columns, rows_of(TASKS[name], options))
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name}: {error}")
            torch.cuda.empty_cache()


def counts(name: str, options: argparse.Namespace) -> list[list[Any]]:
    task, recipe, rows = TASKS[name], read(name), []
    tokens = recipe.max_steps * recipe.batch_size * task.n_inputs * task.length
    for arm in ARMS:
        with torch.device("meta"):
            model = build(task, recipe, arm, task.length)
        flops = tokens * flops_per_token(model)
        size = f"{sum(p.numel() for p in model.parameters()):,}"
        rows.append([name, arm, size, f"{tokens:.2g}", f"{flops:.2g}", f"{flops / options.tflops / 3.6e15:.1f}"])
    return rows


def build(task: Task, recipe: ClassifierRecipe, arm: str, length: int) -> WaveletGPTForSequenceClassification:
    settings = recipe.override({"mixing": arm}, arm).model_settings()
    config = WaveletGPTConfig(
        vocab_size=task.vocab_size, n_positions=length, n_inputs=task.n_inputs, num_labels=10,
        tie_word_embeddings=False, **settings,
    )  # fmt: skip
    return WaveletGPTForSequenceClassification(config)


def rows_of(task: Task, options: argparse.Namespace) -> list[list[Any]]:
    recipe = read(task.name)
    batch_size, length = options.batch_size or recipe.batch_size, options.length or task.length
    torch.manual_seed(0)
    shape = (batch_size, 2, length) if task.n_inputs == 2 else (batch_size, length)
    ids = torch.randint(1, task.vocab_size, shape, device=options.device)
    labels = torch.randint(0, 2, (batch_size,), device=options.device)
    models, steps = {}, {}
    for arm in ARMS:
        model = models[arm] = build(task, recipe, arm, length).to(options.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        run = torch.compile(model) if options.compile else model
        inputs = {"input_ids": ids, "labels": labels}
        steps[arm] = partial(training_step, run, optimizer, inputs, recipe.training.precision == "bf16")
        for _ in range(2):
            steps[arm]()
    times = in_turn(steps, lambda run: (run(), None), options.seconds)
    published = batch_size == recipe.batch_size and length == task.length
    rows = []
    for arm, seconds in times.items():
        step = statistics.median(seconds)
        size = f"{sum(p.numel() for p in models[arm].parameters()):,}"
        cost = [f"{step * 1e3:,.1f}", f"{ratio(seconds, times['none']):.3f}"]
        hours = f"{step * recipe.max_steps / 3600:.1f}" if published else "-"
        rows.append([arm, size, " x ".join(map(str, shape)), *cost, f"{recipe.max_steps:,}", hours])
    return rows


def read(task: str) -> ClassifierRecipe:
    changes = load_recipe(f"lra-{task}")
    for extra in ("task", "data", "compare"):
        changes.pop(extra, None)
    recipe = ClassifierRecipe().override(changes, task)
    assert isinstance(recipe, ClassifierRecipe)
    return recipe


if __name__ == "__main__":
    main()
