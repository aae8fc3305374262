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
WAVELETS = ("haar", *(f"db{order}" for order in range(2, 9)))
POSITION_EMBEDDINGS = ("learned", "sinusoidal", "rope", "none")
POOLINGS = ("last", "mean", "attention")
# Where a filter can be put, in the order in which a token passes.
SITES = (
    *("embedding", "attention_input", "query", "key", "value", "attention_output"),
    *("mlp_input", "mlp_hidden", "mlp_output", "block"),
)
# What the Auto classes find in a checkpoint's code.
AUTO_MAP = {
    "AutoConfig": "configuration.WaveletGPTConfig",
    "AutoModel": "modeling.WaveletGPTModel",
    "AutoModelForCausalLM": "modeling.WaveletGPTForCausalLM",
    "AutoModelForSequenceClassification": "classifier.WaveletGPTForSequenceClassification",
}
STARTS = ("mean", "haar", "zero", "uniform", "convex", "recent")


def window_schedule(n: int, min_window: int, max_window: int, allocation: str = "uniform") -> list[int]:
    """Windows of `n` mixed channels, finest first: powers of two from `min_window` to `max_window`.

    With K levels, channel j has level floor(j K / n) (arXiv 2409.12924, Section 3; there 2 ... context). That is
    `allocation="uniform"`, the same number of channels a level; `"geometric"` halves it from each level to the next
    longer one, so that most channels have short windows.

    Raises:
        ValueError: a window that is not a power of two, `max_window < min_window`, an unknown allocation.
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
    """The files that a checkpoint carries: those that `AUTO_MAP` names, and all that they import with a dot.

    In a checkpoint the operator's definition, `ops/reference.py` of the package, lies beside them.
    """
    here = Path(__file__).parent
    found: dict[str, Path] = {}
    wanted = [target.partition(".")[0] for target in AUTO_MAP.values()]
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
        activation_function: nonlinearity of the feed-forward, a name of transformers' `ACT2FN`, such as "relu2"
            (Primer's squared ReLU); None: the architecture's own, "gelu_pytorch_tanh" or "silu".
        rope_fraction: share of each head's channels that rotary positions turn, the last ones; with 0 there are no
            positions.
        norm_position: "pre" (normalise each sub-layer's input) or "post" (its sum with the residual, as in 2017).
        position_embedding: "learned", "sinusoidal", "rope" or "none"; None: the architecture's own.
        mixing: the filter over time: "none"; "fixed", causal means over windows of powers of two; "learnable", the same
            windows with trained weights; "wavelet", coefficients of a wavelet transform (see `mix_wavelet`,
            `mix_band`); "ema", exponential averages; "bands", a learned number per level and channel; and what others
            use: "conv", a short depthwise convolution, "dynamic", one whose taps depend on the token, "shift", the
            previous token's value, "smear", a gate for it. Each is a class of mixing.py, which says which of the
            settings below it reads.
        mix_placement: the sites of the filter, one or several joined with "+" (or a list): "embedding" (once, before
            the first block), "attention_input", "query", "key", "value" (each head apart, before positions are turned
            in), "attention_output", "mlp_input", "mlp_hidden" (before the nonlinearity), "mlp_output" (outputs before
            they are added), and "block" (each block's output, as in the paper). "input" is short for
            "attention_input+mlp_input".
        mix_residual: True adds the filter's result to its channels, False replaces them by it; None: as is usual for
            the filter, added for "conv" and "dynamic".
        mix_fraction: share of the channels that are mixed, of each head where there are heads. "conv" has all.
        min_window, max_window: shortest and longest window in tokens; `max_window=None` is the largest power of two
            within `n_positions`. Equal values give a single-scale control. For "wavelet" they are scales, 2^level.
        mix_kernel_size: taps of "conv" and "dynamic".
        mix_unit_sum: for "conv": the taps of a channel sum to 1, the newest is what the others leave.
        mix_allocation: how channels are dealt to windows, "uniform" or "geometric" (see `window_schedule`).
        mix_edge: for "fixed" and "learnable": "zero" (values before the sequence count as 0) or "partial" (mean over
            the values that exist).
        mix_sharing: for "learnable" and "conv": taps of each "coordinate" (channel), of each "head", or of each "level"
            (window).
        mix_start: what learned taps start from: "mean", "haar" (half of the channels a mean, half a detail), "zero",
            "uniform" (as torch's Conv1d), "convex" or "recent" (see `starting_taps`); None: the filter's own.
        mix_wavelet: for "wavelet": "haar" or Daubechies' "db2" ... "db8", of 4 ... 16 taps and as many vanishing
            moments as the name says. At scale s its filters have (s - 1) (taps - 1) + 1 taps.
        mix_band: for "wavelet": channels become coefficients of "approximation" (averages), of "detail" (what
            the average of that scale leaves out of the one before), or of "both", half of each scale's.
        mix_row: for "bands": tokens in a row of a picture; None: the tokens are not a picture.
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
        "hidden_act": "activation_function",
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
    activation_function: str = None  # type: ignore[assignment]
    norm_position: str = "pre"
    position_embedding: str = None  # type: ignore[assignment]
    norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    initializer_range: float = 0.02
    rope_parameters: dict[str, Any] | None = None
    rope_fraction: float = 1.0
    mixing: str = "fixed"
    mix_fraction: float = 0.5
    min_window: int = 2
    max_window: int = None  # type: ignore[assignment]
    mix_allocation: str = "uniform"
    mix_edge: str = "zero"
    mix_sharing: str = "coordinate"
    mix_wavelet: str = "db2"
    mix_band: str = "approximation"
    mix_placement: str | list[str] = "block"
    mix_residual: bool | None = None
    mix_kernel_size: int = 4
    mix_unit_sum: bool = False
    mix_start: str | None = None
    mix_row: int | None = None
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
        if self.activation_function is None:
            self.activation_function = "gelu_pytorch_tanh" if self.architecture == "gpt2" else "silu"
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
        from transformers.activations import ACT2FN  # imports torch, which `--help` need not

        self._check_choice("architecture", ARCHITECTURES)
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_kv_head", "n_inner", "frame_hidden")
        for name in (*sizes, *(["frame_size"] if self.frame_size is not None else [])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if not 0 <= self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction={self.rope_fraction} must be from 0 to 1")
        if self.position_embedding == "rope" and self.rotary_width % 2:
            raise ValueError(
                f"rotary positions need an even n_embd / n_head, got {self.n_embd} / {self.n_head}"
                + (f" with rope_fraction={self.rope_fraction}" if self.rope_fraction != 1 else "")
            )
        if not self.initializer_range > 0:
            raise ValueError(f"initializer_range={self.initializer_range} must be greater than 0")
        self._check_choice("activation_function", tuple(ACT2FN))
        self._check_choice("norm_position", ("pre", "post"))
        self._check_choice("position_embedding", POSITION_EMBEDDINGS)
        self._check_choice("mixing", ("none", *_filters()))
        self._check_choice("mix_edge", ("zero", "partial"))
        self._check_choice("mix_sharing", ("coordinate", "level", "head"))
        self._check_choice("mix_wavelet", WAVELETS)
        self._check_choice("mix_band", ("approximation", "detail", "both"))
        if self.mix_start is not None:
            self._check_choice("mix_start", STARTS)
        if self.mix_start == "haar" and self.mix_sharing != "coordinate":
            raise ValueError('mix_start="haar" gives channels different taps: it needs mix_sharing="coordinate"')
        for name in ("mix_kernel_size", *(["mix_row"] if self.mix_row is not None else [])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.mix_unit_sum and self.mix_kernel_size < 2:
            raise ValueError("mix_unit_sum leaves nothing to learn of one tap: mix_kernel_size must be at least 2")
        unknown = [site for site in self._named_sites() if site not in SITES]
        if unknown or not self._named_sites():
            raise ValueError(
                f"mix_placement={self.mix_placement!r} names no site: give one or several, joined with +, of "
                f"{', '.join(SITES)}, or input"
            )
        if not 0 < self.mix_fraction <= 1 or self.mix_fraction * self.n_embd < 1:
            raise ValueError(
                f"mix_fraction={self.mix_fraction} must be in (0, 1] and select a channel; "
                'mixing="none" turns mixing off'
            )
        if isinstance(self.mix_layers, str):
            self._check_choice("mix_layers", ("all", "inner"))
        elif any(not 0 <= layer < self.n_layer for layer in self.mix_layers):
            raise ValueError(f"mix_layers={self.mix_layers} names a block outside 0 ... {self.n_layer - 1}")
        if self.mix_layers == "inner" and self.n_layer == 1 and self.sites and "embedding" not in self.sites:
            raise ValueError("mix_layers='inner' leaves no block of 1 to mix in; mixing=\"none\" turns mixing off")
        self._check_choice("pooling", POOLINGS)
        if self.n_inputs not in (1, 2):
            raise ValueError(f"n_inputs={self.n_inputs} must be 1 or 2")
        for site in self.sites:
            if self.filter is not None and self.filter.share(self, self.site_shape(site)[1]) < 1:
                raise ValueError(f"mix_fraction={self.mix_fraction} selects no channel at the site {site!r}")
            self.mix_windows(site)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def rotary_width(self) -> int:
        """How many of a head's channels rotary positions turn."""
        return round(self.rope_fraction * self.head_dim) if self.position_embedding == "rope" else 0

    @property
    def filter(self) -> Any:
        """The class of the filter, of mixing.py; None where nothing mixes."""
        return _filters().get(self.mixing)

    def _named_sites(self) -> list[str]:
        given = self.mix_placement
        names = re.split(r"[+,\s]+", given.strip()) if isinstance(given, str) else list(given)
        return [site for name in names for site in ({"input": ["attention_input", "mlp_input"]}.get(name, [name]))]

    @property
    def sites(self) -> tuple[str, ...]:
        """Where the filter is, in the order of `SITES`; empty where nothing mixes."""
        named = self._named_sites() if self.mixing != "none" else []
        return tuple(site for site in SITES if site in named)

    def site_shape(self, site: str) -> tuple[int, int]:
        """(heads, channels of each) at a site; what has no heads counts as one."""
        if site in ("query", "key", "value"):
            return (self.n_head if site == "query" else self.n_kv_head), self.head_dim
        if site == "mlp_hidden":
            return 1, self.n_inner * (2 if self.architecture == "llama" else 1)
        return 1, self.n_embd

    @property
    def n_mixed(self) -> int:
        """Number of channels that are mixed, at the first site; they are the first ones (of each head)."""
        if not self.sites:
            return 0
        heads, width = self.site_shape(self.sites[0])
        result: int = heads * self.filter.share(self, width)
        return result

    def mix_windows(self, site: str | None = None) -> list[int]:
        """Window in tokens of every mixed channel of a head, at the first site or a named one.

        Empty for filters without windows, such as "ema".
        """
        if not self.sites:
            return []
        width = self.site_shape(site or self.sites[0])[1]
        result: list[int] = self.filter.schedule(self, self.filter.share(self, width))
        return result

    @property
    def vanishing_moments(self) -> int:
        """Those of `mix_wavelet`, half as many as its filter has taps."""
        return 1 if self.mix_wavelet == "haar" else int(self.mix_wavelet.removeprefix("db"))

    def mixes(self, layer: int) -> bool:
        """Whether block `layer` mixes."""
        if not set(self.sites) - {"embedding"}:
            return False
        if isinstance(self.mix_layers, str):
            return self.mix_layers == "all" or layer < self.n_layer - 1
        return layer in self.mix_layers

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in Hugging Face; the code goes along, so that `trust_remote_code=True` loads it without this package.

        The models save their configuration through this too, before anything is uploaded.
        """
        self.auto_map = dict(AUTO_MAP)
        there = Path(save_directory)
        there.mkdir(parents=True, exist_ok=True)
        for source in checkpoint_files():
            shutil.copyfile(source, there / source.name)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _filters() -> dict[str, Any]:
    """The table of filters. Not at the top: it is made of classes that need this file."""
    from .mixing import MIXERS

    return MIXERS


AutoConfig.register("waveletgpt", WaveletGPTConfig, exist_ok=True)

__all__ = ["WaveletGPTConfig"]
