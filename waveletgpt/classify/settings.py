"""Settings of classifiers: examples, models, training.

The docstrings under the fields are what the command line says of its options.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from waveletgpt.errors import UserError
from waveletgpt.training.recipe import ModelSettings, Recipe, TrainingSettings, check_range

_SINUSOIDAL = {"position_embedding": "sinusoidal", "pooling": "mean"}
_LEARNED = {"position_embedding": "learned", "pooling": "mean"}

# Classifiers; their length is that of the data's longest example, and their windows go up to it. `lra-small` and
# `clips` are for laptops; the others have the parameters of the Long Range Arena's own Transformer, within 10 % (its
# released configurations, github.com/google-research/long-range-arena), but four blocks where it has one: mixing works
# between blocks.
CLASSIFIER_PRESETS: dict[str, dict[str, Any]] = {
    "lra-small": {"n_layer": 4, "n_embd": 64, "n_head": 4, "pooling": "mean"},
    "lra-listops": {"n_layer": 4, "n_embd": 512, "n_head": 8, "n_inner": 1024, **_SINUSOIDAL},
    "lra-text": {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_inner": 1024, **_SINUSOIDAL},
    "lra-retrieval": {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_inner": 440, **_SINUSOIDAL},
    "lra-image": {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_inner": 160, **_LEARNED},
    "lra-pathfinder": {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_inner": 32, **_SINUSOIDAL},
    "lra-pathx": {"n_layer": 4, "n_embd": 32, "n_head": 2, "n_inner": 32, **_LEARNED},
    # An audio transformer on the waveform: frames of 25 ms at 16 kHz, 2048 -> 64 (arXiv 2105.00335).
    "clips": {"n_layer": 6, "n_embd": 64, "n_head": 8, "frame_size": 400, "frame_hidden": 2048, "pooling": "mean"},
}


@dataclass(frozen=True)
class TaskSettings:
    """Which examples, how long they are, and where they are kept."""

    length: int | None = None
    """Longest input in tokens: longer texts are cut, pictures resized to as many pixels (default: the task's)."""
    min_length: int | None = None
    """Shortest expression of `listops`, in tokens (default: a quarter of the longest)."""
    train_examples: int | None = None
    """Examples to train on (default: all there are; of generated tasks the published number)."""
    validation_examples: int | None = None
    """Examples to choose by (default: all; a tenth of those to train on if the data has none of its own)."""
    test_examples: int | None = None
    """Examples of the final test (default: all; of generated tasks the published number)."""
    data_seed: int = 0
    """Which examples are generated, and which ones a smaller number leaves."""
    clip_seconds: float = 1.0
    """Recordings are cut into clips of so many seconds, whose scores are averaged."""
    sample_rate: int = 16_000
    """Samples a second to which recordings are brought."""
    fold: int = 1
    """Which of ESC-50's five folds, or of UrbanSound8K's ten, is the test split."""
    cache_dir: str | None = None
    """Where stores and downloads are kept (default: $WAVELETGPT_CACHE, else ~/.cache/waveletgpt)."""
    data_dir: str | None = None
    """A folder with copies of named data sets that are already there: nothing is downloaded then."""

    def __post_init__(self) -> None:
        for name in ("length", "min_length", "train_examples", "validation_examples", "test_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: give 1 or more")
        if self.length and self.min_length and self.min_length > self.length:
            raise UserError(f"min_length is {self.min_length}, but length {self.length}: give at most that")
        if self.data_seed < 0:
            raise UserError(f"data_seed is {self.data_seed}: give 0 or more")
        if not 0.01 <= self.clip_seconds <= 600:
            raise UserError(f"clip_seconds is {self.clip_seconds}: give 0.01 to 600 seconds")
        if not 1000 <= self.sample_rate <= 192_000:
            raise UserError(f"sample_rate is {self.sample_rate}: give 1000 to 192000 samples a second")
        if not 1 <= self.fold <= 10:
            raise UserError(f"fold is {self.fold}: give 1 to 10, for ESC-50 1 to 5")

    @property
    def cache(self) -> Path:
        """The folder of stores and downloads."""
        chosen = self.cache_dir or os.environ.get("WAVELETGPT_CACHE")
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "waveletgpt"

    def wanted(self, split: str) -> int | None:
        """How many examples of "train", "validation" or "test" are asked for; None for as many as there are."""
        return getattr(self, f"{split}_examples")


@dataclass(frozen=True)
class ClassifierSettings(ModelSettings):
    """What differs from the preset in a classifier."""

    causal: bool | None = None
    """Whether attention and mixing see the past only (True), or both directions."""
    pooling: str | None = None
    """One vector from all tokens: "mean", "last" or "attention"."""
    frame_size: int | None = None
    """Samples of a recording that become one token."""
    frame_hidden: int | None = None
    """Width of the dense layer that reads the samples of a frame."""


@dataclass(frozen=True)
class ClassifierTraining(TrainingSettings):
    """Optimiser, schedule, evaluation, checkpoints, augmentation."""

    eval_windows: int | None = None
    """Held-out examples that the evaluations on the way read (default: 500, fewer in short runs); the one at the end
    reads all."""
    samples: int = 6
    """Examples of the test split that the report shows, with what the model says of them."""
    gain: float = 0.0
    """Augmentation of recordings: loudness changed at random by up to so many dB; 0 for none."""
    crop: float = 0.0
    """Augmentation of recordings: shifted at random by up to this share of their length; 0 for none."""
    mixup: float = 0.0
    """Augmentation of recordings: mixed in pairs with Beta(a, a) weights, arXiv 1710.09412; 0 for none."""


@dataclass(frozen=True)
class ClassifierRecipe(Recipe):
    """All settings of a classifier's run but the task's name and the output folder."""

    modality: str | None = None
    """What examples are: a task and a folder of recordings have their own; leave it out."""
    preset: str = "lra-small"
    """Sizes of the model: lra-small, lra-listops, lra-text, lra-retrieval, lra-image, lra-pathfinder, lra-pathx,
    clips."""
    max_steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 32
    """Examples per batch and process."""
    lr: float = 1e-3
    """Peak learning rate."""
    model: ClassifierSettings = field(default_factory=ClassifierSettings)
    training: ClassifierTraining = field(default_factory=ClassifierTraining)
    source: TaskSettings = field(default_factory=TaskSettings)  # type: ignore[assignment]

    most_eval_windows: ClassVar[int] = 500

    def presets(self) -> dict[str, dict[str, Any]]:
        return CLASSIFIER_PRESETS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_model is not None:
            raise UserError("base_model is for language models: classifiers are this package's own; leave it out")
        check_range("training.gain", self.training.gain, 0, 60)  # a thousandfold
        check_range("training.crop", self.training.crop, 0, 1)
        check_range("training.mixup", self.training.mixup, 0, 100)
