"""Inside a trained model: hidden states before and after mixing, and kernels, as NumPy arrays.

Shapes: T tokens, E embedding, C mixed channels (the first C of E).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Mixed:
    """Input (`before`) and output (`after`) of one mixer on a probe, both (T, E).

    If the site has heads, channels are in the order of `Mixer`: channel c of all heads, then channel c + 1.
    """

    place: str
    """The site, such as "block 3" or "block 3, key"."""
    before: np.ndarray
    after: np.ndarray
    n_mixed: int
    windows: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """A kernel, learned or of a wavelet: `taps[j]` is the weight of the value j tokens ago."""

    label: str
    """The site of a learned kernel; for a wavelet "approximation" or "detail"."""
    window: int
    taps: np.ndarray
    learned: bool


@dataclass(frozen=True)
class Insight:
    """The result of `look_inside`; `mixed` is None without a probe or if the model does not mix."""

    mixed: Mixed | None
    kernels: list[Kernel]
    text: str


def look_inside(path: Path, probe: Sequence[int]) -> Insight:
    """Load a saved model and run it once on `probe` (token ids, cut to its context).

    The hidden states are those of the middle one of the blocks that mix. If learned kernels differ by channel, the
    result has the kernel of the middle channel of each window.

    Raises:
        Exception: any that loading a broken checkpoint raises.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from waveletgpt.integrations.architecture import OURS, context_of
    from waveletgpt.model.modeling import WaveletGPTModel

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a classifier's head is left out on purpose
    try:
        ours = AutoConfig.from_pretrained(path).model_type == OURS
        model: Any = (WaveletGPTModel if ours else AutoModelForCausalLM).from_pretrained(path)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    model = model.eval().float()
    mixers = _mixers(model)
    kernels = _kernels(mixers)
    ids = list(probe)[: context_of(model.config)]
    if not mixers or not ids:
        return Insight(None, kernels, "")
    place, mixer = mixers[len(mixers) // 2]
    seen: list[tuple[Any, Any]] = []
    hook = mixer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        with torch.no_grad():
            model(torch.tensor([ids]), use_cache=False)
    finally:
        hook.remove()
    # (T, E), or (T, H, E) with heads.
    before, after = (x[0].float().transpose(-2, -1).flatten(1) if x.ndim == 4 else x[0].float() for x in seen[0])
    return Insight(
        Mixed(place, before.numpy(), after.numpy(), mixer.n_mixed, mixer.windows), kernels, _decode(path, ids)
    )


def _mixers(model: Any) -> list[tuple[str, Any]]:
    """(site, mixer) for the first mixer of each block; for that of the embedding if the blocks have none."""
    if not hasattr(model, "blocks"):  # a model of transformers
        layers = [layer for layer in model.modules() if hasattr(layer, "wavelet_readers")]
        blocks = [(layer.wavelet_layer_idx, layer.wavelet_mixers()) for layer in layers]
    else:
        blocks = [(block.layer_idx, list(zip(block.mixers.sites, block.mixers, strict=True))) for block in model.blocks]
    found = [
        (f"block {i + 1}" + ("" if site == "block" else f", {site}"), mixer)
        for i, mixers in blocks
        for site, mixer in mixers[:1]
    ]
    embedding = getattr(model, "mixers", None)
    return found or (list(zip(embedding.sites, embedding, strict=True)) if embedding is not None else [])


def _kernels(mixers: Sequence[tuple[str, Any]]) -> list[Kernel]:
    """Kernels of (site, mixer) pairs. Those of a wavelet are the same in every block and appear once."""
    from waveletgpt.integrations.module import WaveletMixing
    from waveletgpt.model.mixer import WeightedSum
    from waveletgpt.model.mixing import FixedWavelet

    found: list[Kernel] = []
    for place, mixer in mixers:
        if not isinstance(mixer, WeightedSum | WaveletMixing):
            continue
        for taps in _taps(mixer):
            if isinstance(mixer, FixedWavelet):
                # Only details sum to 0.
                rows = {"detail" if abs(float(row.sum())) < 0.5 else "approximation": row for row in taps}
                found += [Kernel(label, len(row), row.numpy(), learned=False) for label, row in rows.items()]
            else:
                row = taps[len(taps) // 2] if taps.ndim == 2 else taps
                found.append(Kernel(place, len(row), row.detach().numpy(), learned=True))
        if isinstance(mixer, FixedWavelet):
            break
    return found


def _taps(mixer: Any) -> list[Any]:
    """Weights of a mixer for each distinct window; for a gate g, the weights of x + g (mean - x). Fixed means have
    none."""
    import torch

    if getattr(mixer, "kernels", None) != "gate":
        return mixer.taps() or []
    gates = mixer.gate.detach().split([n for _, n in mixer.groups])
    return [
        g[:, None] / window + (1 - g)[:, None] * torch.nn.functional.one_hot(torch.tensor(0), window)
        for g, (window, _) in zip(gates, mixer.groups, strict=True)
    ]


def _decode(path: Path, ids: list[int]) -> str:
    """The probe as text; "" if the run has no tokenizer (audio, images)."""
    from transformers import AutoTokenizer

    try:
        return str(AutoTokenizer.from_pretrained(path).decode(ids))
    except Exception:  # the caption is not worth a failure
        return ""


def frequency_response(taps: np.ndarray, octaves: np.ndarray, averaged: int = 9) -> np.ndarray:
    """Gain in dB of a causal filter around frequencies of 2**octaves cycles per token (evenly spaced octaves).

    Power is averaged over `averaged` frequencies around each point, because a long filter has more lobes at high
    frequencies than a picture has pixels. The least value is -200 dB.
    """
    import numpy as np

    share = octaves[1] - octaves[0]
    around = octaves[:, None] + share * (np.arange(averaged) - averaged // 2) / averaged
    phases = np.exp(-2j * np.pi * np.minimum(2.0**around, 0.5)[..., None] * np.arange(len(taps)))
    return 10 * np.log10(np.maximum((np.abs(phases @ taps) ** 2).mean(-1), 1e-20))
