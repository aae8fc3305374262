"""What the commands `evaluate`, `generate` and `info` do with a run folder."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from waveletgpt.data import MODALITIES, TokenStore, prepare
from waveletgpt.data.mixture import Mixture, parts_of, said
from waveletgpt.data.modalities.text import TextModality
from waveletgpt.data.windows import FixedWindows
from waveletgpt.errors import UserError, suggest
from waveletgpt.integrations.architecture import build, context_of, end_tokens, longest_context, mixing_of
from waveletgpt.model.classifier import WaveletGPTForSequenceClassification
from waveletgpt.model.configuration import WaveletGPTConfig
from waveletgpt.model.cost import describe
from waveletgpt.model.modeling import WaveletGPTForCausalLM
from waveletgpt.runs.breakdown import UnknownToken, by_source
from waveletgpt.runs.folder import RunFolder
from waveletgpt.runs.records import ModelRecord
from waveletgpt.runs.sampling import counting, generate_tokens
from waveletgpt.training.recipe import PRESETS, Recipe
from waveletgpt.training.trainer import choose_device

log = logging.getLogger(__name__)


def load_model(run: RunFolder, device: str = "auto", kind: Any = AutoModelForCausalLM) -> Any:
    """The run's newest model, as class `kind` loads it, on the device, in evaluation mode.

    Raises:
        UserError: no checkpoint yet, broken weights, a device that is not there.
    """
    from safetensors import SafetensorError

    transformers_logging.disable_progress_bar()
    path = run.model_path()
    use_cpu = choose_device(Recipe().override({"device": device}, "device")).get("use_cpu", False)
    place = "cpu" if use_cpu else ("cuda" if torch.cuda.is_available() else "mps")
    try:
        model: Any = kind.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        whole = [str(folder) for _, folder in run.checkpoints() if folder != path]
        mend = f"use {whole[-1]} with transformers, or " if whole else ""
        raise UserError(
            f"the model in {path} cannot be loaded: {str(error).splitlines()[0]}; {mend}train it again"
        ) from None
    return model.to(place).eval()


def load_tokenizer(run: RunFolder) -> Any:
    """The tokenizer saved with the run's newest model. Raises UserError where it is damaged."""
    from transformers import AutoTokenizer

    with _damaged(f"the tokenizer in {run.model_path()}"):
        return AutoTokenizer.from_pretrained(run.model_path())


