"""`add_mixing`: mixing after or inside the decoder blocks of a causal language model of transformers.

`add_mixing` makes subclasses of the model's classes at run time and assigns them to `__class__`. So parameters keep
their names, and the library finds the classes that it expects:

- A decoder layer runs as before and then mixes, inside gradient checkpointing. At other sites a hook mixes what the
  layer's attention or feed-forward reads.
- The model keeps the mixers' states in its cache when it decodes, and can be saved and loaded.
- Its configuration has another `model_type` on disk, so that no program loads the model without mixing by mistake.

A hook before the forward pass of the module that owns the layers computes from padding and documents how far back each
token may look (`reach`). The layers get it as a keyword argument, so that gradient checkpointing uses it, too.

States for decoding and arguments of a forward pass are handled as in this package's models (model/decoding.py).
Checkpoints carry this file, `module.py`, `decoding.py` and the files these import; they import nothing else of the
package.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .module import WaveletMixing

try:
    from waveletgpt.errors import UserError
    from waveletgpt.model.decoding import MixingGeneration, check_attention, has_states, reach_told, upgrade_cache
except ImportError:
    # In a checkpoint the files lie beside this one.
    from .decoding import (  # type: ignore[import-not-found, no-redef]
        MixingGeneration,
        check_attention,
        has_states,
        reach_told,
        upgrade_cache,
    )

    UserError = ValueError  # type: ignore[assignment, misc]

MIXINGS: dict[str, str | None] = {"fixed": None, "learnable": "learnable", "delta": "delta", "gate": "gate"}
ON_DISK = "wavelet_mixed"
REACH = "wavelet_reach"  # the layers' keyword argument: a tuple of one, so that None differs from no argument
# A layer's names for what reads at a site.
READERS = {
    "attention_input": ("self_attn", "attn", "attention", "self_attention", "linear_attn", "conv"),
    "mlp_input": ("mlp", "feed_forward", "block_sparse_moe", "moe"),
}
SITES = (*READERS, "block")
CACHES = ("past_key_values", "layer_past", "past_key_value")  # a layer's names for the cache


def add_mixing(
    model: PreTrainedModel,
    mixing: str = "fixed",
    max_window: int = 4,
    min_window: int = 2,
    mix_fraction: float = 0.5,
    layers: str | Iterable[int] = "all",
    pretrained: str | None = None,
    mix_edge: str = "zero",
    mix_placement: str | Iterable[str] = "block",
    mix_start: str = "mean",
) -> PreTrainedModel:
    """Mix in the decoder blocks of a causal language model of transformers, in place.

    Args:
        model: one whose blocks get keyword arguments, such as Llama, Qwen or GPT-2, before PEFT or DDP wraps it.
        mixing: "fixed" (means) or "learnable" (weights that start as means) for models trained from scratch; "delta"
            or "gate", which at first leave the model as it is, for trained ones. See `WaveletMixing`.
        max_window, min_window: powers of two, in tokens; the windows are all powers of two from one to the other.
        mix_fraction: the share of the channels that is mixed.
        layers: "all", or the numbers of the blocks, from 0.
        pretrained: "replace" allows "fixed" or "learnable" for a model with loaded weights. These were trained without
            mixing, so the model must be trained again.
        mix_edge: "zero" or "partial": how windows that begin before a document are averaged; see `WaveletMixing`.
        mix_placement: the sites, joined with "+" or as a list: "block" (each block's output), "attention_input" and
            "mlp_input" (what attention and feed-forward read, after their norms); "input" is short for the last two.
        mix_start: "mean" or "haar", what "learnable" starts as; see `WaveletMixing`.

    Returns:
        The same model.

    Raises:
        UserError: this model or these settings are not possible. The model is then unchanged.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model is a {name}: add mixing to the transformers model itself, before PEFT or DDP wraps it")
    if any(_is_from("unsloth", module.forward) for module in model.modules()):
        raise UserError(f"{name} is patched by unsloth, which calls decoder layers itself: load it with transformers")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{name} has a PEFT adapter already: add mixing first, then the adapter")
    config = model.config
    if getattr(config, "wavelet_mixing", None) is not None:  # also if a checkpoint's own code made the class
        raise UserError(f"{name} has mixing already: for other settings, make a new model")
    if config.model_type == "waveletgpt":
        raise UserError(f"{name} has mixing of its own: give WaveletGPTConfig(mixing=...) instead")
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise UserError(f"{name} is an encoder-decoder or composite model: mixing can be added to decoder-only ones")
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal is not type(model):
        raise UserError(f"{name} is not the class that AutoModelForCausalLM loads: give a causal language model")
    if mixing not in MIXINGS:
        raise UserError(f"mixing={mixing!r} is unknown; use one of {tuple(MIXINGS)}")
    if pretrained not in (None, "replace"):
        raise UserError(f'pretrained={pretrained!r} is unknown; leave it out, or give "replace"')
    if mixing in ("fixed", "learnable") and pretrained is None and _is_loaded(model):
        raise UserError(
            f'{name} has trained weights, which mixing="{mixing}" ruins at first: give mixing="delta" or "gate", '
            'or pretrained="replace" to train it again'
        )
    number = config.num_hidden_layers
    chosen = None if layers == "all" else layers
    if chosen is not None:
        whole = not isinstance(chosen, str) and [i for i in chosen if isinstance(i, int) and 0 <= i < number]
        if not whole or whole != list(chosen):  # type: ignore[arg-type]
            raise UserError(f'layers={layers!r}: give "all" or numbers of blocks from 0 to {number - 1}')
        chosen = sorted(set(whole))
    for key, window in (("min_window", min_window), ("max_window", max_window)):
        if not isinstance(window, int) or window < 1 or window & (window - 1):
            raise UserError(f"{key}={window} is not a power of two: give 1, 2, 4, ...")
    if max_window < min_window:
        raise UserError(f"max_window={max_window} is smaller than min_window={min_window}: give a larger max_window")
    scales = [1 << k for k in range(min_window.bit_length() - 1, max_window.bit_length())]
    settings: dict[str, Any] = {"mixing": mixing, "windows": scales, "mix_fraction": mix_fraction, "layers": chosen}
    given = re.split(r"[+,\s]+", mix_placement.strip()) if isinstance(mix_placement, str) else list(mix_placement)
    named = [site for name in given for site in (tuple(READERS) if name == "input" else (name,))]
    if not named or any(site not in SITES for site in named):
        raise UserError(
            f"mix_placement={mix_placement!r}: a model of transformers is mixed at one or several, joined with +, of "
            f"{', '.join(SITES)}, or input"
        )
    if mix_start != "mean" and mixing != "learnable":
        raise UserError(f'mix_start={mix_start!r} is for mixing="learnable", not {mixing!r}')
    settings |= {"edge": mix_edge, "sites": [site for site in SITES if site in named], "start": mix_start}
    _install(model, settings)
    # The caller's configuration may make other models, such as the one to compare with: it stays without mixing.
    own = copy.deepcopy(config)
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = own  # type: ignore[assignment]
    config = own
    kind, config_kind = cast(Any, type(model)), cast(Any, type(config))
    config.__class__ = _known_to_auto_classes(mixed_config(config_kind))
    config.wavelet_mixing = settings
    # These name the model without mixing, which programs that load by name (an adapter's base, a reference) would get.
    config._name_or_path = model.name_or_path = ""
    model.__class__ = mixed_root(kind)
    return model


def _is_from(package: str, function: Any) -> bool:
    """Whether a package replaced this function by its own. Names of its compiled modules begin with its name too."""
    return (getattr(function, "__module__", None) or "").startswith(package)


def _is_loaded(model: nn.Module) -> bool:
    """Whether from_pretrained loaded weights: it marks them. (A config keeps its name when weights are random.)"""
    return any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())


