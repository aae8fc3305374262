"""What a run learns: a task gives the trainer its model, its batches and its measures; the trainer knows no task.

`LanguageModeling` predicts the next token of a token store, `classify.task.Classification` the class of an example.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from transformers import AutoModelForCausalLM, PreTrainedModel, default_data_collator
from transformers.trainer_utils import set_seed

from waveletgpt.data import TokenStore
from waveletgpt.data.mixture import Mixture, parts_of, said
from waveletgpt.data.windows import FixedWindows, MixedWindows, RandomWindows, fixed_mixture
from waveletgpt.errors import UserError
from waveletgpt.integrations.architecture import build, context_of
from waveletgpt.model.configuration import WaveletGPTConfig
from waveletgpt.model.modeling import WaveletGPTForCausalLM
from waveletgpt.runs.records import DataRecord, ResultRecord
from waveletgpt.training.recipe import Recipe

if TYPE_CHECKING:
    from waveletgpt.runs.folder import RunFolder


class Task(Protocol):
    """One kind of learning. `recipe` is the run's, `model` what `build_model` made of it."""

    name: str
    """As run.json has it."""
    measures: tuple[str, ...]
    """What `measure` gives, besides the loss, for metrics.jsonl."""
    fingerprint: str
    """Of the data: content and settings."""

    def build_model(self, recipe: Recipe) -> PreTrainedModel:
        """A freshly initialised model. With the same seed, weights that several arms have start equal.

        Raises UserError for settings that contradict each other or do not fit the data.
        """

    def describe(self, data: str | Sequence[str]) -> DataRecord:
        """The `data` part of run.json; `data` is what the user called it."""

    def probe(self, model: Any) -> list[int]:
        """Held-out tokens to picture embeddings with; empty where inputs are not tokens."""

    def sequence_tokens(self, model: Any) -> int:
        """Tokens that one training example counts as."""

    def train_data(self, recipe: Recipe, model: Any, count: int) -> Any:
        """`count` training examples, of which the i-th depends on the seed and i alone."""

    def eval_data(self, recipe: Recipe, model: Any) -> Any:
        """The held-out examples of every evaluation, the same for all arms."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `TrainingArguments`."""

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        """A batch."""

    @property
    def measure(self) -> Callable[[Any], dict[str, float]] | None:
        """`EvalPrediction` -> `measures`; None where the loss is all."""

    def tokenizer(self) -> Any:
        """Saved with the model; None where there is none."""

    def finish(self, run: RunFolder, recipe: Recipe, device: Any) -> ResultRecord:
        """Write what the trained model makes into the run folder; more entries for its `result`."""


class HasTask(Protocol):
    """A store that says what it is for, such as labelled examples."""

    fingerprint: str

    def task(self) -> Task:
        """What is to be learned of it."""


def task_of(store: TokenStore | Mixture | HasTask) -> Task:
    """What a store is for: tokens are modelled, others say it."""
    return LanguageModeling(store) if isinstance(store, TokenStore | Mixture) else store.task()


def initialised(kind: type[PreTrainedModel], recipe: Recipe, **settings: Any) -> PreTrainedModel:
    """A model of class `kind` with the recipe's settings and `settings`, seeded.

    Raises:
        UserError: settings that contradict each other.
    """
    try:
        config = WaveletGPTConfig(**{**settings, **recipe.model_settings()})
    except ValueError as error:
        raise UserError(f"model settings: {error}") from None
    set_seed(recipe.seed)
    config._attn_implementation = recipe.training.attention
    try:
        return kind(config)
    except (ImportError, ValueError) as error:
        raise UserError(f"model settings, training.attention={recipe.training.attention}: {error}") from None


