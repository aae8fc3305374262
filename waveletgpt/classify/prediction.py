"""The commands `predict` and `evaluate` for a classifier's run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from waveletgpt.classify.examples import ExampleStore, as_item
from waveletgpt.classify.scores import CLASSIFICATION
from waveletgpt.classify.task import collate, measure, predict, probabilities
from waveletgpt.errors import UserError, suggest
from waveletgpt.model.classifier import WaveletGPTForSequenceClassification
from waveletgpt.runs.evaluation import load_model
from waveletgpt.runs.folder import RunFolder
from waveletgpt.runs.records import RunRecord

_LARGEST = 1 << 26  # bytes of a picture


def open_classifier(folder: str | Path, device: str = "auto") -> tuple[RunFolder, Any]:
    """A classifier's run and its newest model, on the device.

    Raises:
        UserError: there is no run or no checkpoint, the run is a language model's, the weights are broken, or the
            device does not exist.
    """
    run = RunFolder.open(folder)
    if run.info.get("task") != CLASSIFICATION:
        raise UserError(f"{run.path} is not a classifier: use `waveletgpt evaluate` or `generate` for language models")
    return run, load_model(run, device, WaveletGPTForSequenceClassification)


def evaluate_classifier(
    folder: str | Path, split: str = "validation", batch_size: int = 16, device: str = "auto"
) -> dict[str, Any]:
    """Scores of a run's model on a whole split: accuracy and top5, or map and top5; with the number of recordings and
    the split's name.

    Raises:
        UserError: see `open_classifier`; the split is unknown or empty, or the examples are gone or have changed.
    """
    if split not in ("train", "validation", "test"):
        raise UserError(f'`split`: no "{split}"; use validation, test or train{suggest(split, ["validation", "test"])}')
    if batch_size < 1:
        raise UserError(f"`batch_size={batch_size}` must be at least 1")
    run, model = open_classifier(folder, device)
    data = run.info["data"]
    try:
        store = ExampleStore.open(data["store"])
    except UserError as error:
        raise UserError(f"the examples of {run.path} are gone ({error}); resume its command to make them") from None
    if store.fingerprint != data["fingerprint"]:
        raise UserError(f"{data['name']} has changed since {run.path} was trained on it; train again")
    examples = store.split(split)
    if not len(examples):
        raise UserError(f"the {split} split of {data['name']} has no examples: choose another split")
    scores, labels = predict(model, examples, batch_size, store.multi_label)
    return {"split": split, **measure(scores, labels), "recordings": len(scores)}


@torch.inference_mode()
def predict_files(
    folder: str | Path, files: Sequence[str], top: int = 3, device: str = "auto"
) -> list[tuple[str, list[tuple[str, float]]]]:
    """(file, [(class, probability), ...]) with the `top` likeliest classes of each file, the likeliest first.

    A recording is cut into pieces as in training, and their probabilities are averaged. A run that compares texts takes
    its files in pairs; the name of a pair is both names.

    Raises:
        UserError: see `open_classifier`; there is no file, a pair is incomplete, or a file is of another kind than the
            run was trained on.
    """
    if not files:
        raise UserError("predict: name at least one file after the run folder")
    if top < 1:
        raise UserError(f"`top={top}` must be at least 1")
    run, model = open_classifier(folder, device)
    multi_label = model.config.problem_type == "multi_label_classification"
    together = model.config.n_inputs
    if len(files) % together:
        found = f"compares {together} files at a time, but {len(files)} are named"
        raise UserError(f"predict: {run.path} {found}: name both files of each pair")
    kind = "waveform" if run.info["data"]["modality"] == "audio" else "tokens"
    rows = []
    for i in range(0, len(files), together):
        name = " ".join(files[i : i + together])
        pieces = zip(*(read_inputs(Path(file), run.info) for file in files[i : i + together]), strict=True)
        batch = collate([as_item(piece, kind) for piece in pieces])
        logits = model(**{key: value.to(model.device) for key, value in batch.items()}).logits.float().cpu().numpy()
        scores = probabilities(logits, multi_label).mean(0)
        best = np.argsort(-scores, kind="stable")[:top]
        rows.append((name, [(str(model.config.id2label[int(k)]), float(scores[k])) for k in best]))
    return rows


def read_inputs(path: Path, info: RunRecord) -> list[np.ndarray]:
    """A file as input for a run's model: ids 1 .. 256 of a text, expression or picture, or int16 pieces of a recording.

    Raises:
        UserError: the file is missing, empty, or not of the run's kind.
    """
    modality, longest = info["data"]["modality"], int(info["data"]["max_length"])
    if not path.is_file():
        raise UserError(f"{path} is not a file: name a file to predict")
    if modality == "audio":
        from waveletgpt.classify.clips import read_clips

        source = info["recipe"]["source"]
        return read_clips(path, source["sample_rate"], source["clip_seconds"])
    if modality == "image":
        from waveletgpt.data.modalities.images import Shape, Unusable, load

        try:
            pixels = load(_read(path, _LARGEST), Shape(round(longest**0.5), 1))
        except Unusable as error:
            raise UserError(f"{path}: {error}") from None
        return [np.frombuffer(pixels, np.uint8).astype(np.int64) + 1]
    if modality == "listops":
        from waveletgpt.data.modalities.listops import EQUALS, IDS, LISTOPS, WORDS, evaluate

        content = _read(path, 64 * longest)  # a word of an expression has four letters
        ids = LISTOPS.encode_prompt(content.decode("utf-8", "replace"), None)
        if len(ids) > longest or max(ids) >= IDS[EQUALS]:
            told = (
                f"it has {len(ids)} words, at most {longest} go"
                if len(ids) > longest
                else f"it has {EQUALS} or is empty"
            )
            raise UserError(f"{path} is not an expression to predict: {told}; write one such as [MAX 2 9 ]")
        try:
            evaluate([WORDS[i] for i in ids])
        except ValueError as error:
            raise UserError(f"{path} is not an expression to predict: {error}; write one such as [MAX 2 9 ]") from None
        return [np.array(ids) + 1]
    content = _read(path, longest)
    if not content:
        raise UserError(f"{path} is empty: name another file")
    return [np.frombuffer(content, np.uint8).astype(np.int64) + 1]


def _read(path: Path, most: int) -> bytes:
    """The first `most` bytes, because a file can be larger than memory."""
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