def _install(model: Any, settings: dict[str, Any]) -> None:
    """Give the decoder layers their mixers."""
    owner, name = _find_layers(model)
    if not _hands_on_keywords(owner, name):
        raise UserError(
            f"{type(model).__name__} gives its decoder layers no keyword arguments, which padding and documents need: "
            "mixing can't be added to it"
        )
    layers, width, kernels = getattr(owner, name), model.config.hidden_size, MIXINGS[settings["mixing"]]
    # Models saved by earlier versions lack the last three.
    edge, start, sites = settings.get("edge", "zero"), settings.get("start", "mean"), settings.get("sites", ["block"])
    wanted = [i for i in range(len(layers)) if settings["layers"] is None or i in settings["layers"]]
    readers = {(i, site): _reader(layers[i], site) for i in wanted for site in sites if site != "block"}
    try:
        mixers = {
            (i, site): WaveletMixing(width, settings["windows"], kernels, settings["mix_fraction"], edge, start)
            for i in wanted
            for site in sites
        }
    except ValueError as error:
        raise UserError(str(error)) from None
    for (i, _), mixer in mixers.items():
        device = next(layers[i].parameters()).device
        mixer.to(dtype=model.dtype) if device.type == "meta" else mixer.to(device, model.dtype)
        mixer.train(layers[i].training)
    for i, layer in enumerate(layers):
        kind: Any = type(layer)
        layer.__class__ = mixed_layer(kind)
        layer.wavelet_layer_idx = i
        layer.wavelet_mixing = mixers.get((i, "block"))
        layer.wavelet_readers = {site: readers[i, site] for site in sites if (i, site) in readers}
        for site, child in layer.wavelet_readers.items():
            reader = getattr(layer, child)
            reader.wavelet_mixing, reader.wavelet_site, reader.wavelet_told = mixers[i, site], site, None
            reader.register_forward_pre_hook(_mix_input, with_kwargs=True)
    owner._wavelet_layers = name
    owner._wavelet_arguments = tuple(inspect.signature(type(owner).forward).parameters)[1:]
    owner.register_forward_pre_hook(_tell_layers, with_kwargs=True)


