"""What docs/your-model.md says: its code runs, its table is that of the tests."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import write_text
from tests.integrations.test_huggingface import STOCK_CONFUSES
from tests.integrations.tiny_models import SETTINGS, VOCAB, tokens
from waveletgpt import WaveletMixing

PAGE = (Path(__file__).parents[2] / "docs" / "your-model.md").read_text(encoding="utf-8")


BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
MARK = "  # mixing\n"
EXAMPLES = {"nanoGPT": 3, "nanochat": 4, "litgpt": 5, "torchtitan": 6}


def test_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_text(tmp_path / "text.txt", 400)
    names: dict[str, Any] = {}
    assert len(BLOCKS) == 8
    for code in (*BLOCKS[:3], BLOCKS[-1]):
        exec(compile(code, "docs/your-model.md", "exec"), names)
    assert type(names["model"]).__name__ == "WaveletQwen3ForCausalLM"


def build(last: int, mixed: bool) -> Any:
    """The model of an example, after those before it, whose imports it uses; the lines of mixing may be left out."""
    names: dict[str, Any] = {"__name__": "example"}
    for code in BLOCKS[EXAMPLES["nanoGPT"] : last + 1]:
        if not mixed:
            code = "".join(line for line in code.splitlines(keepends=True) if not line.endswith(MARK))
        torch.manual_seed(0)
        exec(compile(code, "docs/your-model.md", "exec", dont_inherit=True), names)
    return names["model"]


@pytest.mark.parametrize("name", EXAMPLES)
@torch.no_grad()
def test_models_of_ones_own(name: str) -> None:
    """At most five lines make of a stock model one that mixes, and no token looks ahead."""
    assert f"### As in {name}\n" in PAGE
    assert 0 < BLOCKS[EXAMPLES[name]].count(MARK) <= 5
    model, plain, x = build(EXAMPLES[name], True), build(EXAMPLES[name], False), tokens(2, 12)
    mixing = [module for module in model.modules() if isinstance(module, WaveletMixing)]
    assert len(mixing) == 2
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".mixing." not in key})
    whole = model(x)
    assert whole.isfinite().all()
    torch.testing.assert_close(model(x[:, :7]), whole[:, :7])
    assert (plain(x) - whole).abs().max() > 1e-3
    for mixer in mixing:
        mixer.forward = lambda x, **more: x  # type: ignore[method-assign]
    torch.testing.assert_close(model(x), plain(x))


@torch.no_grad()
def test_the_example_with_documents_keeps_them_apart() -> None:
    model, parts = build(EXAMPLES["torchtitan"], True), [tokens(1, n, seed=n) for n in (5, 1, 6)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    got = model(torch.cat(parts, 1), positions).split([5, 1, 6], 1)
    for part, logits in zip(parts, got, strict=True):
        torch.testing.assert_close(logits, model(part))


def test_table() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")
    ]
    header, *models = rows
    packed = header.index("packed = separate")
    table = {re.findall("`(.*?)`", row[0])[0]: row for row in models}
    assert list(table) == list(SETTINGS)
    for name, row in table.items():
        for column, cell in enumerate(row[1:], 1):
            assert cell == ("no" if column == packed and name in STOCK_CONFUSES else "yes"), (name, header[column])


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(3, VOCAB, (32, 16), generator=torch.Generator().manual_seed(0))
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True}
    settings |= {"disable_tqdm": True, "gradient_checkpointing": True, "learning_rate": 1e-2, **options}
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=data)


def test_trainer_goes_on_exactly(tmp_path: Path) -> None:
    from tests.integrations.tiny_models import mixed

    first = trainer(mixed("qwen3", "learnable", dtype=torch.float32), tmp_path)
    first.train()
    again = trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, got), expected in zip(again.model.state_dict().items(), first.model.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name


def test_adapter(tmp_path: Path) -> None:
    """LoRA with trained mixers: generates as it recomputes, comes back on a mixed base, merges, saves."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from tests.integrations.tiny_models import close, mixed, tokens

    def base() -> Any:
        return mixed("llama", "delta", dtype=torch.float32)

    model, x = (
        get_peft_model(base(), LoraConfig(r=4, modules_to_save=["wavelet_mixing"], task_type="CAUSAL_LM")),
        tokens(2, 9),
    )
    assert not model.peft_config["default"].base_model_name_or_path
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
    assert any("wavelet_mixing" in name and p.grad is not None for name, p in model.named_parameters())
    model.eval()
    greedy = {"attention_mask": torch.ones_like(x), "max_new_tokens": 6, "do_sample": False}
    cached, full = (model.generate(input_ids=x, use_cache=use, **greedy) for use in (True, False))
    assert torch.equal(cached, full)
    with torch.no_grad():
        expected = model(input_ids=x).logits
        model.save_pretrained(tmp_path / "adapter")
        close(PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()(input_ids=x).logits, expected)
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(x).logits, expected)
