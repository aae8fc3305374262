"""Models of transformers as the architecture of a run: a recipe names one as its `base_model`.

By default only its configuration is used, with new weights; `from_pretrained` also loads its weights. Code that comes
with a model of the hub is never run.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.trainer_utils import set_seed

from waveletgpt.errors import UserError
from waveletgpt.integrations.huggingface import add_mixing
from waveletgpt.recipes import find
from waveletgpt.training.recipe import OF_ADDED_MIXING

if TYPE_CHECKING:
    from waveletgpt.training.recipe import Recipe

OURS = "waveletgpt"
"""`model_type` of this package's own models."""
_BROKEN = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, AssertionError, ImportError),
    *(SafetensorError, StrictDataclassError),
)
"""What transformers raises for configurations and weights that do not work."""


def context_of(config: Any) -> int:
    """Context length in tokens that a model with this configuration is trained on.

    For models of transformers a run writes it into the configuration, as they may have more positions than that.
    """
    noted = getattr(config, "trained_context", None)
    return int(config.n_positions if noted is None else noted)


def longest_context(config: Any) -> int | None:
    """Longest sequence, in tokens, that a model with this configuration takes; None if there is no limit."""
    if config.model_type == OURS:
        return int(config.n_positions) if config.position_embedding == "learned" else None
    return getattr(config, "max_position_embeddings", None)


def mixing_of(config: Any) -> str:
    """The mixing of a model with this configuration."""
    if config.model_type == OURS:
        return str(config.mixing)
    return str((getattr(config, "wavelet_mixing", None) or {"mixing": "none"})["mixing"])


def end_tokens(config: Any) -> list[int]:
    """The tokens that end a text; some models have several."""
    end = config.eos_token_id
    return list(end) if isinstance(end, list) else [] if end is None else [end]


def identity(config: Any) -> str:
    """A hash of the architecture without mixing, so that it is the same for all arms."""
    skip = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")  # the trainer sets these to the tokenizer's
    values = {name: value for name, value in config.to_dict().items() if name not in (*skip, *tokens, "wavelet_mixing")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_config(name: str) -> PreTrainedConfig:
    """The configuration of a causal language model, by hub name or folder.

    Raises:
        UserError: there is no such model, it needs its own code, or it is another kind of model.
    """
    from waveletgpt.data.sources.hub import fail_soon

    folder = find(name)
    if folder.exists() and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is a file"
        raise UserError(f"base_model {name} {what}: name a folder with the config.json of a model of transformers")
    if not folder.exists():
        fail_soon()
    try:
        config = AutoConfig.from_pretrained(folder if folder.exists() else name, trust_remote_code=False)
    except _BROKEN as error:
        if "trust_remote_code" in str(error):
            reason = "it needs its own code, which is not run here; choose an architecture of transformers"
        elif folder.exists():
            reason = f"its config.json cannot be read ({_first_line(error)})"
        else:
            reason = f"it is neither a folder nor a model that the hub gives ({_first_line(error)}); check the name"
        raise UserError(f"base_model {name}: {reason}") from None
    kind = config.model_type
    if config.is_encoder_decoder or config.get_text_config() is not config:
        what = "an encoder-decoder" if config.is_encoder_decoder else "a composite model"
        raise UserError(f"base_model {name} ({kind}) is {what}: name a decoder-only language model")
    if kind != OURS and not _is_causal_kind(config):
        raise UserError(f"base_model {name} ({kind}) is not a causal language model of transformers: name one that is")
    result: PreTrainedConfig = config
    return result


def _is_causal_kind(config: PreTrainedConfig) -> bool:
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not None or hasattr(config, "wavelet_mixing")


def check(recipe: Recipe) -> None:
    """Find the errors that `build` would raise, before there is data and without memory for weights.

    Raises:
        UserError: see `build`. Missing weights, a wrong loss and a model that is not causal are found by `build` only.
    """
    config, context = _read(recipe)
    with torch.device("meta"):
        _mix(_new(config, recipe), recipe, context)


def build(recipe: Recipe, vocab_size: int, end: int | None) -> PreTrainedModel:
    """The model of a recipe with a `base_model`, with mixing added. New weights depend on the seed and are the same for
    all arms; with `from_pretrained` they are loaded.

    Args:
        vocab_size: number of tokens in the data's vocabulary.
        end: the data's token between documents. New models begin and end texts with it.

    Raises:
        UserError: see `read_config`; the model cannot be built, is not causal, or does not fit the sizes, windows or
            mixing of the recipe; weights are missing.
    """
    config, context = _read(recipe)
    if recipe.from_pretrained:
        model = _trained(config, recipe, vocab_size)
    else:
        config.vocab_size = vocab_size
        config.bos_token_id = config.eos_token_id = end
        # Not `end`: most models keep the embedding of the padding token at zero.
        config.pad_token_id = None
        set_seed(recipe.seed)
        model = _new(config, recipe)
    model.config.trained_context = context
    if model.device.type != "meta":
        _check_causal(model, recipe)
    _mix(model, recipe, context)
    return model


def _read(recipe: Recipe) -> tuple[Any, int]:
    """The configuration of a recipe's `base_model`, and the context length in tokens."""
    name = str(recipe.base_model)
    config = read_config(name)
    if not recipe.from_pretrained and (config.model_type == OURS or mixing_of(config) != "none"):
        mend = "leave it out and set preset and model" if config.model_type == OURS else "name the model without mixing"
        raise UserError(f"base_model {name} has mixing already: {mend}, or train its weights on (from_pretrained)")
    config._attn_implementation = recipe.training.attention
    most, wanted = getattr(config, "max_position_embeddings", None), recipe.model.n_positions
    if wanted is None:
        preset = int(recipe.model_settings()["n_positions"])
        return config, preset if most is None else min(preset, most)
    if most is not None and wanted > most:
        raise UserError(f"model.n_positions={wanted} is more than the {most} positions of {name}: give fewer")
    return config, wanted


def _new(config: Any, recipe: Recipe) -> PreTrainedModel:
    """A model with new weights."""
    try:
        result: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
        return result
    except _BROKEN as error:
        attention = f" with training.attention={recipe.training.attention}"
        raise UserError(f"base_model {recipe.base_model} cannot be built{attention}: {_first_line(error)}") from None


def _trained(config: Any, recipe: Recipe, vocab_size: int) -> PreTrainedModel:
    """A model with its trained weights."""
    name = recipe.base_model
    safe = {"use_safetensors": True, "trust_remote_code": False}
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, told = load(name, config=config, dtype=torch.float32, output_loading_info=True, **safe)
    except _BROKEN as error:
        reason = _first_line(error)
        raise UserError(f"base_model {name}: its weights cannot be loaded from .safetensors ({reason})") from None
    missing = sorted(told["missing_keys"])
    if missing:
        raise UserError(f"base_model {name}: its weights lack {len(missing)} of the model's, such as {missing[0]}")
    if vocab_size > model.config.vocab_size:
        raise UserError(
            f"the data has a vocabulary of {vocab_size} tokens, {name} of {model.config.vocab_size}: use the model's "
            "own tokenizer (leave modality and tokenizer out)"
        )
    result: PreTrainedModel = model
    return result


@torch.no_grad()
def _check_causal(model: Any, recipe: Recipe) -> None:
    """Refuse models whose loss is not that of the next token.

    Raises:
        UserError: later tokens change earlier predictions, or the model ignores `shift_labels`.
    """
    vocab_size, attention, training = model.config.vocab_size, model.config._attn_implementation, model.training
    kind = f"base_model {recipe.base_model} ({model.config.model_type})"
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]]) % vocab_size
    targets = ids.roll(-1, 1)
    model.eval()
    try:
        model.set_attn_implementation("eager")  # other implementations may need a GPU
        out = model(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False)
    except _BROKEN as error:
        raise UserError(f"{kind} does not run: {_first_line(error)}") from None
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
    logits = out.logits.float()
    if (logits[0, :-1] - logits[1, :-1]).abs().max() > 1e-4 * logits.std():
        raise UserError(f"{kind} sees later tokens: name a causal language model")
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    if not torch.isclose(out.loss.float(), expected, rtol=1e-3, equal_nan=True):
        raise UserError(f"{kind} has another loss than that of the next token: name another model")


