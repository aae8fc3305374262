"""A recipe: every setting of one training run. The help of the command line shows the docstrings of its fields.

A setting is taken from the command line, else from the YAML file of a recipe, else it is the default here; the preset
gives the sizes of the model that are set nowhere. Nothing here imports torch, so that help is instant.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Gt, Interval

from waveletgpt.data.settings import DataSettings, ModalityName
from waveletgpt.errors import UserError, suggest
from waveletgpt.settings import (
    NotNegative,
    NotNegativeNumber,
    Positive,
    PositiveNumber,
    Seed,
    Settings,
    Share,
    check_choice,
)

# Sizes of the model by name; comments say what for. Windows of 2 and 4 tokens are what learned soonest on text
# (docs/results.md, "Windows"); the paper's, up to the context, are those of `paper` and of the configuration.
PRESETS: dict[str, dict[str, Any]] = {
    # Seconds on a CPU: tests and first tries.
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64, "max_window": 4},
    # Minutes on a CPU: 1.2 M parameters.
    "small": {"n_layer": 6, "n_embd": 128, "n_head": 4, "n_positions": 256, "max_window": 4},
    # The paper's decoder: 2.0 M parameters.
    "paper": {"n_layer": 10, "n_embd": 128, "n_head": 8, "n_positions": 512},
    # GPT-2 small: 124 M parameters with its own vocabulary.
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "max_window": 4},
}
DeviceName = Literal["auto", "cpu", "cuda", "mps"]

# Model settings that a model of transformers leaves open; all others are in its own configuration.
OF_ADDED_MIXING = frozenset(
    {"min_window", "max_window", "mix_fraction", "mix_edge", "mix_layers", "mix_placement", "mix_start"}
)


def mixing_names() -> tuple[str, ...]:
    """What `mixing` may be: "none", or a name in the table of model/mixing.py.

    That file is read as text unless it has been imported already: importing it imports torch, too slow for help.
    """
    loaded = sys.modules.get("waveletgpt.model.mixing")
    return ("none", *(_names_in_source("model/mixing.py", "MIXERS") if loaded is None else loaded.MIXERS))


def added_mixing_names() -> tuple[str, ...]:
    """What `mixing` may be where a model of transformers is the architecture."""
    return ("none", *_names_in_source("integrations/huggingface.py", "MIXINGS"))


@functools.cache
def _names_in_source(file: str, table: str) -> tuple[str, ...]:
    tree = ast.parse((Path(__file__).parents[1] / file).read_text(encoding="utf-8"))
    tables = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table and isinstance(node.value, ast.Dict)
    )
    return tuple(ast.literal_eval(key) for key in next(tables).keys if key is not None)


def check_settings_are_read(recipe: Recipe, mixings: Sequence[str], given: Iterable[str] | None = None) -> None:
    """Refuse settings of the model that none of `mixings` uses.

    Args:
        given: names of the settings to check; by default all that the recipe sets.

    Raises:
        UserError: a setting without effect; it names the mixings that the setting is for.
    """
    from waveletgpt.model.mixing import MIXERS

    readers = {name: MIXERS[name].reads for name in mixing_names() if name != "none"}
    if recipe.base_model is not None:
        readers = {name: OF_ADDED_MIXING - {"mix_start"} for name in added_mixing_names() if name != "none"}
        readers["learnable"] = OF_ADDED_MIXING
    known = frozenset().union(*readers.values())
    if given is None:
        given = [name for name, value in dataclasses.asdict(recipe.model).items() if value is not None]
    for name in given:
        if name in known and not any(name in readers.get(mixing, ()) for mixing in mixings):
            value, used = getattr(recipe.model, name), " and ".join(dict.fromkeys(mixings))
            takes = ", ".join(mixing for mixing, reads in readers.items() if name in reads)
            raise UserError(f"{name}={value} has no effect on mixing {used} (only on {takes}); leave it out")


@dataclass(frozen=True)
class ModelSettings(Settings):
    """What differs from the preset; fields are those of `WaveletGPTConfig`."""

    prefix: ClassVar[str] = "model."

    n_layer: int | None = None
    """Decoder blocks."""
    n_embd: int | None = None
    """Embedding width."""
    n_head: int | None = None
    """Attention heads."""
    n_kv_head: int | None = None
    """Key/value heads (grouped queries); default: n_head."""
    n_inner: int | None = None
    """Feed-forward width; default 4 n_embd (gpt2) or 8/3 n_embd (llama)."""
    n_positions: int | None = None
    """Context length in tokens."""
    activation_function: str | None = None
    """Nonlinearity of the feed-forward, as transformers names it (gelu_pytorch_tanh, with llama blocks silu)."""
    norm_position: Literal["pre", "post"] | None = None
    """Norms before or after attention and feed-forward."""
    position_embedding: Literal["learned", "sinusoidal", "rope", "none"] | None = None
    """Positions; default: the architecture's."""
    rope_fraction: float | None = None
    """Share of each head's channels that rotary positions turn (1)."""
    dropout: Share | None = None
    """Dropout of embeddings, attention and residuals."""
    initializer_range: float | None = None
    """Standard deviation of the initial weights (1 / sqrt(n_embd); from a width of 768 on 0.02, GPT-2's)."""
    mix_placement: str | None = None
    """Where the filter is: "block" (each block's output), or one or several sites joined with "+", of embedding,
    attention_input, query, key, value, attention_output, mlp_input, mlp_hidden, mlp_output, block."""
    mix_residual: bool | None = None
    """True adds the filter's result to its channels, False replaces them (conv and dynamic add, others replace)."""
    mix_fraction: float | None = None
    """Share of the channels that are mixed (0.5)."""
    min_window: int | None = None
    """Shortest window in tokens (2)."""
    max_window: int | None = None
    """Longest window in tokens, a power of two (4; preset paper: the context)."""
    mix_allocation: Literal["uniform", "geometric"] | None = None
    """How channels are dealt to windows (uniform)."""
    mix_edge: Literal["zero", "partial"] | None = None
    """Before the sequence: zeros (the default), or means over the values that exist."""
    mix_sharing: Literal["coordinate", "head", "level"] | None = None
    """Learned taps: of each channel (coordinate, the default), each head, or each window (level)."""
    mix_start: Literal["mean", "haar", "zero", "uniform", "convex", "recent"] | None = None
    """What learned taps start as; haar: means and details. Default: the filter's own."""
    mix_kernel_size: int | None = None
    """Mixing "conv" and "dynamic": taps (4)."""
    mix_unit_sum: bool | None = None
    """Mixing "conv": the taps of a channel sum to 1, the newest is what the others leave."""
    mix_wavelet: Literal["haar", "db2", "db3", "db4", "db5", "db6", "db7", "db8"] | None = None
    """Mixing "wavelet": Haar's wavelet or one of Daubechies' (db2)."""
    mix_band: Literal["approximation", "detail", "both"] | None = None
    """Mixing "wavelet": which coefficients (approximation)."""
    mix_row: int | None = None
    """Mixing "bands": tokens in a row of a picture, whose predecessor in the row above is added."""
    mix_layers: str | None = None
    """"all", "inner" (all but the last block) or indices such as "0,2,4"."""


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """Optimiser, schedule, evaluation, checkpoints."""

    prefix: ClassVar[str] = "training."

    schedule: Literal["cosine", "linear", "constant", "plateau"] = "cosine"
    """After the warm-up: cosine to lr/10, linear to 0, constant, or plateau (lr/10 when the held-out loss has
    not fallen for 3 evaluations, the paper's)."""
    warmup_steps: NotNegative | None = None
    """Linear warm-up; default: 5 % of the steps, at most 1000."""
    weight_decay: NotNegativeNumber = 0.1
    """AdamW's decay, on matrices only."""
    beta2: Annotated[float, Interval(ge=0, le=0.999999)] = 0.95
    """AdamW's second-moment decay."""
    clip: Annotated[float, Gt(0)] = 1.0
    """Largest gradient norm."""
    kernel_lr_scale: PositiveNumber | None = None
    """Learning rate of learned kernels in multiples of lr (1); long ones, which start at 1/window, may want less."""
    packing: bool = False
    """Keep the documents in a sequence apart: no attention, positions or mixing beyond where one begins."""
    accumulation: Positive = 1
    """Batches added up before each step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights stay fp32."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention code; eager is the faster on CPUs in bf16, at short contexts."""
    compile: bool = False
    """torch.compile the model."""
    fsdp: bool = False
    """Each of several processes holds a part of the model (FSDP 2); without, each holds a copy (DDP)."""
    eval_every: Positive | None = None
    """Steps between evaluations; default: a 40th of the run, more where that would cost over 5 % of it."""
    eval_windows: Positive | None = None
    """Held-out windows of one context each that every evaluation reads; default: 128, fewer in short runs."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    save_every: Positive | None = None
    """Steps between checkpoints; default: a 10th of the run."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept; older ones are deleted."""
    threads: Positive | None = None
    """CPU threads of torch; default: its own choice."""
    workers: NotNegative = 0
    """Processes that read batches."""
    samples: NotNegative = 3
    """Samples generated at the end."""
    sample_tokens: Positive | None = None
    """Tokens of each sample; default: what suits the modality, 200 for text."""


