"""WaveletGPT: GPT-style models whose hidden states carry multi-scale structure (arXiv 2409.12924).

`import waveletgpt` registers the models with transformers, so that its Auto classes load saved runs.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "WaveletGPTConfig": "model.configuration",
    "WaveletGPTForCausalLM": "model.modeling",
    "WaveletGPTForSequenceClassification": "model.modeling",
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


def _runs_as_command() -> bool:
    """Whether this process is `waveletgpt ...` or `python -m waveletgpt ...`."""
    return "waveletgpt" in {Path(word).stem for word in sys.orig_argv[:4]}


# Registering imports torch, which takes seconds; the command line does so only once a command needs a model, so that
# its --help is instant.
if not _runs_as_command():
    importlib.import_module(".model.modeling", __name__)
    importlib.import_module(".integrations.huggingface", __name__)
