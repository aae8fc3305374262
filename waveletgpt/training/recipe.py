"""A recipe: every setting of one training run. Its field docstrings are what the command line says of its options.

Precedence: command line, then the YAML file of a recipe (which holds differences only), then the defaults here; a
preset fills the model's sizes where none of these does. Imports no torch, so that help is instant.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from waveletgpt.data.settings import DataSettings
from waveletgpt.errors import UserError, suggest

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


# Model settings that a model of transformers leaves open; all others are in its own configuration.
OF_ADDED_MIXING = frozenset({"min_window", "max_window", "mix_fraction", "mix_edge", "mix_layers"})


def mixing_names() -> tuple[str, ...]:
    """Names that `mixing` takes: "none", and those in the table of model/mixing.py.

    Unless something has imported it, it is read as text: with it comes torch, too slow for a command's help.
    """
    loaded = sys.modules.get("waveletgpt.model.mixing")
    return ("none", *(_names_in_source("model/mixing.py", "MIXERS") if loaded is None else loaded.MIXERS))


def added_mixing_names() -> tuple[str, ...]:
    """Names that `mixing` takes where a model of transformers is the architecture."""
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


def check_settings_are_read(
    recipe: Recipe, mixings: typing.Sequence[str], given: typing.Iterable[str] | None = None
) -> None:
    """Refuse settings of filters that none of `mixings` reads; `given` are names, by default all that the recipe sets.

    Raises:
        UserError: with the name, the value, and the mixings that read it.
    """
    from waveletgpt.model.mixing import MIXERS

    readers = {name: MIXERS[name].reads for name in mixing_names() if name != "none"}
    if recipe.base_model is not None:
        readers = {name: OF_ADDED_MIXING for name in added_mixing_names() if name != "none"}
    known = frozenset().union(*readers.values())
    if given is None:
        given = [name for name, value in dataclasses.asdict(recipe.model).items() if value is not None]
    for name in given:
        if name in known and not any(name in readers.get(mixing, ()) for mixing in mixings):
            value, used = getattr(recipe.model, name), " and ".join(dict.fromkeys(mixings))
            takes = ", ".join(mixing for mixing, reads in readers.items() if name in reads)
            raise UserError(f"{name}={value} has no effect on mixing {used} (only on {takes}); leave it out")


@dataclass(frozen=True)
class ModelSettings:
    """What differs from the preset; fields are those of `WaveletGPTConfig`."""

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
    norm_position: Literal["pre", "post"] | None = None
    """Norms before or after attention and feed-forward."""
    position_embedding: Literal["learned", "sinusoidal", "rope", "none"] | None = None
    """Positions; default: the architecture's."""
    rope_fraction: float | None = None
    """Share of each head's channels that rotary positions turn (1)."""
    dropout: float | None = None
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
    mix_wavelet: str | None = None
    """Mixing "wavelet": "haar" or "db2" ... "db8" (db2)."""
    mix_band: Literal["approximation", "detail", "both"] | None = None
    """Mixing "wavelet": which coefficients (approximation)."""
    mix_row: int | None = None
    """Mixing "bands": tokens in a row of a picture, whose predecessor in the row above is added."""
    mix_layers: str | None = None
    """"all", "inner" (all but the last block) or indices such as "0,2,4"."""


@dataclass(frozen=True)
class TrainingSettings:
    """Optimiser, schedule, evaluation, checkpoints."""

    schedule: Literal["cosine", "linear", "constant", "plateau"] = "cosine"
    """After the warm-up: cosine to lr/10, linear to 0, constant, or plateau (lr/10 when the held-out loss has
    not fallen for 3 evaluations, the paper's)."""
    warmup_steps: int | None = None
    """Linear warm-up; default: 5 % of the steps, at most 1000."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    clip: float = 1.0
    """Largest gradient norm."""
    kernel_lr_scale: float | None = None
    """Learning rate of learned kernels in multiples of lr (1); long ones, which start at 1/window, may want less."""
    packing: bool = False
    """Keep the documents in a sequence apart: no attention, positions or mixing beyond where one begins."""
    accumulation: int = 1
    """Batches added up before each step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights stay fp32."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention code; eager is the faster on CPUs in bf16, at short contexts."""
    compile: bool = False
    """torch.compile the model."""
    fsdp: bool = False
    """Each of several processes holds a part of the model (FSDP 2); without, each holds a copy (DDP)."""
    eval_every: int | None = None
    """Steps between evaluations; default: a 40th of the run, more where that would cost over 5 % of it."""
    eval_windows: int | None = None
    """Held-out windows of one context each that every evaluation reads; default: 128, fewer in short runs."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int | None = None
    """Steps between checkpoints; default: a 10th of the run."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted."""
    threads: int | None = None
    """CPU threads of torch; default: its own choice."""
    workers: int = 0
    """Processes that read batches."""
    samples: int = 3
    """Samples generated at the end."""
    sample_tokens: int | None = None
    """Tokens of each sample; default: what suits the modality, 200 for text."""


