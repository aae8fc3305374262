"""Classification as a task of the trainer: from labelled examples to accuracy, confusion and sample predictions.

Shapes: B batch, T tokens, N samples, K classes, n examples, r recordings. An example is one input. If a recording was
cut into several examples, their probabilities are averaged, and the recording counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel

from waveletgpt.classify.examples import Examples, ExampleStore, show
from waveletgpt.classify.settings import ClassifierRecipe
from waveletgpt.data.mixture import said
from waveletgpt.data.modalities.audio import write_wav
from waveletgpt.errors import UserError
from waveletgpt.model.classifier import WaveletGPTForSequenceClassification
from waveletgpt.runs.folder import RunFolder, write_json
from waveletgpt.runs.records import DataRecord, ResultRecord, SplitScores
from waveletgpt.training.recipe import Recipe
from waveletgpt.training.task import initialised

PREDICTIONS = "predictions.json"
_HELD_OUT: tuple[Literal["validation", "test"], ...] = ("validation", "test")


class Classification:
    """Predict the class of an example: text, expression, picture, pair of texts, or recording."""

    name = "classification"

    def __init__(self, store: ExampleStore):
        self.store = store
        self.fingerprint = store.fingerprint
        self.measures = measures(store.multi_label)

    def build_model(self, recipe: Recipe) -> PreTrainedModel:
        if not isinstance(recipe, ClassifierRecipe):
            raise TypeError("labelled examples need a ClassifierRecipe: give one instead of a Recipe")
        store, preset = self.store, recipe.model_settings()
        for split in ("train", "validation"):
            if not len(store.split(split)):
                raise UserError(f"the {split} split has no examples; give more data")
        frame = preset.get("frame_size")
        if frame is not None and frame < 1:
            raise UserError(f"model.frame_size={frame} must be at least 1")
        if (store.kind == "waveform") != bool(frame):
            wants = (
                "recordings need a preset with frames, such as clips" if not frame else "its frames are for recordings"
            )
            raise UserError(f"`preset={recipe.preset}` does not fit this data: {wants}")
        training = recipe.training
        if not frame and any((training.gain, training.crop, training.mixup)):
            raise UserError("training.gain, crop and mixup are for recordings, and this data has none: leave them out")
        labels = dict(enumerate(store.classes))
        model = initialised(
            WaveletGPTForSequenceClassification,
            recipe,
            n_positions=-(-store.max_length // frame) if frame else store.max_length,
            vocab_size=store.vocab_size or 1,
            id2label=labels,
            label2id={name: index for index, name in labels.items()},
            problem_type="multi_label_classification" if store.multi_label else "single_label_classification",
            n_inputs=store.n_inputs,
            tie_word_embeddings=False,
        )
        room = model.config.n_positions * (frame or 1)
        if room < store.max_length:
            raise UserError(
                f"model.n_positions={model.config.n_positions} is too short for examples of {store.max_length}; "
                "leave it out, or cut them with `length`"
            )
        return model

    def describe(self, data: str | Sequence[str]) -> DataRecord:
        store = self.store
        return {
            "name": said(data),
            "modality": store.modality,
            "fingerprint": store.fingerprint,
            "store": str(store.path),
            "classes": len(store.classes),
            "multi_label": store.multi_label,
            "max_length": store.max_length,
            "splits": {split: {"examples": len(store.split(split))} for split in ("train", "validation", "test")},
            "source": store.meta.get("source"),
        }

    def probe(self, model: Any) -> list[int]:
        if self.store.kind != "tokens":
            return []
        return [int(t) for t in self.store.split("validation").raw(0)[0][: model.config.n_positions]]

    def sequence_tokens(self, model: Any) -> int:
        """Mean number of tokens of the training examples, without padding."""
        lengths = self.store.split("train").lengths()
        return max(1, round(lengths.sum() / len(lengths) / (model.config.frame_size or 1)))

    def train_data(self, recipe: Recipe, model: Any, count: int) -> ShuffledExamples:
        assert isinstance(recipe, ClassifierRecipe)
        augment = Augmentation(recipe.training.gain, recipe.training.crop, recipe.training.mixup)
        return ShuffledExamples(self.store, count, recipe.seed, augment if any(vars(augment).values()) else None)

    def eval_data(self, recipe: Recipe, model: Any) -> Dataset:
        """Whole recordings from the validation split, always the same ones; `measure` knows which."""
        held_out = self.store.split("validation")
        recordings = np.unique(held_out.clips)
        # Drawn at random: if classes alternate in the data, a fixed stride could miss some.
        chosen = np.random.default_rng(0).permutation(recordings)[: recipe.eval_windows]
        indices = np.flatnonzero(np.isin(held_out.clips, chosen))
        self._clips = held_out.clips[indices]
        return Subset(held_out, indices.tolist())

    def arguments(self) -> dict[str, Any]:
        return {"label_names": ["labels"]}

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        return collate(rows)

    def measure(self, prediction: Any) -> Any:
        scores, labels = prediction.predictions, prediction.label_ids
        return measure(*by_recording(probabilities(scores, self.store.multi_label), labels, self._clips))

    def tokenizer(self) -> None:
        return None

    def finish(self, run: RunFolder, recipe: Recipe, device: Any) -> ResultRecord:
        """Scores on all of validation and test. Writes predictions.json, with the confusion matrix and examples.

        majority_class: the accuracy of always naming the most common class.
        """
        model = WaveletGPTForSequenceClassification.from_pretrained(run.path).to(device)  # type: ignore[arg-type]
        store = self.store
        found: ResultRecord = {}
        for split in _HELD_OUT:
            if not len(store.split(split)):
                continue
            scores, labels = predict(model, store.split(split), recipe.batch_size, store.multi_label)
            found[split] = {**measure(scores, labels), "recordings": len(scores)}
            if not store.multi_label:
                found[split]["majority_class"] = float(np.bincount(labels).max() / len(labels))
        # Show examples of the test split if there is one.
        shown = list(found)[-1]
        value: dict[str, Any] = {"classes": list(store.classes), "split": shown, **found}
        if not store.multi_label:
            value["confusion"] = confusion(scores, labels).tolist()
        value["examples"] = self._examples(store.split(shown), scores, recipe.training.samples, run.path)
        write_json(run.path / PREDICTIONS, value)
        return found

    def _examples(self, examples: Examples, scores: np.ndarray, count: int, folder: Path) -> list[dict[str, Any]]:
        """The first piece of `count` recordings, with its classes and the model's answer."""
        first = np.unique(examples.clips, return_index=True)[1]
        count = min(count, len(first))
        rows = []
        (folder / "samples").mkdir(exist_ok=True)
        for k in range(count):
            place = k * len(first) // count
            i = int(first[place])
            likeliest = np.argsort(-scores[place], kind="stable")[:3]
            sample = write_example(self.store, examples.raw(i), folder / "samples" / str(k))
            truth = np.flatnonzero(examples.labels[i]) if self.store.multi_label else [int(examples.labels[i])]
            names = [self.store.classes[j] for j in truth]
            said = [[self.store.classes[j], round(float(scores[place][j]), 4)] for j in likeliest]
            rows.append({**sample, "truth": names, "said": said})
        return rows


