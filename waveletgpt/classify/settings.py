"""Settings of classifiers: examples, models, training. The help of the command line shows the fields' docstrings."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from waveletgpt.data.settings import ModalityName
from waveletgpt.errors import UserError
from waveletgpt.settings import NotNegative, Positive, PositiveNumber, SampleRate, Settings, Share
from waveletgpt.training.recipe import ModelSettings, Recipe, TrainingSettings

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

ClassifierPreset = Literal[
    "lra-small", "lra-listops", "lra-text", "lra-retrieval", "lra-image", "lra-pathfinder", "lra-pathx", "clips"
]


@dataclass(frozen=True)
class TaskSettings(Settings):
    """Which examples, how long they are, and where they are kept."""

    length: Positive | None = None
    """Longest input in tokens: longer texts are cut, pictures resized to as many pixels (default: the task's)."""
    min_length: Positive | None = None
    """Shortest expression of `listops`, in tokens (default: a quarter of the longest)."""
    train_examples: Positive | None = None
    """Examples to train on (default: all there are; of generated tasks the published number)."""
    validation_examples: Positive | None = None
    """Examples to choose by (default: all; a tenth of those to train on if the data has none of its own)."""
    test_examples: Positive | None = None
    """Examples of the final test (default: all; of generated tasks the published number)."""
    data_seed: NotNegative = 0
    """Which examples are generated, and which ones a smaller number leaves."""
    clip_seconds: Annotated[float, Interval(ge=0.01, le=600)] = 1.0
    """Recordings are cut into clips of so many seconds, whose scores are averaged."""
    sample_rate: SampleRate = 16_000
    """Samples a second to which recordings are brought."""
    fold: Annotated[int, Interval(ge=1, le=10)] = 1
    """Which of ESC-50's five folds, or of UrbanSound8K's ten, is the test split."""
    cache_dir: str | None = None
    """Where stores and downloads are kept (default: $WAVELETGPT_CACHE, else ~/.cache/waveletgpt)."""
    data_dir: str | None = None
    """A folder with copies of named data sets that are already there: nothing is downloaded then."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length and self.min_length and self.min_length > self.length:
            raise UserError(f"min_length is {self.min_length}, but length {self.length}: give at most that")

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
    pooling: Literal["mean", "last", "attention"] | None = None
    """How all tokens become one vector."""
    frame_size: int | None = None
    """Samples of a recording that become one token."""
    frame_hidden: int | None = None
    """Width of the dense layer that reads the samples of a frame."""


@dataclass(frozen=True)
class ClassifierTraining(TrainingSettings):
    """Optimiser, schedule, evaluation, checkpoints, augmentation."""

    eval_windows: Positive | None = None
    """Held-out examples that the evaluations on the way read (default: 500, fewer in short runs); the one at the end
    reads all."""
    samples: NotNegative = 6
    """Examples of the test split that the report shows, with what the model says of them."""
    gain: Annotated[float, Interval(ge=0, le=60)] = 0.0
    """Augmentation of recordings: loudness changed at random by up to so many dB; 0 for none."""
    crop: Share = 0.0
    """Augmentation of recordings: shifted at random by up to this share of their length; 0 for none."""
    mixup: Annotated[float, Interval(ge=0, le=100)] = 0.0
    """Augmentation of recordings: mixed in pairs with Beta(a, a) weights, arXiv 1710.09412; 0 for none."""


@dataclass(frozen=True)
class ClassifierRecipe(Recipe):
    """All settings of a classifier's run but the task's name and the output folder."""

    modality: ModalityName | None = None
    """What examples are: a task and a folder of recordings have their own; leave it out."""
    preset: ClassifierPreset = "lra-small"  # type: ignore[assignment]
    """Sizes of the model."""
    max_steps: Positive = 2000
    """Optimiser steps."""
    batch_size: Positive = 32
    """Examples per batch and process."""
    lr: PositiveNumber = 1e-3
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
