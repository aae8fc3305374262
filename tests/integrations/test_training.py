"""Models with mixing under others' ways to train: TRL, and several processes (DDP, FSDP 2)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from tests.integrations.tiny_models import VOCAB, mixed, stock, tokens
from tests.training.launch import launch
from waveletgpt import add_mixing

# Tokens of documents: rows that need padding, and one of a single token.
LENGTHS = (5, 11, 8, 1, 9, 4, 12, 7)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w1", unk_token="w2"
    )


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Of either trainer: 3 steps of plain SGD over batches of 4, on a CPU."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **more,
    }


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trl_sft_padded_is_padding_free(tmp_path: Path, checkpointing: bool) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_dict({"input_ids": [tokens(1, n, seed=n)[0].tolist() for n in LENGTHS]})

    def train(padding_free: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = mixed("llama", "learnable", dtype=torch.float32)
        options = settings(tmp_path, padding_free=padding_free, gradient_checkpointing=checkpointing)
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**options), train_dataset=data, processing_class=tokenizer())
        trainer.train()
        return losses(trainer), trainer.model.state_dict()

    padded, free = train(False), train(True)
    assert padded[0] == pytest.approx(free[0], abs=1e-5)
    start = mixed("llama", "learnable", dtype=torch.float32).state_dict()
    for name, value in padded[1].items():
        torch.testing.assert_close(free[1][name], value, rtol=0, atol=2e-5)
    moved = [name for name in start if "deviation" in name and not torch.equal(start[name], padded[1][name])]
    assert len(moved) == 9  # three sites in three blocks


@pytest.fixture
def preferences() -> Any:
    pytest.importorskip("trl")
    from datasets import Dataset

    def text(length: int, seed: int) -> str:
        return " ".join(f"w{i}" for i in tokens(1, length, seed=seed)[0].tolist())

    rows = range(8)
    return Dataset.from_dict(
        {
            "prompt": [text(3 + i % 3, i) for i in rows],
            "chosen": [text(2 + i % 4, 20 + i) for i in rows],
            "rejected": [text(5 - i % 4, 40 + i) for i in rows],
        }
    )


def prefer(model: Any, data: Any, folder: Path, reference: Any = None) -> Any:
    import trl

    config = trl.DPOConfig(**settings(folder))
    return trl.DPOTrainer(model, reference, args=config, train_dataset=data, processing_class=tokenizer())


def test_trl_dpo_starts_at_its_reference(tmp_path: Path, preferences: Any) -> None:
    """Model and reference are one at first, so the first loss is ln 2; then they part."""
    model = mixed("llama", "learnable", dtype=torch.float32)
    trainer = prefer(model, preferences, tmp_path, copy.deepcopy(model))
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931472, abs=1e-5)
    assert abs(losses(trainer)[-1] - 0.6931472) > 1e-4


def test_trl_dpo_never_takes_the_stock_model_as_reference(tmp_path: Path, preferences: Any) -> None:
    """It loads one by the model's name: of a mixed checkpoint that is right; after `add_mixing` there is no name."""
    stock("llama", dtype=torch.float32).save_pretrained(tmp_path / "stock")
    model = add_mixing(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"), mixing="gate")
    with pytest.raises(OSError, match="Repo id"):
        prefer(model, preferences, tmp_path)
    mixed("llama", "learnable", dtype=torch.float32).save_pretrained(tmp_path / "mixed")
    trainer = prefer(AutoModelForCausalLM.from_pretrained(tmp_path / "mixed"), preferences, tmp_path)
    assert type(trainer.ref_model).__name__ == "WaveletLlamaForCausalLM"
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931472, abs=1e-5)


# Several processes.

WAYS = ("ddp", "fsdp")
KINDS = ("fixed", "learnable")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """4 rows of 12 tokens, two of them padded on the left."""
    x = tokens(4, 12)
    mask = torch.ones_like(x)
    mask[0, :5], mask[3, :2] = 0, 0
    return x, mask


def steps(model: Any, parameters: Any, rank: int, world: int) -> None:
    """3 of AdamW; each process takes its rows, and sums of gradients are those of all."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    x, mask = (part.chunk(world)[rank] for part in batch())
    for _ in range(3):
        logits = model(input_ids=x, attention_mask=mask, use_cache=False).logits
        # A mean over all tokens, so that the mean over processes is the mean over rows.
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def one_of_two(folder: Path) -> None:
    """What each process runs: every way and mixing, one after the other."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for mixing in KINDS:
        for way in WAYS:
            model: Any = mixed("llama", mixing).train()
            trained = model
            if way == "ddp":
                trained = DistributedDataParallel(model)
            else:
                mesh = dist.init_device_mesh("cpu", (2,))
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
            steps(trained, model.parameters(), rank, 2)
            state = model.state_dict()
            if way == "fsdp":
                state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
            if rank == 0:
                torch.save(state, folder / f"{way}-{mixing}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    results = launch(folder, one_of_two, folder)
    assert [code for code, *_ in results] == [0, 0], results
    return folder


@pytest.mark.parametrize("mixing", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(trained_by_two: Path, way: str, mixing: str) -> None:
    model = mixed("llama", mixing).train()
    start = copy.deepcopy(model.state_dict())
    steps(model, model.parameters(), 0, 1)
    got = torch.load(trained_by_two / f"{way}-{mixing}.pt")
    assert got.keys() == start.keys()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-6)
        assert name.endswith("window") or not torch.equal(start[name], expected)