def _find_layers(model: Any) -> tuple[Any, str]:
    """The module whose forward pass runs the decoder layers, and the attribute that holds them."""
    found = [
        (module, name)
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList)
        and len(child) == model.config.num_hidden_layers
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in child)
    ]
    if len(found) != 1:
        names = ", ".join(f"{type(module).__name__}.{name}" for module, name in found) or "none"
        raise UserError(f"{type(model).__name__}: its decoder layers are not found (candidates: {names})")
    return found[0]


def _reader(layer: nn.Module, site: str) -> str:
    """The name of the layer's module that reads at a site."""
    children = dict(layer.named_children())
    for name in READERS[site]:
        if name in children:
            return name
    raise UserError(
        f"{type(layer).__name__} has no module {' or '.join(READERS[site])}, so that nothing can be mixed at {site}: "
        'give mix_placement="block"'
    )


def _hands_on_keywords(owner: Any, name: str) -> bool:
    """Whether the owner's forward pass loops over its layers and passes its **kwargs to each."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(owner).forward)))
    except (OSError, TypeError):  # replaced by a function without source
        return False
    for loop in ast.walk(ast.parse(source)):
        if isinstance(loop, ast.For) and f"self.{name}" in ast.unparse(loop.iter):
            targets = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
            for call in ast.walk(loop):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in targets:
                    return any(keyword.arg is None for keyword in call.keywords)
    return False


# The module that owns the layers.


def _tell_layers(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: computes from masks, positions and packing how far back each token may look."""
    given = {**dict(zip(owner._wavelet_arguments, args, strict=False)), **kwargs}
    inputs = given.get("input_ids")
    if inputs is None:
        inputs = given["inputs_embeds"]
    check_attention(owner.config._attn_implementation)
    cache = given.get("past_key_values")
    if cache is not None:
        upgrade_cache(cache, len(getattr(owner, owner._wavelet_layers)))
    told = {**given}
    reach = reach_told(inputs, given.get("attention_mask"), told)
    kwargs = {name: value for name, value in kwargs.items() if name in told}
    kwargs[REACH] = (reach,)
    return args, kwargs


# Decoder layers.