@contextlib.contextmanager
def _damaged(what: str) -> Iterator[None]:
    """Turns what libraries raise at damaged files, which is nearly anything, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what} cannot be loaded: {reason}; train it again") from None


def load_store(run: RunFolder) -> TokenStore | Mixture:
    """The token store, or the mixture of them, that the run was trained on, prepared again if it is gone.

    Raises:
        UserError: the data is gone too, or is not what it was.
    """
    fingerprint = str(run.entry("data", "fingerprint"))
    mixture, data = run.info["data"].get("mixture"), run.entry("recipe", "data")
    store: TokenStore | Mixture
    try:
        with _damaged(f"what {run.path / 'run.json'} says of the data"):
            store = Mixture.opened(mixture) if mixture else TokenStore.open(str(run.entry("data", "store")))
    except UserError:
        recorded = {"source": run.entry("recipe", "source"), **run.info["recipe"]}
        names = ("modality", "source", "base_model", "from_pretrained")
        recipe = Recipe.from_dict({name: recorded.get(name) for name in names})
        store = prepare(data, *recipe.reading())
    if store.fingerprint != fingerprint:
        raise UserError(
            f"{said(data)}, or how it is read, has changed since {run.path} was trained on it "
            f"({fingerprint[:12]} then, {store.fingerprint[:12]} now)"
        )
    return store


@torch.inference_mode()
def evaluate_run(
    folder: str | Path,
    split: str = "validation",
    windows: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    context: int | None = None,
) -> dict[str, Any]:
    """Mean loss of a run's model over windows of one context each, or of `context` tokens.

    Returns:
        nll (nats per token), perplexity, bits_per_byte (None where tokens have no bytes), tokens, split, windows,
        context; of a mixture also sources, by name the nll and windows of each: nll is their mean by weights, and
        `windows` holds for each source.

    Raises:
        UserError: no run, unknown split, a split shorter than one window, a context beyond learned positions.
    """
    run = RunFolder.open(folder)
    if split not in ("train", "validation", "test"):
        raise UserError(f'`split`: no "{split}"; use validation, test or train{suggest(split, ["validation", "test"])}')
    for name, value in (("batch_size", batch_size), ("windows", windows)):
        if value is not None and value < 1:
            raise UserError(f"`{name}={value}` must be at least 1")
    model, store = load_model(run, device), load_store(run)
    most = longest_context(model.config)
    context = context_of(model.config) if context is None else context
    if context < 1 or (most is not None and context > most):
        mend = f"1 ... {most}, as many as it has positions for" if most is not None else "1 or more"
        raise UserError(f"`context` is {context}: give {mend}")
    parts, data = parts_of(store), {}
    packing = (run.info["recipe"].get("training") or {}).get("packing")
    end = parts[0].store.end_of_documents() if packing else None
    for part in parts:
        tokens, of = part.store.split(split), f" of {part.name}" if len(parts) > 1 else ""
        if len(tokens) < context + 1:
            raise UserError(f"the {split} split{of} has {len(tokens)} tokens, a window needs {context + 1}")
        data[part.name] = FixedWindows(tokens, context, windows, store.meta.get("record"), end)
    try:
        sources = by_source(model, data, batch_size)
    except UnknownToken as error:
        place = next(part.store.path for part in parts if part.name == str(error))
        raise UserError(f"{place} holds tokens that the model does not know, it is damaged: prepare it again") from None
    nll = sum(part.weight * sources[part.name]["nll"] for part in parts)
    count = sum(len(found) for found in data.values())
    size = store.bytes_per_token(split)
    return {
        "split": split,
        "nll": nll,
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "bits_per_byte": nll / math.log(2) / size if size else None,
        "windows": count,
        "tokens": count * context,
        "context": context,
        **({"sources": sources} if len(parts) > 1 else {}),
    }


def generate_from_run(
    folder: str | Path,
    prompt: str | None,
    *,
    device: str = "auto",
    out: str | Path | None = None,
    write: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[str]:
    """Continue `prompt` (a text, or for other modalities a file; None: no prompt); settings: `continue_prompts`.

    A text of one sample is also given to `write` as it comes, prompt included; all else shows a bar on a terminal.

    Returns:
        Texts, prompt included; for sounds and pictures the paths of the files written in `out` (default: the run
        folder's `generated`).

    Raises:
        UserError: no run, a prompt that gives no tokens, settings out of range.
    """
    run = RunFolder.open(folder)
    model = load_model(run, device)
    tokenizer = load_tokenizer(run)
    modality = MODALITIES.get(str(run.entry("data", "modality")))
    if modality is None:
        raise UserError(f"{run.path} was trained on {run.entry('data', 'modality')}, a modality that is not known here")
    ids = [int(t) for t in modality.encode_prompt(prompt or "", tokenizer)]
    if isinstance(modality, TextModality) and (unknown := modality.unknown(prompt or "", tokenizer)):
        names = ", ".join(map(repr, unknown[:20])) + (", ..." if len(unknown) > 20 else "")
        print(f"the model does not know {names}: read as end of text", file=sys.stderr, flush=True)
    if settings.get("tokens") is None:
        settings["tokens"] = modality.new_tokens(ids, tokenizer)
    settings["suppress_tokens"] = modality.suppress_tokens
    is_text = isinstance(modality, TextModality)
    shown = ids if prompt else []
    with contextlib.ExitStack() as stack:
        if write and is_text and settings.get("samples", 1) == 1:
            ends = end_tokens(model.config) if settings.get("stop", True) else []
            watch: Callable[[list[int]], None] = stack.enter_context(streaming(tokenizer, shown, ends, write))
        else:
            watch = stack.enter_context(counting("generating", settings["tokens"]))
        rows = generate_tokens(model, ids, watch=watch, **settings)
    if is_text:
        return [str(tokenizer.decode([*shown, *row])) for row in rows]
    place = Path(out) if out else run.path / "generated"
    place.mkdir(parents=True, exist_ok=True)
    samples = [modality.write_sample([*ids, *row], tokenizer, place / str(i)) for i, row in enumerate(rows)]
    for sample in samples:
        if sample.repaired:
            log.warning("%s: %s", sample.path, sample.repaired)
    return [str(sample.path) if sample.text is None else sample.text for sample in samples]


@contextlib.contextmanager
def streaming(
    tokenizer: Any, prompt: list[int], ends: list[int], write: Callable[[str], None]
) -> Iterator[Callable[[list[int]], None]]:
    """Write the text of `prompt` and of the tokens that come, up to one of `ends`, a whole character at a time.

    Yields what to call with each token.
    """
    tokens = list(prompt)
    written = 0

    def show(held_back: str = "\ufffd") -> None:
        nonlocal written
        text = tokenizer.decode(tokens).rstrip(held_back)  # the first bytes of a character that is still to come
        write(text[written:])
        written = max(written, len(text))

    def watch(new: list[int]) -> None:
        if new[0] not in ends:
            tokens.extend(new)
            show()

    show()
    yield watch
    show(held_back="")


def print_samples(folder: str | Path, prompt: str | None, **settings: Any) -> None:
    """Print what `generate_from_run` gives; on a terminal a text of one sample as it comes."""
    streamed: list[str] = []

    def write(text: str) -> None:
        streamed.append(text)
        print(text, end="", flush=True)

    rows = generate_from_run(folder, prompt, write=write if sys.stdout.isatty() else None, **settings)
    if streamed:
        print()
        return
    for i, row in enumerate(rows):
        if len(rows) > 1:
            print(f"--- sample {i + 1}")
        print(row, flush=True)


def print_info(what: str, recipe: Recipe, vocab_size: int, classifiers: dict[str, dict[str, Any]]) -> None:
    """Print what a preset's or a run's model has, and what mixing adds to it; `classifiers` are presets of those."""
    known = {**PRESETS, **classifiers}
    if recipe.base_model is not None and what in PRESETS:
        new = recipe.override({"preset": what, "from_pretrained": False, "pretrained": None}, what)
        with torch.device("meta"):
            model = build(new, vocab_size, None)
            rows = _model_rows(model.config, describe(model))
    elif what in known and not Path(what).is_dir():
        settings = {**known[what], **recipe.changes()}
        kind = WaveletGPTForSequenceClassification if what in classifiers else WaveletGPTForCausalLM
        try:
            config = WaveletGPTConfig(vocab_size=vocab_size, **settings)
        except ValueError as error:
            raise UserError(f"model settings: {error}") from None
        with torch.device("meta"):
            rows = _model_rows(config, describe(kind(config)))
    elif Path(what).exists():
        run = RunFolder.open(what)
        told = [run.entry(name) for name in ("arm", "seed", "status", "command")]
        with _damaged(f"the model in {run.model_path()}"):
            config = AutoConfig.from_pretrained(run.model_path())
        value = {name: run.entry("model", name) for name in _TOLD_OF_MODELS}
        with _damaged(f"what {run.path / 'run.json'} says of the model"):
            rows = _model_rows(config, cast(ModelRecord, value))
        print("run {}: {}, seed {}, {}, {}".format(run.path, *told))
    else:
        raise UserError(f'"{what}" is neither a preset ({", ".join(known)}) nor a run folder{suggest(what, known)}')
    for name, text in rows:
        print(f"{name:>21}: {text}")


_TOLD_OF_MODELS = (
    *("windows", "state_bytes", "parameters", "extra_parameters"),
    *("flops_per_token", "mixing_flops_per_token"),
)


def _model_rows(config: Any, value: ModelRecord) -> list[tuple[str, str]]:
    """What `print_info` tells of a model; `value` has what `cost.describe` gives."""
    windows = value["windows"]
    counts = ", ".join(f"{w} x{windows.count(w)}" for w in dict.fromkeys(windows)) or "none"
    state = value["state_bytes"]
    return [
        (
            "architecture",
            f"{getattr(config, 'architecture', config.model_type)}, {config.num_hidden_layers} blocks, "
            f"E={config.hidden_size}, {config.num_attention_heads} heads, "
            f"context {context_of(config)}, vocabulary {config.vocab_size}",
        ),
        (
            "mixing",
            f"{mixing_of(config)}, {getattr(config, 'n_mixed', len(windows))} of {config.hidden_size} channels",
        ),
        ("windows", counts),
        (
            "parameters",
            f"{value['parameters']:,} (mixing: {value['extra_parameters']:,} = "
            f"{value['extra_parameters'] / value['parameters']:.2%})",
        ),
        (
            "training FLOPs/token",
            f"{value['flops_per_token']:,} (mixing: {value['mixing_flops_per_token']:,} = "
            f"{value['mixing_flops_per_token'] / value['flops_per_token']:.2%})",
        ),
        (
            "decoding state",
            f"{state['keys_values']:,} bytes keys and values, {state['mixing']:,} bytes mixing, per sequence "
            "at the full context, float32",
        ),
    ]
