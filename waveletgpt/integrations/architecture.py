"""Models of transformers as the architecture of a run: what a recipe's `base_model` names, and what else asks of them.

A configuration alone makes a model with new weights; `from_pretrained` also takes its weights. No code of a hub's model
is ever run.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.trainer_utils import set_seed

from waveletgpt.errors import UserError
from waveletgpt.integrations.huggingface import add_mixing
from waveletgpt.training.recipe import OF_ADDED_MIXING

if TYPE_CHECKING:
    from waveletgpt.training.recipe import Recipe

OURS = "waveletgpt"
"""`model_type` of this package's own models."""
_BROKEN = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, AssertionError, ImportError),
    *(SafetensorError, StrictDataclassError),
)
"""What transformers raises at configurations and weights that do not go."""


def context_of(config: Any) -> int:
    """Tokens of a window that a model with this configuration is trained on.

    Of models of transformers a run notes it in their configuration: how many positions they have means less.
    """
    noted = getattr(config, "trained_context", None)
    return int(config.n_positions if noted is None else noted)


def longest_context(config: Any) -> int | None:
    """Tokens of the longest sequence that a model with this configuration takes; None where nothing limits it."""
    if config.model_type == OURS:
        return int(config.n_positions) if config.position_embedding == "learned" else None
    return getattr(config, "max_position_embeddings", None)


def mixing_of(config: Any) -> str:
    """The mixing of a model with this configuration."""
    if config.model_type == OURS:
        return str(config.mixing)
    return str((getattr(config, "wavelet_mixing", None) or {"mixing": "none"})["mixing"])


def end_tokens(config: Any) -> list[int]:
    """Tokens that end a text; some models have several."""
    end = config.eos_token_id
    return list(end) if isinstance(end, list) else [] if end is None else [end]