@dataclass(frozen=True)
class Recipe:
    """All settings of a run but the data's name and the output folder."""

    modality: str | None = None
    """How files become tokens: text8, chars, bytes, bpe, audio, acoustic, images, music, listops; default: the data
    set's own, else what the names of the files tell."""
    preset: str = "small"
    """Sizes of the model: tiny, small, paper, gpt2."""
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
    max_steps: int = 1200
    """Optimiser steps."""
    batch_size: int = 16
    """Sequences per batch and process."""
    lr: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Initial weights, order of the batches, samples."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where it computes; auto: on a GPU if there is one."""
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    source: DataSettings = field(default_factory=DataSettings)

    most_eval_windows: ClassVar[int] = 128

    def presets(self) -> dict[str, dict[str, Any]]:
        """Sizes of the model by name."""
        return PRESETS

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, self.presets())
        self._check_base_model()
        check_choice("mixing", self.mixing, self.mixings())
        for settings, group in ((self, ""), (self.model, "model."), (self.training, "training.")):
            for name, hint in _hints(type(settings)).items():
                choices, value = _choices(hint), getattr(settings, name, None)
                if choices and value is not None:
                    check_choice(group + name, value, choices)
        training = self.training
        positive = {
            "max_steps": self.max_steps,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "training.accumulation": training.accumulation,
            "training.clip": training.clip,
            "training.kernel_lr_scale": training.kernel_lr_scale,
            "training.eval_every": training.eval_every,
            "training.eval_windows": training.eval_windows,
            "training.log_every": training.log_every,
            "training.save_every": training.save_every,
            "training.keep_checkpoints": training.keep_checkpoints,
            "training.threads": training.threads,
            "training.sample_tokens": training.sample_tokens,
        }
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise UserError(f"{name} must be greater than 0, got {value}")
        check_range("model.dropout", self.model.dropout or 0.0, 0, 1)
        check_range("training.warmup_steps", self.warmup_steps, 0)
        check_range("training.weight_decay", training.weight_decay, 0)
        check_range("training.workers", training.workers, 0)
        check_range("training.samples", training.samples, 0)
        check_range("training.beta2", training.beta2, 0, 0.999999)
        check_range("seed", self.seed, 0, 2**31)  # NumPy takes up to 2^32, and every further seed is one more

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
        """Names that `mixing` takes."""
        return mixing_names() if self.base_model is None else added_mixing_names()

    def reading(self) -> tuple[str | None, DataSettings]:
        """Modality and settings with which data is read: for trained weights text becomes tokens as they know them."""
        if not self.from_pretrained or self.source.tokenizer or self.modality not in (None, "bpe"):
            return self.modality, self.source
        return "bpe", dataclasses.replace(self.source, tokenizer=self.base_model)

    # Defaults that depend on the length of the run.

    @property
    def eval_every(self) -> int:
        """So that all evaluations together cost under 5 %: 40 of them, or as few as `_evaluated` pays for."""
        times = min(40, max(1, self._evaluated // self.eval_windows - 1))  # one more is before the first step
        return self.training.eval_every or -(-self.max_steps // times)

    @property
    def eval_windows(self) -> int:
        """A power of two, about three times as many as there are evaluations: 32 in a run of 300 batches of 16."""
        suits = 1 << (max(1, math.isqrt(3 * self._evaluated)).bit_length() - 1)
        return self.training.eval_windows or min(self.most_eval_windows, max(8, suits))

    @property
    def _evaluated(self) -> int:
        """Sequences that all evaluations together may read: a tenth of those trained on. Reading one costs a third
        of training
        on it, so that is 3.3 % of the run."""
        return self.max_steps * self.batch_size * self.training.accumulation // 10

    def with_evaluations(self, recorded: dict[str, Any] | None = None) -> Recipe:
        """A copy with `eval_every` and `eval_windows` set, so that they no longer follow from other settings.

        What is not set is as in the recipe that a run has `recorded`, else the default.
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
        """A copy with `changes`, nested as in a recipe file; a bare model setting (`n_layer`) also goes.

        Raises:
            UserError: unknown name (with a suggestion) or a value of the wrong type; `where` names the source.
        """
        nested: dict[str, Any] = {}
        groups = self.groups()
        for name, value in changes.items():
            name = name.replace("-", "_")
            group, _, rest = name.partition(".")
            if rest:
                nested.setdefault(group, {})
                nested[group] = {**nested[group], rest: value}
            elif name in groups and isinstance(value, dict):
                nested[name] = {**nested.get(name, {}), **value}
            elif name in _fields(type(self)) and name not in groups:
                nested[name] = value
            elif name in groups:
                if value is not None:  # nothing but comments
                    raise UserError(f"{where}: {name} holds settings, one a line below it, not {value!r}")
            else:
                home = next((g for g, kind in groups.items() if name in _fields(kind)), None)
                if home is None:
                    raise self._unknown(name, where)
                nested[home] = {**nested.get(home, {}), name: value}
        arguments: dict[str, Any] = {}
        for name, value in nested.items():
            if name in groups:
                kind, current = groups[name], getattr(self, name)
                for key in value:
                    if key.replace("-", "_") not in _fields(kind):
                        raise self._unknown(f"{name}.{key}", where)
                typed = {
                    key.replace("-", "_"): _typed(kind, key.replace("-", "_"), item, f"{where}: {name}.{key}")
                    for key, item in value.items()
                }
                arguments[name] = dataclasses.replace(current, **typed)
            elif name in _fields(type(self)):
                arguments[name] = _typed(type(self), name, value, f"{where}: {name}")
            else:
                raise self._unknown(name, where)
        return dataclasses.replace(self, **arguments)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict, as run.json records it."""
        return dataclasses.asdict(self)

    @classmethod
    def groups(cls) -> dict[str, type]:
        """Settings that are groups of settings: name and class."""
        hints = _hints(cls)
        return {name: kind for name, kind in hints.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}

    def _unknown(self, name: str, where: str) -> UserError:
        names = [*_fields(type(self)), *(f"{g}.{n}" for g, kind in self.groups().items() for n in _fields(kind))]
        return UserError(f'{where}: no setting "{name}"{suggest(name, names)}')

    @classmethod
    def from_dict(cls, value: dict[str, Any], where: str = "run.json") -> Recipe:
        """The inverse of `as_dict`."""
        return cls().override({k: v for k, v in value.items() if v is not None}, where)


def _choices(hint: Any) -> tuple[str, ...]:
    """The values that a setting takes, where its type names them."""
    for option in (hint, *typing.get_args(hint)):
        if typing.get_origin(option) is Literal:
            return typing.get_args(option)
    return ()


def _hints(kind: Any) -> dict[str, Any]:
    """The types of a class's settings, looked up once."""
    if kind not in _FOUND_HINTS:
        _FOUND_HINTS[kind] = typing.get_type_hints(kind)
    return _FOUND_HINTS[kind]


_FOUND_HINTS: dict[Any, dict[str, Any]] = {}


def _fields(kind: type) -> dict[str, Any]:
    return {f.name: f for f in dataclasses.fields(kind)}


def _typed(kind: type, name: str, value: Any, where: str) -> Any:
    """`value` in the field's type; strings (from an arm such as `none:lr=1e-3`) are parsed."""
    hint = _hints(kind)[name]
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    choices = _choices(hint)
    said = isinstance(value, str) and value.lower() in ("none", "null") and str not in options and value not in choices
    if value is None or said:
        if type(None) in options:
            return None
        raise UserError(f"{where} needs a value")
    if choices:
        check_choice(where, str(value), choices)
        return str(value)
    wanted = next(option for option in options if option is not type(None))
    if wanted is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif wanted is str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    elif not isinstance(value, bool | list | dict):
        try:
            number = float(value)
            if wanted is float:
                return number
            if number == int(number):
                return int(number)
        except (ValueError, TypeError, OverflowError):
            pass
    raise UserError(f"{where}={value!r} is not {'an integer' if wanted is int else 'a ' + wanted.__name__}")


def check_choice(name: str, value: str, choices: typing.Iterable[str]) -> None:
    """Raises UserError, with a suggestion, unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f'{name}: no "{value}"; use one of {", ".join(choices)}{suggest(value, choices)}')


def check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Raises UserError unless `value` is from `least` to `most`."""
    if not least <= value <= most:
        bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise UserError(f"{name} must be {bounds}, got {value}")


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML recipe: differences from the defaults, with `data` and `compare` (arms, seeds) as extras.

    Raises:
        UserError: unreadable, no YAML, or no mapping of settings.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text file"
        raise UserError(f"cannot read the recipe {path}: {reason}") from None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{path} must hold settings as `name: value` lines, such as `max_steps: 1200`")
    return value