class LanguageModeling:
    """Predict the next token of a token store, or of a mixture of them."""

    name = "language modeling"
    measures: tuple[str, ...] = ()
    measure = None

    def __init__(self, store: TokenStore | Mixture):
        self.store = store
        self.parts = parts_of(store)
        self.fingerprint = store.fingerprint
        self.record = store.meta.get("record")

    def build_model(self, recipe: Recipe) -> PreTrainedModel:
        special = getattr(self.tokenizer(), "eos_token_id", None)
        if recipe.base_model is not None:
            self._check_tokenizer(recipe)
            model = build(recipe, self.store.vocab_size, special)
        else:
            model = initialised(
                WaveletGPTForCausalLM,
                recipe,
                vocab_size=self.store.vocab_size,
                bos_token_id=special,
                eos_token_id=special,
                pad_token_id=special,
            )
        self._end(recipe)
        context = context_of(model.config)
        for part, split in itertools.product(self.parts, ("train", "validation")):
            have, of = len(part.store.split(split)), f" of {part.name}" if len(self.parts) > 1 else ""
            if have < context + 1:
                raise UserError(
                    f"the {split} split{of} has {have} tokens, a window needs {context + 1}; "
                    "give more data, or a shorter `model.n_positions`"
                )
        return model

    def _check_tokenizer(self, recipe: Recipe) -> None:
        """Raises UserError for trained weights whose tokens are others than the data's."""
        from waveletgpt.data.modalities.encoders import load

        mine = self.tokenizer()
        trained = recipe.from_pretrained and mine is not None
        if trained and load(str(recipe.base_model)).get_vocab() != mine.get_vocab():
            raise UserError(
                f"the data was read with another tokenizer than that of {recipe.base_model}, to which its tokens mean "
                "other things: leave modality and tokenizer out"
            )

    def describe(self, data: str | Sequence[str]) -> DataRecord:
        store = self.store
        where: DataRecord = {"mixture": store.describe()} if isinstance(store, Mixture) else {"store": str(store.path)}
        return {
            "name": said(data),
            "modality": store.modality,
            "fingerprint": store.fingerprint,
            **where,
            "vocab_size": store.vocab_size,
            "bytes_per_token": {split: store.bytes_per_token(split) for split in ("train", "validation", "test")},
            "splits": store.meta["splits"],
            "source": store.meta.get("source"),
        }

    def probe(self, model: Any) -> list[int]:
        return [int(t) for t in self.parts[0].store.split("validation")[: context_of(model.config)]]

    def sequence_tokens(self, model: Any) -> int:
        return context_of(model.config)

    def train_data(self, recipe: Recipe, model: Any, count: int) -> RandomWindows | MixedWindows:
        place, end = (context_of(model.config), count, recipe.seed, self.record), self._end(recipe)
        each = [RandomWindows(part.store.split("train"), *place, end) for part in self.parts]
        return each[0] if len(each) == 1 else MixedWindows(each, [part.weight for part in self.parts], recipe.seed)

    def eval_data(self, recipe: Recipe, model: Any) -> Any:
        held_out = [part.store.split("validation") for part in self.parts]
        weights, place = [part.weight for part in self.parts], (context_of(model.config), recipe.eval_windows)
        return fixed_mixture(held_out, weights, *place, self.record, self._end(recipe))

    def _end(self, recipe: Recipe) -> int | None:
        """The token between documents, if they are to be kept apart. Raises UserError where there is none."""
        return self.parts[0].store.end_of_documents() if recipe.training.packing else None

    def arguments(self) -> dict[str, Any]:
        return {"label_names": ["shift_labels"], "prediction_loss_only": True}

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        # Windows are of one length: the collator that goes with a tokenizer would only look for padding.
        return default_data_collator(rows)

    def tokenizer(self) -> Any:
        return self.store.load_tokenizer()

    def finish(self, run: RunFolder, recipe: Recipe, device: Any) -> ResultRecord:
        from torch.utils.data import DataLoader

        from waveletgpt.runs.breakdown import break_down, by_source
        from waveletgpt.runs.folder import write_json
        from waveletgpt.runs.sampling import sample_run

        # The saved model, because the one in memory may be compiled, or sharded over processes.
        model = AutoModelForCausalLM.from_pretrained(run.path).to(device)
        write_json(run.path / "samples.json", sample_run(model, self.store, recipe, run.path))
        windows = DataLoader(self.eval_data(recipe, model), batch_size=recipe.batch_size)
        nll = next(row["nll"] for row in reversed(run.metrics()) if "nll" in row)
        size = self.store.bytes_per_token("validation")
        bits = nll / math.log(2) / size if size else None
        found = break_down(model.eval(), windows)
        if len(self.parts) > 1:
            place = (context_of(model.config), recipe.eval_windows, self.record, self._end(recipe))
            held_out = {part.name: FixedWindows(part.store.split("validation"), *place) for part in self.parts}
            found["sources"] = by_source(model, held_out, recipe.batch_size)
        return {"bits_per_byte": bits, "breakdown": found}