def _mix(model: Any, recipe: Recipe, context: int) -> None:
    """Add the recipe's mixing, or check that the model has it already."""
    there, name = mixing_of(model.config), recipe.base_model
    if there != "none":
        if recipe.mixing != there:
            raise UserError(f'{name} has mixing "{there}" already: give mixing={there} to train it on')
        given = [key for key in sorted(OF_ADDED_MIXING) if getattr(recipe.model, key) is not None]
        if given:
            raise UserError(f"{name} has mixing already, with its own model.{given[0]}: leave that setting out")
        return
    if recipe.mixing == "none":
        return
    if recipe.from_pretrained and recipe.mixing in ("fixed", "learnable") and recipe.pretrained is None:
        raise UserError(
            f"base_model {name} has trained weights, which mixing={recipe.mixing} ruins at first: give mixing=delta or "
            "gate, which leave it as it is, or pretrained=replace to train it again"
        )
    settings = recipe.model_settings()
    layers = settings.get("mix_layers", "all")
    longest = settings.get("max_window") or max(2, 1 << context.bit_length() >> 1)
    names = ["min_window", "mix_fraction", "mix_edge", "mix_placement"]
    if recipe.mixing == "learnable":  # of several arms the only one that reads it
        names.append("mix_start")
    more = {key: settings[key] for key in names if key in settings}
    add_mixing(
        model,
        recipe.mixing,
        max_window=longest,
        layers=range(model.config.num_hidden_layers - 1) if layers == "inner" else layers,
        pretrained=recipe.pretrained,
        **more,
    )


def check_identity(model: Any, begun: Mapping[str, Any], name: str | None) -> None:
    """Raises UserError if the `model` entry of the run.json of a `begun` run is of another architecture."""
    then = begun.get("identity")
    if then is not None and then != identity(model.config):
        raise UserError(f"the config of base_model {name} has changed since the run began: use the earlier one")


def _first_line(error: BaseException) -> str:
    said = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    return textwrap.shorten((str(said).strip().splitlines() or [type(said).__name__])[0], 200)
