"""The progress line of a training run: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """Shows step, loss, validation loss, tokens per second and the time left."""

    def __init__(self, trainer: Any, arm: str, seed: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.trainer, self.title = trainer, f"{arm} seed {seed}"
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.figures: dict[str, str] = {}
        self.printed = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first = (state.global_step, self.trainer.clock.read())
        if self.console.is_terminal:
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, figures="")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.figures["loss"] = f"{logs['loss']:.3f}"
            steps, seconds = state.global_step - self.first[0], self.trainer.clock.read() - self.first[1]
            if seconds > 0 and steps > 0:
                rate = steps * self.trainer.tokens_per_step / seconds
                self.figures["tokens/s"] = f"{rate:,.0f}"
                left = (state.max_steps - state.global_step) * self.trainer.tokens_per_step / rate
                self.figures["left"] = f"{left / 60:.1f} min"
        if "eval_loss" in logs:
            self.figures["validation"] = f"{logs['eval_loss']:.3f}"
        self._show(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.console.is_terminal:
            self.bar.update(self.task, completed=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.console.is_terminal:
            self.bar.stop()
        else:
            self._line(state)

    def _show(self, state: Any) -> None:
        if self.console.is_terminal:
            figures = "  ".join(f"{name} {value}" for name, value in self.figures.items() if name != "left")
            self.bar.update(self.task, completed=state.global_step, figures=figures)
        elif time.monotonic() - self.printed > 30:
            self.printed = time.monotonic()
            self._line(state)

    def _line(self, state: Any) -> None:
        figures = ", ".join(f"{name} {value}" for name, value in self.figures.items())
        print(f"{self.title}: step {state.global_step}/{state.max_steps}, {figures}", file=sys.stderr, flush=True)