def measures(multi_label: bool) -> tuple[str, ...]:
    """Names of the scores; arms are compared by the first."""
    return ("map", "top5") if multi_label else ("accuracy", "top5")


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training recordings; see `ClassifierTraining`."""

    gain: float
    crop: float
    mixup: float

    def change(self, wave: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        """Change loudness and position of one recording (N,)."""
        if self.gain:
            wave = wave * 10 ** (random.uniform(-self.gain, self.gain) / 20)
        if self.crop:
            most = int(min(1.0, self.crop) * len(wave))
            shift = int(random.integers(-most, most + 1))
            wave = torch.nn.functional.pad(wave, (max(shift, 0), max(-shift, 0)))
            wave = wave[: len(wave) - shift] if shift > 0 else wave[-shift:]
        return wave.clamp(-1, 1)


class ShuffledExamples(Dataset):
    """`length` training examples, in a new order in every epoch. Item i depends only on (seed, i).

    So every arm of a comparison sees the same batches, and a resumed run continues by skipping indices.
    """

    def __init__(self, store: ExampleStore, length: int, seed: int, augmentation: Augmentation | None = None):
        self.examples, self.length, self.seed, self.augmentation = store.split("train"), length, seed, augmentation
        self.classes = len(store.classes)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.length

    def _at(self, index: int) -> int:
        epoch, place = divmod(index, len(self.examples))
        if epoch != self._epoch:
            random = np.random.Generator(np.random.Philox(key=self.seed, counter=[1, 0, 0, epoch]))
            self._epoch, self._order = epoch, random.permutation(len(self.examples))
        return int(self._order[place])

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.examples[self._at(index)]
        if self.augmentation is None or "input_values" not in row:
            return row
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=[2, 0, 0, index]))
        wave, labels = self.augmentation.change(row["input_values"], random), row["labels"]
        if self.augmentation.mixup:
            other = self.examples[int(random.integers(len(self.examples)))]
            share = float(random.beta(self.augmentation.mixup, self.augmentation.mixup))
            second = self.augmentation.change(other["input_values"], random)
            size = max(len(wave), len(second))
            wave, second = (torch.nn.functional.pad(w, (0, size - len(w))) for w in (wave, second))
            wave = share * wave + (1 - share) * second
            labels = share * self._shares(labels) + (1 - share) * self._shares(other["labels"])
        return {"input_values": wave, "labels": labels}

    def _shares(self, labels: torch.Tensor) -> torch.Tensor:
        """(K,) floats of a class, or of several."""
        return labels if labels.ndim else torch.nn.functional.one_hot(labels, self.classes).float()


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right to the longest example.

    It has input_ids (B, T), or (B, 2, T) for pairs, or input_values (B, N); labels (B,) or (B, K); and attention_mask,
    of the shape of the inputs, if anything is padded.
    """
    key = "input_ids" if "input_ids" in rows[0] else "input_values"
    inputs = [list(row[key]) if isinstance(row[key], list | tuple) else [row[key]] for row in rows]
    flat = [x for row in inputs for x in row]
    size = max(1, *map(len, flat))
    values = torch.stack([torch.nn.functional.pad(x, (0, size - len(x))) for x in flat])
    batch = {key: values.view(len(rows), len(inputs[0]), size) if len(inputs[0]) > 1 else values}
    lengths = torch.tensor([len(x) for x in flat])
    if int(lengths.min()) < size:
        mask = (torch.arange(size) < lengths[:, None]).long()
        batch["attention_mask"] = mask.view_as(batch[key])
    if "labels" in rows[0]:
        batch["labels"] = torch.stack([torch.as_tensor(row["labels"]) for row in rows])
    return batch


