"""WaveletGPT: GPT-style models whose hidden states carry multi-scale structure (arXiv 2409.12924).

`import waveletgpt` registers the models with transformers, so that its Auto classes load saved runs; it imports neither
torch nor transformers until they are used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from waveletgpt import _registration

if TYPE_CHECKING:
    from waveletgpt.integrations.huggingface import add_mixing
    from waveletgpt.integrations.module import WaveletMixing
    from waveletgpt.model.classifier import WaveletGPTForSequenceClassification
    from waveletgpt.model.configuration import WaveletGPTConfig
    from waveletgpt.model.modeling import WaveletGPTForCausalLM, WaveletGPTModel
    from waveletgpt.ops import ema_mix, wavelet_mix

__version__ = "0.1.0"

_EXPORTS = {
    "WaveletGPTConfig": "model.configuration",
    "WaveletGPTForCausalLM": "model.modeling",
    "WaveletGPTForSequenceClassification": "model.classifier",
    "WaveletGPTModel": "model.modeling",
    "WaveletMixing": "integrations.module",
    "add_mixing": "integrations.huggingface",
    "ema_mix": "ops",
    "wavelet_mix": "ops",
}
__all__ = [
    "WaveletGPTConfig",
    "WaveletGPTForCausalLM",
    "WaveletGPTForSequenceClassification",
    "WaveletGPTModel",
    "WaveletMixing",
    "__version__",
    "add_mixing",
    "ema_mix",
    "wavelet_mix",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_registration.install()