@dataclass(frozen=True)
class Recipe(Settings):
    """All settings of a run but the data's name and the output folder."""

    modality: ModalityName | None = None
    """How files become tokens; default: the data set's own, else what the names of the files tell."""
    preset: Literal["tiny", "small", "paper", "gpt2"] = "small"
    """Sizes of the model."""
    architecture: Literal["gpt2", "llama"] = "gpt2"
    """Blocks: gpt2 (learned positions, LayerNorm, GELU) or llama (RoPE, RMSNorm, SwiGLU)."""
    base_model: str | None = None
    """A causal language model of transformers in place of preset and architecture: a hub name, or a folder with a
    config.json. Its config alone is read, for a model with new weights; of the preset, context and windows remain."""
    from_pretrained: bool = False
    """Go on with the weights of the base model (.safetensors), on text read with its own tokenizer."""
    pretrained: Literal["replace"] | None = None
    """replace: with pretrained weights, allow mixing fixed and learnable, which ruin trained weights at first."""
    mixing: str = "fixed"
    """The filter over time."""
    max_steps: Positive = 1200
    """Optimiser steps."""
    batch_size: Positive = 16
    """Sequences per batch and process."""
    lr: PositiveNumber = 2e-3
    """Peak learning rate."""
    seed: Seed = 0
    """Initial weights, order of the batches, samples."""
    device: DeviceName = "auto"
    """Where it computes; auto: on a GPU if there is one."""
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    source: DataSettings = field(default_factory=DataSettings)

    most_eval_windows: ClassVar[int] = 128

    def presets(self) -> dict[str, dict[str, Any]]:
        """Sizes of the model by name."""
        return PRESETS

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_base_model()
        check_choice("mixing", self.mixing, self.mixings())

    def _check_base_model(self) -> None:
        """Refuse settings that need a model of transformers where there is none, and those that have no effect on
        one."""
        if self.base_model is None:
            given = {"from_pretrained": self.from_pretrained, "pretrained": self.pretrained}
            for name in (name for name, value in given.items() if value):
                raise UserError(f"{name} needs a base_model, whose weights are meant")
            return
        if self.pretrained and not self.from_pretrained:
            raise UserError("pretrained=replace has no effect on new weights; leave it out, or give from_pretrained")
        if self.architecture != "gpt2":
            raise UserError(f"architecture={self.architecture} has no effect with a base_model; leave one of them out")
        for name, value in dataclasses.asdict(self.model).items():
            if value is not None and name not in {"n_positions", *OF_ADDED_MIXING}:
                raise UserError(
                    f"model.{name}={value} has no effect with base_model {self.base_model}: its config.json has its "
                    "sizes; copy that into a folder, change it there, and name the folder"
                )

    def mixings(self) -> tuple[str, ...]:
        """What `mixing` may be in this recipe."""
        return mixing_names() if self.base_model is None else added_mixing_names()

    def reading(self) -> tuple[ModalityName | None, DataSettings]:
        """The modality and the settings to read data with: trained weights need the tokens they were trained on."""
        if not self.from_pretrained or self.source.tokenizer or self.modality not in (None, "bpe"):
            return self.modality, self.source
        return "bpe", dataclasses.replace(self.source, tokenizer=self.base_model)

    # Defaults that depend on the length of the run.

    @property
    def eval_every(self) -> int:
        """Steps between evaluations: there are 40, or fewer where 40 would read more than `_evaluated` sequences."""
        times = min(40, max(1, self._evaluated // self.eval_windows - 1))  # one more is before the first step
        return self.training.eval_every or -(-self.max_steps // times)

    @property
    def eval_windows(self) -> int:
        """A power of two, about three times the number of evaluations: 32 in a run of 300 batches of 16."""
        suits = 1 << (max(1, math.isqrt(3 * self._evaluated)).bit_length() - 1)
        return self.training.eval_windows or min(self.most_eval_windows, max(8, suits))

    @property
    def _evaluated(self) -> int:
        """How many sequences all evaluations together may read: a tenth of those trained on.

        Evaluating a sequence costs a third of training on it, so this is 3.3 % of the run.
        """
        return self.max_steps * self.batch_size * self.training.accumulation // 10

    def with_evaluations(self, recorded: dict[str, Any] | None = None) -> Recipe:
        """A copy with `eval_every` and `eval_windows` set, so that they no longer depend on other settings.

        Each that this recipe does not set is that of the recipe that a run has `recorded`, else the default.
        """
        then = (recorded or {}).get("training") or {}
        numbers = {
            name: getattr(self.training, name) or then.get(name) or getattr(self, name)
            for name in ("eval_windows", "eval_every")
        }
        return dataclasses.replace(self, training=dataclasses.replace(self.training, **numbers))

    @property
    def save_every(self) -> int:
        return self.training.save_every or max(1, self.max_steps // 10)

    @property
    def warmup_steps(self) -> int:
        given = self.training.warmup_steps
        return given if given is not None else min(1000, self.max_steps // 20)

    def model_settings(self) -> dict[str, Any]:
        """Keyword arguments of `WaveletGPTConfig`: the preset, then what was set here."""
        settings = {**self.presets()[self.preset], **self.changes()}
        # GPT-2's 0.02 makes the signals of narrow models smaller with every layer, and they start learning late.
        initial = {"initializer_range": settings["n_embd"] ** -0.5} if settings["n_embd"] < 768 else {}
        return {**initial, **settings}

    def changes(self) -> dict[str, Any]:
        """Keyword arguments of `WaveletGPTConfig` that were set here."""
        given = {k: v for k, v in dataclasses.asdict(self.model).items() if v is not None}
        dropout = given.pop("dropout", None)
        if dropout is not None:
            given.update(embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
        layers = given.get("mix_layers")
        if isinstance(layers, str) and layers not in ("all", "inner"):
            try:
                given["mix_layers"] = [int(part) for part in layers.replace("+", ",").split(",")]
            except ValueError:
                raise UserError(f'model.mix_layers={layers!r} is not "all", "inner" or indices such as 0,2') from None
        return {"architecture": self.architecture, "mixing": self.mixing, **given}

    def override(self, changes: dict[str, Any], where: str) -> Recipe:
        """A copy with `changes`, which are as in a recipe file: `{"model": {"n_layer": 2}}`, or just `{"n_layer": 2}`.

        Raises:
            UserError: an unknown name, or a value that does not fit. The message begins with `where`, the origin of the
                changes.
        """
        own = [field.name for field in dataclasses.fields(self)]
        groups = {name: getattr(self, name) for name in own if isinstance(getattr(self, name), Settings)}
        known = [name for name in own if name not in groups]
        known += [f"{group}.{field.name}" for group in groups for field in dataclasses.fields(groups[group])]
        flat: dict[str, Any] = {}
        for name, value in changes.items():
            if name not in groups:
                flat[name] = value
            elif isinstance(value, dict):
                flat |= {f"{name}.{key}": item for key, item in value.items()}
            elif value is not None:  # nothing but comments
                raise UserError(f"{where}: {name} holds settings, one a line below it, not {value!r}")
        given: dict[str, dict[str, Any]] = {group: {} for group in ("", *groups)}
        for name, value in flat.items():
            name = name.replace("-", "_")
            full = next((full for full in known if name in (full, full.partition(".")[2])), None)
            if full is None:
                raise UserError(f'{where}: no setting "{name}"{suggest(name, known)}')
            group, _, setting = full.rpartition(".")
            given[group][setting] = value
        try:
            changed = {group: dataclasses.replace(part, **given[group]) for group, part in groups.items()}
            return dataclasses.replace(self, **given[""], **changed)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict, as run.json records it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any], where: str = "run.json") -> Recipe:
        """The inverse of `as_dict`."""
        return cls().override({k: v for k, v in value.items() if v is not None}, where)