@torch.inference_mode()
def predict(model: Any, examples: Examples, batch_size: int, multi_label: bool) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (r, K) of all recordings, in the order of `examples.clips`, and their labels."""
    model.eval()
    scores, labels = [], []
    for batch in DataLoader(examples, batch_size=batch_size, collate_fn=collate):
        labels.append(batch.pop("labels"))
        logits = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
        scores.append(logits.float().cpu())
    found = probabilities(torch.cat(scores).numpy(), multi_label)
    return by_recording(found, torch.cat(labels).numpy(), examples.clips)


def probabilities(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """Softmax over classes, or a sigmoid for each; (n, K)."""
    x = torch.from_numpy(np.asarray(logits, np.float32))
    return (x.sigmoid() if multi_label else x.softmax(-1)).numpy()


def by_recording(scores: np.ndarray, labels: np.ndarray, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of `scores` (n, K) over the pieces of each recording, and its label, sorted by `clips` (n,)."""
    _, first, which = np.unique(clips, return_index=True, return_inverse=True)
    total = np.zeros((len(first), scores.shape[1]))
    np.add.at(total, which, scores)
    return total / np.bincount(which)[:, None], labels[first]


def measure(scores: np.ndarray, labels: np.ndarray) -> SplitScores:
    """accuracy and top5 for labels (r,), or map and top5 for labels (r, K); from 0 to 1 (best).

    top5: share of recordings with a right class among the five likeliest. map: average precision of each class that
    occurs, averaged over these classes.
    """
    five = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    if labels.ndim == 1:
        return {
            "accuracy": float((five[:, 0] == labels).mean()),
            "top5": float((five == labels[:, None]).any(1).mean()),
        }
    from sklearn.metrics import average_precision_score

    truth = labels > 0.5
    present = truth.any(0)
    finite = np.nan_to_num(scores[:, present])  # diverged runs are stopped by their loss, not here
    return {
        "map": float(average_precision_score(truth[:, present], finite)) if present.any() else 0.0,
        "top5": float((np.take_along_axis(labels, five, 1) > 0.5).any(1).mean()),
    }


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(K, K) counts: rows are the true classes, columns the likeliest ones."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, scores.argmax(1), labels=range(scores.shape[1]))


def write_example(store: ExampleStore, raw: list[np.ndarray], stem: Path) -> dict[str, Any]:
    """An example for a human: {"kind", "text" | "file"}; the file's path is relative to the run folder."""
    if store.modality == "image":
        from PIL import Image

        path = stem.with_suffix(".png")
        Image.fromarray(show(store, raw)).save(path)
        return {"kind": "image", "file": f"samples/{path.name}"}
    if store.modality == "audio":
        assert store.sample_rate is not None
        path = write_wav(stem, show(store, raw) / 32768, store.sample_rate).path
        return {"kind": "audio", "file": f"samples/{path.name}"}
    return {"kind": "text", "text": str(show(store, raw))[:2000]}