class MixedLayer:
    """Adds mixing to a decoder layer; it comes before the layer's own class among the base classes."""

    wavelet_mixing: WaveletMixing | None  # of its output
    wavelet_layer_idx: int
    wavelet_readers: dict[str, str]  # site -> name of the module that reads there, which has the mixer

    def wavelet_mixers(self) -> list[tuple[str, WaveletMixing]]:
        """(site, mixer) of this layer."""
        found = [(site, getattr(self, name).wavelet_mixing) for site, name in self.wavelet_readers.items()]
        return found if self.wavelet_mixing is None else [*found, ("block", self.wavelet_mixing)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        told = kwargs.pop(REACH, None)
        if told is None:
            raise RuntimeError(
                f"{type(self).__name__} was called outside its model's forward pass, so its mixer does not know padding"
                " and documents: don't use pipelines and engines that call layers themselves"
            )
        place = (told[0], _cache_among(args, kwargs), self.wavelet_layer_idx)
        readers = [getattr(self, name) for name in self.wavelet_readers.values()]
        for reader in readers:
            reader.wavelet_told = place
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        for reader in readers:
            reader.wavelet_told = None
        if self.wavelet_mixing is None:
            return out
        hidden = _mix(self, "block", out[0] if isinstance(out, tuple) else out, *place)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, ("layer", self._wavelet_base), self.__getstate__()  # type: ignore[attr-defined]


def _mix_input(reader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: mixes the hidden states that a layer's attention or feed-forward reads."""
    if reader.wavelet_told is None:
        raise RuntimeError(
            f"{type(reader).__name__} was called outside its layer, so its mixer does not know documents"
        )
    if args:
        return (_mix(reader, reader.wavelet_site, args[0], *reader.wavelet_told), *args[1:]), kwargs
    hidden = _mix(reader, reader.wavelet_site, kwargs["hidden_states"], *reader.wavelet_told)
    return args, {**kwargs, "hidden_states": hidden}


def _mix(module: Any, site: str, hidden: torch.Tensor, reach: torch.Tensor | None, cache: Any, layer: int) -> Any:
    """Hidden states (B, T, channels) at a site of a layer, mixed by the module's mixer, with its state in the cache."""
    mixer: WaveletMixing = module.wavelet_mixing
    if hidden.dim() != 3:  # hyper-connections (DeepSeek-V4): several residual streams
        raise UserError(
            f"{type(module).__name__} has hidden states of shape {tuple(hidden.shape)}, not (batch, tokens, channels): "
            "mixing can't be added to this model"
        )
    if reach is not None:
        reach = reach.to(hidden.device)
    state = None
    if cache is not None and mixer.past:
        if layer >= len(cache.layers):
            raise UserError(
                f"the cache, a {type(cache).__name__}, has no entry for block {layer} and cannot hold mixing states: "
                "use this model with use_cache=False"
            )
        if not has_states(cache.layers[layer]):  # the cache was made in this forward pass
            upgrade_cache(cache, empty=True)
        state = cache.layers[layer].state(site, mixer.past, mixer.edge == "partial")
    return mixer(hidden, state, reach)


def _cache_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = [kwargs[name] for name in CACHES if kwargs.get(name) is not None]
    return next((value for value in (*named, *args) if isinstance(value, Cache)), None)


@lru_cache(None)
def mixed_layer(base: type) -> type:
    # Keep the name: FSDP's wrapping, device maps and `_no_split_modules` look for it.
    fields = {"__module__": __name__, "__qualname__": base.__qualname__, "_wavelet_base": base}
    return type(base.__name__, (MixedLayer, base), fields)


# The model.


class MixedCausalLM(MixingGeneration):
    """Adds mixing to a causal language model; it comes before the model's own class among the base classes."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if getattr(config, "wavelet_mixing", None) is None:
            raise UserError(f"{type(self).__name__} needs a config with wavelet_mixing: call add_mixing on the model")
        _install(self, config.wavelet_mixing)

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        super()._initialize_missing_keys(*args, **kwargs)  # type: ignore[misc]
        # The model's _init_weights does not know mixers; they would keep whatever was in memory.
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, WaveletMixing):
                values = (*module.parameters(), *module.buffers())
                if not all(getattr(value, "_is_hf_initialized", False) for value in values):
                    with torch.no_grad():
                        module.reset_parameters(init)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, ("root", self._wavelet_base), self.__getstate__()  # type: ignore[attr-defined]


@lru_cache(None)
def mixed_root(base: Any) -> Any:
    # Keep the library's `__module__`: it converts checkpoints (of experts) only for its own models.
    fields = {
        "config_class": mixed_config(base.config_class),
        "__module__": base.__module__,
        "_wavelet_base": base,
    }
    return type(f"Wavelet{base.__name__}", (MixedCausalLM, base), fields)


def _rebuild(kind: str, base: type) -> Any:
    """An empty instance, for pickle and copy: they cannot find a class that was made at run time."""
    make = {"layer": mixed_layer, "root": mixed_root, "config": mixed_config}[kind]
    made = make(base)
    return made.__new__(made)


# Saving and loading.


class MixedConfig:
    """Adds mixing to a configuration. `model_type` is the base model's in memory, where PEFT reads it, but not on
    disk."""

    def to_diff_dict(self) -> dict[str, Any]:
        out = super().to_diff_dict()  # type: ignore[misc]
        out["base_model_type"], out["model_type"] = out["model_type"], ON_DISK
        result: dict[str, Any] = out
        return result

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers, with the code, so that `trust_remote_code=True` loads the model without this package."""
        self.auto_map = {
            "AutoConfig": "huggingface.WaveletMixedConfig",
            "AutoModelForCausalLM": "huggingface.WaveletMixedForCausalLM",
        }
        there = Path(save_directory)
        there.mkdir(parents=True, exist_ok=True)
        for source in _checkpoint_files():
            if source.parent != there.resolve():
                shutil.copyfile(source, there / source.name)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, ("config", self._wavelet_base), self.__dict__  # type: ignore[attr-defined]


def _checkpoint_files() -> list[Path]:
    """The files that a checkpoint carries, this one included, from the package or from another checkpoint."""
    here = Path(__file__).resolve().parent
    ours = [here / "huggingface.py", here / "module.py"]
    names = ("model/decoding.py", "model/state.py", "ops/reference.py")
    in_package = (here / "__init__.py").exists() and (here.parent / names[0]).exists()
    return ours + [here.parent / name if in_package else here / Path(name).name for name in names]


@lru_cache(None)
def mixed_config(base: Any) -> Any:
    fields = {"__module__": __name__, "wavelet_mixing": None, "_wavelet_base": base}
    return type(f"Wavelet{base.__name__}", (MixedConfig, base), fields)


class WaveletMixedConfig(PreTrainedConfig):
    """Reads a configuration from disk as an instance of a class made at run time."""

    model_type = ON_DISK

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        config_dict = dict(config_dict)
        base = config_dict.pop("base_model_type", None)
        config_dict.pop("model_type", None)
        if base not in CONFIG_MAPPING:
            raise UserError(f"base_model_type is {base!r}: this version of transformers has no such model; upgrade it")
        kind: Any = CONFIG_MAPPING[base]
        return _known_to_auto_classes(mixed_config(kind)).from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        kwargs["_from_auto"] = True
        config_dict, kwargs = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(config_dict, **kwargs)


class WaveletMixedForCausalLM:
    """Makes the model of a `WaveletMixedConfig`, for loading with `trust_remote_code`."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: saving writes `auto_map` itself."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        config = WaveletMixedConfig.from_pretrained(path) if config is None else config
        return _model_of(type(config)).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return _model_of(type(config))._from_config(config, **kwargs)


def _model_of(config_class: Any) -> Any:
    return mixed_root(MODEL_FOR_CAUSAL_LM_MAPPING[config_class._wavelet_base])


def _known_to_auto_classes(config_class: Any) -> Any:
    AutoModelForCausalLM.register(config_class, _model_of(config_class), exist_ok=True)
    return config_class


AutoConfig.register(ON_DISK, WaveletMixedConfig, exist_ok=True)
