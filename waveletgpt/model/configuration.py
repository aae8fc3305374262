"""Settings of a WaveletGPT model: a GPT-2 or Llama transformer, plus how its hidden states are mixed over time.

This file, `modeling.py` and what they import with a dot travel inside every saved checkpoint (`checkpoint_files`), so
they import nothing else of the package but the operators.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

ARCHITECTURES = ("gpt2", "llama")
MIXINGS = ("none", "fixed", "learnable", "wavelet", "ema", "conv", "shift")
WAVELETS = ("haar", *(f"db{order}" for order in range(2, 9)))
POSITION_EMBEDDINGS = ("learned", "sinusoidal", "rope", "none")
POOLINGS = ("last", "mean", "attention")


def window_schedule(n: int, min_window: int, max_window: int, allocation: str = "uniform") -> list[int]:
    """Windows of `n` mixed coordinates, finest first: powers of two from `min_window` to `max_window`.

    With K levels, coordinate j has level floor(j K / n) (arXiv 2409.12924, Section 3; there 2 ... context). That is
    `allocation="uniform"`, the same number of coordinates a level; `"geometric"` halves it from each level to the next
    longer one, so that most coordinates have short windows.

    Raises:
        ValueError: a window that is no power of two, `max_window < min_window`, an unknown allocation.
    """
    for name, window in (("min_window", min_window), ("max_window", max_window)):
        if window < 1 or window & (window - 1):
            raise ValueError(f"{name}={window} is not a power of two (1, 2, 4, ...)")
    if max_window < min_window:
        raise ValueError(f"max_window={max_window} is smaller than min_window={min_window}")
    levels = max_window.bit_length() - min_window.bit_length() + 1
    if allocation == "uniform":
        steps = [j * levels // n for j in range(n)]
    elif allocation == "geometric":
        # Share of level k: 2^-k of the sum over all levels.
        whole = 1 - 2.0**-levels
        bounds = [n * (1 - 2.0 ** -(k + 1)) / whole for k in range(levels)]
        steps = [sum(j >= bound - 1e-9 for bound in bounds[:-1]) for j in range(n)]
    else:
        raise ValueError(f"mix_allocation={allocation!r} is unknown; use 'uniform' or 'geometric'")
    return [min_window << step for step in steps]


def checkpoint_files() -> list[Path]:
    """The files that a checkpoint carries: `modeling.py`, `configuration.py`, and all that they import with a dot.

    In a checkpoint the operator's definition, `ops/reference.py` of the package, lies beside them.
    """
    here = Path(__file__).parent
    found: dict[str, Path] = {}
    wanted = ["configuration", "modeling"]
    while wanted:
        name = wanted.pop()
        source = here / f"{name}.py"
        if name == "reference" and not source.exists():
            source = here.parent / "ops" / "reference.py"
        if name not in found and source.exists():  # a configuration alone may have been loaded, without the models
            found[name] = source
            wanted += re.findall(r"^\s*from \.(\w+) import", source.read_text(encoding="utf-8"), re.MULTILINE)
    return list(found.values())


class WaveletGPTConfig(PreTrainedConfig):
    """Configuration of the models. Names are GPT-2's; Llama's (`hidden_size`, ...) are aliases.

    Args:
        architecture: "gpt2" (learned positions, LayerNorm, GELU, biases) or "llama" (rotary positions, RMSNorm,
            SwiGLU, no biases). Each sets the defaults of the fields that are None.
        n_positions: context length trained on, in tokens.
        n_kv_head: key/value heads (grouped queries); None: `n_head`.
        n_inner: width of the feed-forward; None: 4 n_embd for gpt2, 8/3 n_embd rounded up to 32 for llama.
        norm_position: "pre" (normalise each sub-layer's input) or "post" (its sum with the residual, as in 2017).
        position_embedding: "learned", "sinusoidal", "rope" or "none"; None: the architecture's own.
        mixing: what replaces coordinates of the hidden states over time: "none"; "fixed", causal means over windows of
            powers of two; "learnable", the same windows with trained weights; "wavelet", coefficients of a wavelet
            transform (see `mix_wavelet`, `mix_band`); "ema", exponential averages; and two peers from the literature:
            "conv", a residual 4-tap depthwise convolution on all coordinates, and "shift", the previous token's value
            (RWKV).
        mix_fraction: share of the coordinates that are mixed.
        min_window, max_window: shortest and longest window in tokens; `max_window=None` is the largest power of two
            within `n_positions`. Equal values give a single-scale control. For "wavelet" they are scales, 2^level.
        mix_allocation: how coordinates are dealt to windows, "uniform" or "geometric" (see `window_schedule`).
        mix_edge: for "fixed" and "learnable": "zero" (values before the sequence count as 0) or "partial" (mean over
            the values that exist).
        mix_sharing: for "learnable": one kernel per "coordinate" or per "level".
        mix_wavelet: for "wavelet": "haar" or Daubechies' "db2" ... "db8", of 4 ... 16 taps and as many vanishing
            moments as the name says. At scale s its filters have (s - 1) (taps - 1) + 1 taps.
        mix_band: for "wavelet": coordinates become coefficients of "approximation" (averages), of "detail" (what
            the average of that scale leaves out of the one before), or of "both", half of each scale's.
        mix_placement: "block" (each block's output, as in the paper) or "input" (the normalised inputs of attention
            and feed-forward).
        mix_layers: "all", "inner" (all but the last block) or a list of block indices.
        causal: False, for classifiers: attention sees both directions, and mixers give the mean of their filter and of
            its mirror image in time.
        pooling: what a classifier reads of its tokens: the "last" one, their "mean", or their mean weighted by
            "attention" to a learned query. Padding never counts.
        n_inputs: documents per example of a classifier, 1 or 2 (both through the same encoder).
        frame_size: for a classifier of raw waveforms: samples per frame, each of which is a token. `vocab_size` then
            means nothing.
        frame_hidden: width between the frame and the embedding.
        num_labels, id2label, problem_type, use_cache, tie_word_embeddings, ...: as in every Hugging Face configuration.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    model_type = "waveletgpt"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    attribute_map: ClassVar = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "n_ctx": "n_positions",
    }

    architecture: str = "gpt2"
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    # None asks for the default that fits the others; afterwards they all have values.
    n_kv_head: int = None  # type: ignore[assignment]
    n_inner: int = None  # type: ignore[assignment]
    norm_position: str = "pre"
    position_embedding: str = None  # type: ignore[assignment]
    norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    mixing: str = "fixed"
    mix_fraction: float = 0.5
    min_window: int = 2
    max_window: int = None  # type: ignore[assignment]
    mix_allocation: str = "uniform"
    mix_edge: str = "zero"
    mix_sharing: str = "coordinate"
    mix_wavelet: str = "db2"
    mix_band: str = "approximation"
    mix_placement: str = "block"
    mix_layers: str | list[int] = "all"
    causal: bool = True
    pooling: str = "last"
    n_inputs: int = 1
    frame_size: int | None = None
    frame_hidden: int = 2048
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        if self.position_embedding is None:
            self.position_embedding = "learned" if self.architecture == "gpt2" else "rope"
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd if self.architecture == "gpt2" else -(-8 * self.n_embd // 96) * 32
        if self.max_window is None:
            self.max_window = max(self.min_window, 1 << self.n_positions.bit_length() >> 1)
        self.check()
        super().__post_init__(**kwargs)

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(choices)}")

    def check(self) -> None:
        """Raise ValueError, as the constructor does; for values that were set later, or while loading."""
        self._check_choice("architecture", ARCHITECTURES)
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_kv_head", "n_inner", "frame_hidden")
        for name in (*sizes, *(["frame_size"] if self.frame_size is not None else [])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even n_embd / n_head, got {self.n_embd} / {self.n_head}")
        if not self.initializer_range > 0:
            raise ValueError(f"initializer_range={self.initializer_range} must be greater than 0")
        self._check_choice("norm_position", ("pre", "post"))
        self._check_choice("position_embedding", POSITION_EMBEDDINGS)
        self._check_choice("mixing", MIXINGS)
        self._check_choice("mix_edge", ("zero", "partial"))
        self._check_choice("mix_sharing", ("coordinate", "level"))
        self._check_choice("mix_wavelet", WAVELETS)
        self._check_choice("mix_band", ("approximation", "detail", "both"))
        self._check_choice("mix_placement", ("block", "input"))
        if not 0 < self.mix_fraction <= 1 or self.mix_fraction * self.n_embd < 1:
            raise ValueError(
                f"mix_fraction={self.mix_fraction} must be in (0, 1] and select a coordinate; "
                'mixing="none" turns mixing off'
            )
        if isinstance(self.mix_layers, str):
            self._check_choice("mix_layers", ("all", "inner"))
        elif any(not 0 <= layer < self.n_layer for layer in self.mix_layers):
            raise ValueError(f"mix_layers={self.mix_layers} names a block outside 0 ... {self.n_layer - 1}")
        self._check_choice("pooling", POOLINGS)
        if self.n_inputs not in (1, 2):
            raise ValueError(f"n_inputs={self.n_inputs} must be 1 or 2")
        self.mix_windows()

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_mixed(self) -> int:
        """Number of coordinates the mixer changes; they are the first ones of the embedding."""
        return self.n_embd if self.mixing == "conv" else round(self.mix_fraction * self.n_embd)

    def mix_windows(self) -> list[int]:
        """Window in tokens of every mixed coordinate; for "ema", which has none, an empty list."""
        if self.mixing in ("none", "ema"):
            return []
        if self.mixing in ("conv", "shift"):
            return [4 if self.mixing == "conv" else 2] * self.n_mixed
        scales = window_schedule(self.n_mixed, self.min_window, self.max_window, self.mix_allocation)
        if self.mixing == "wavelet":
            return [(scale - 1) * (2 * self.vanishing_moments - 1) + 1 for scale in scales]
        return scales

    @property
    def vanishing_moments(self) -> int:
        """Those of `mix_wavelet`, half as many as its filter has taps."""
        return 1 if self.mix_wavelet == "haar" else int(self.mix_wavelet.removeprefix("db"))

    def mixes(self, layer: int) -> bool:
        """Whether block `layer` mixes."""
        if self.mixing == "none":
            return False
        if isinstance(self.mix_layers, str):
            return self.mix_layers == "all" or layer < self.n_layer - 1
        return layer in self.mix_layers

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in Hugging Face; the code goes along, so that `trust_remote_code=True` loads it without this package.

        The models save their configuration through this too, before anything is uploaded.
        """
        self.auto_map = {
            "AutoConfig": "configuration.WaveletGPTConfig",
            "AutoModel": "modeling.WaveletGPTModel",
            "AutoModelForCausalLM": "modeling.WaveletGPTForCausalLM",
            "AutoModelForSequenceClassification": "modeling.WaveletGPTForSequenceClassification",
        }
        there = Path(save_directory)
        there.mkdir(parents=True, exist_ok=True)
        for source in checkpoint_files():
            shutil.copyfile(source, there / source.name)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # What the cache of transformers asks for: blocks that mix remember inputs beside keys and values.

    @property
    def layer_types(self) -> list[str]:
        return ["hybrid" if self.mixes(layer) else "full_attention" for layer in range(self.n_layer)]

    @property
    def number_of_conv_states(self) -> int:
        # A mean's running sums are one more.
        return (2 if self.mix_placement == "input" else 1) * (2 if self.mixing == "fixed" else 1)


AutoConfig.register("waveletgpt", WaveletGPTConfig, exist_ok=True)

__all__ = ["WaveletGPTConfig"]
