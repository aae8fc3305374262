"""What `import waveletgpt` does, and what it leaves until it is needed; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAKE = "C.for_model('waveletgpt', n_embd=16, n_layer=1, n_head=2, vocab_size=9)"


def run(code: str, *words: str, cwd: Path | None = None) -> str:
    root = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); {code}"
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_operator_alone_needs_torch_and_nothing_else() -> None:
    run(
        "from waveletgpt.ops import wavelet_mix; import torch; wavelet_mix(torch.ones(1, 4, 2), [2, 2]); "
        "heavy = {'transformers', 'accelerate', 'tokenizers', 'matplotlib', 'tyro'} & set(sys.modules); "
        "assert not heavy, heavy"
    )


def test_importing_the_package_is_instant() -> None:
    run("import waveletgpt; heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy")


@pytest.mark.parametrize(
    "imports",
    [
        "import waveletgpt; from transformers import AutoModelForCausalLM as A, AutoConfig as C",
        "from transformers import AutoModelForCausalLM as A, AutoConfig as C; import waveletgpt",
        "from transformers import AutoConfig as C; import waveletgpt; "
        "from transformers import AutoModelForCausalLM as A",
        "from waveletgpt.model.modeling import WaveletGPTModel; from transformers import AutoModelForCausalLM as A, "
        "AutoConfig as C",
    ],
)
def test_auto_classes_know_the_models_in_whatever_order_things_are_imported(imports: str) -> None:
    # A command line that has the word in it is no reason to register nothing.
    out = run(f"{imports}; print(type(A.from_config({MAKE})).__name__)", "--out", "runs/waveletgpt")
    assert out.strip() == "WaveletGPTForCausalLM"


def test_the_configuration_is_known_without_the_models() -> None:
    run(
        f"import waveletgpt; from transformers import AutoConfig as C; assert {MAKE}.model_type == 'waveletgpt'; "
        "assert 'waveletgpt.model.modeling' not in sys.modules"
    )


def test_names_are_visible_to_editors() -> None:
    import waveletgpt

    assert set(waveletgpt.__all__) <= set(dir(waveletgpt))
    for name in waveletgpt.__all__:
        assert getattr(waveletgpt, name) is not None