def identity(config: Any) -> str:
    """A hash of what makes the architecture: the same for all arms, whatever mixing they add to it."""
    skip = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")  # the trainer sets these to the tokenizer's
    values = {name: value for name, value in config.to_dict().items() if name not in (*skip, *tokens, "wavelet_mixing")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_config(name: str) -> PreTrainedConfig:
    """The configuration of a causal language model, by hub name or folder.

    Raises:
        UserError: there is none, it needs code of its own, or it is of another kind of model.
    """
    from waveletgpt.data.sources.hub import fail_soon

    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is a file"
        raise UserError(f"base_model {name} {what}: name a folder with the config.json of a model of transformers")
    if not folder.exists():
        fail_soon()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except _BROKEN as error:
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is not run here; choose an architecture of transformers"
        elif folder.exists():
            reason = f"its config.json cannot be read ({_first_line(error)})"
        else:
            reason = f"there is no such folder, nor can a model of that name be had from the hub ({_first_line(error)})"
        raise UserError(f"base_model {name}: {reason}") from None
    kind = config.model_type
    if config.is_encoder_decoder or config.get_text_config() is not config:
        what = "an encoder-decoder" if config.is_encoder_decoder else "a composite model"
        raise UserError(f"base_model {name} ({kind}) is {what}: name a model that is nothing but a decoder of tokens")
    if kind != OURS and not _is_causal_kind(config):
        raise UserError(f"base_model {name} ({kind}) is no causal language model of transformers; name one")
    result: PreTrainedConfig = config
    return result


def _is_causal_kind(config: PreTrainedConfig) -> bool:
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not None or hasattr(config, "wavelet_mixing")


def check(recipe: Recipe) -> None:
    """Tell before there is data, and without memory for weights, what `build` would.

    Raises:
        UserError: see `build`; but for weights that are not there, and losses.
    """
    config, context = _read(recipe)
    with torch.device("meta"):
        _mix(_new(config, recipe), recipe, context)


def build(recipe: Recipe, vocab_size: int, end: int | None) -> PreTrainedModel:
    """The model of a recipe with a `base_model`: weights of the seed, the same for all arms, or trained ones; then
    mixing.

    Args:
        vocab_size: tokens that the data has.
        end: the data's token between documents. New models begin and end texts with it.

    Raises:
        UserError: see `read_config`; a model that cannot be built, or is not causal; sizes, windows or mixing that do
            not go with it; weights that are not there.
    """
    config, context = _read(recipe)
    if recipe.from_pretrained:
        model = _trained(config, recipe, vocab_size)
    else:
        config.vocab_size = vocab_size
        config.bos_token_id = config.eos_token_id = end
        # Not `end`: most models keep the embedding of the token that pads at zero.
        config.pad_token_id = None
        set_seed(recipe.seed)
        model = _new(config, recipe)
    model.config.trained_context = context
    if model.device.type != "meta":
        _check_causal(model, recipe)
    _mix(model, recipe, context)
    return model


def _read(recipe: Recipe) -> tuple[Any, int]:
    """The configuration of a recipe's `base_model`, and the tokens of a window."""
    name = str(recipe.base_model)
    config = read_config(name)
    if not recipe.from_pretrained and (config.model_type == OURS or mixing_of(config) != "none"):
        mend = "leave it out, and set preset and model" if config.model_type == OURS else "name what it was made of"
        raise UserError(f"base_model {name} mixes by itself: {mend}; or go on with its weights (from_pretrained)")
    config._attn_implementation = recipe.training.attention
    most, wanted = getattr(config, "max_position_embeddings", None), recipe.model.n_positions
    if wanted is None:
        preset = int(recipe.model_settings()["n_positions"])
        return config, preset if most is None else min(preset, most)
    if most is not None and wanted > most:
        raise UserError(f"model.n_positions={wanted} is beyond the {most} positions of {name}; give fewer")
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
    """A model with its weights."""
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
        raise UserError(f"base_model {name}: its weights lack {len(missing)} that the model has, such as {missing[0]}")
    if vocab_size > model.config.vocab_size:
        raise UserError(
            f"the data has {vocab_size} tokens, {name} knows {model.config.vocab_size}: read it with the model's own "
            "tokenizer; leave modality and tokenizer out"
        )
    result: PreTrainedModel = model
    return result


@torch.no_grad()
def _check_causal(model: Any, recipe: Recipe) -> None:
    """Refuse models whose losses would not be those of the next token, as all that follows takes for granted.

    Raises:
        UserError: later tokens change earlier predictions, or `shift_labels` means nothing to the model.
    """
    vocab_size, attention, training = model.config.vocab_size, model.config._attn_implementation, model.training
    kind = f"base_model {recipe.base_model} ({model.config.model_type})"
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]]) % vocab_size
    targets = ids.roll(-1, 1)
    model.eval()
    try:
        model.set_attn_implementation("eager")  # the others may need a GPU
        out = model(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False)
    except _BROKEN as error:
        raise UserError(f"{kind} does not run: {_first_line(error)}") from None
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
    logits = out.logits.float()
    if (logits[0, :-1] - logits[1, :-1]).abs().max() > 1e-4 * logits.std():
        raise UserError(f"{kind} sees tokens that are still to come: name a causal language model")
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    if not torch.isclose(out.loss.float(), expected, rtol=1e-3, equal_nan=True):
        raise UserError(f"{kind} has a loss of its own, not that of the next token: name another")


def _mix(model: Any, recipe: Recipe, context: int) -> None:
    """Add the recipe's mixing, or see that the model has it already."""
    there, name = mixing_of(model.config), recipe.base_model
    if there != "none":
        if recipe.mixing != there:
            raise UserError(f'{name} has mixing "{there}" already: give mixing={there} to go on with it')
        given = [key for key in sorted(OF_ADDED_MIXING) if getattr(recipe.model, key) is not None]
        if given:
            raise UserError(f"{name} has mixing already, and model.{given[0]} of its own: leave that out")
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
    more = {key: settings[key] for key in ("min_window", "mix_fraction", "mix_edge") if key in settings}
    add_mixing(
        model,
        recipe.mixing,
        max_window=longest,
        layers=range(model.config.num_hidden_layers - 1) if layers == "inner" else layers,
        pretrained=recipe.pretrained,
        **more,
    )


def check_identity(model: Any, begun: Mapping[str, Any], name: str | None) -> None:
    """Raises UserError where the `model` that run.json has of a run that has `begun` is of another architecture."""
    then = begun.get("identity")
    if then is not None and then != identity(model.config):
        raise UserError(f"the config of base_model {name} has changed since the run began: use the one of then")


def _first_line(error: BaseException) -> str:
    said = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    return textwrap.shorten((str(said).strip().splitlines() or [type(said).__name__])[0], 200)
