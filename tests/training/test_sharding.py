"""Processes that each hold a part (FSDP 2) train what those with copies train; any number of them goes on with it."""

from __future__ import annotations

import contextlib
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.helpers import make_store, tiny_recipe
from tests.training.launch import launch, train_until
from waveletgpt.data import TokenStore
from waveletgpt.errors import UserError
from waveletgpt.model.configuration import WaveletGPTConfig
from waveletgpt.model.modeling import WaveletGPTForCausalLM
from waveletgpt.runs.folder import RunFolder
from waveletgpt.training import processes, trainer
from waveletgpt.training.recipe import Recipe

RUNS: dict[str, dict[str, Any]] = {
    "fixed": {"mixing": "fixed"},
    "learnable": {"mixing": "learnable", "kernel_lr_scale": 4.0},
    "llama": {"mixing": "learnable", "architecture": "llama", "batch_size": 2, "accumulation": 2},
}
MODELS = [(mixing, architecture) for mixing in ("fixed", "learnable", "ema") for architecture in ("gpt2", "llama")]
OTHER_BATCHES = 5e-6  # a step's sequences are summed in another order, and Adam divides small gradients by themselves


def recipe(name: str, **changes: Any) -> Recipe:
    """8 steps, a checkpoint and an evaluation at every fourth."""
    often = {"max_steps": 8, "save_every": 4, "eval_every": 4, "samples": 0}
    return tiny_recipe(**{**often, **RUNS[name], **changes})


def by_hand(mixing: str, architecture: str, world: int = 1) -> dict[str, torch.Tensor]:
    """Weights, in float64, after 3 steps of AdamW on 4 rows, of which each of `world` processes takes its share."""
    torch.manual_seed(0)
    size = {"vocab_size": 32, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 16}
    model = WaveletGPTForCausalLM(WaveletGPTConfig(**size, architecture=architecture, mixing=mixing)).train().double()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(1))
    rows = rows.chunk(world)[processes.rank()]
    for _ in range(3):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}


def held(of: trainer.RunTrainer) -> int:
    """Numbers of the optimiser's state that are in this process."""
    states = [part for state in of.optimizer.state.values() for part in state.values()]
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in states if p.ndim)


def all_of_it(folder: Path, store: TokenStore) -> None:
    """What each of two processes does; one start of processes costs more than all of it."""
    finish = trainer.finish

    def finish_and_count(of: trainer.RunTrainer) -> None:
        (of.run.path / f"held-{processes.rank()}").write_text(str(held(of)))
        finish(of)

    trainer.finish = finish_and_count  # type: ignore[assignment]
    for name in RUNS:
        for fsdp in (False, True):
            train_until(recipe(name, fsdp=fsdp), store, folder / f"{name}-{'parts' if fsdp else 'copies'}")
    sharded = recipe("learnable", fsdp=True)
    with contextlib.suppress(SystemExit):
        train_until(sharded, store, folder / "resumed", hit=(1, 3, signal.SIGINT))
    train_until(sharded, store, folder / "resumed", resume=True)
    train_until(sharded, store, folder / "from-one", resume=True)
    for model in MODELS:
        weights = by_hand(*model, world=2)
        if processes.first():
            torch.save(weights, folder / f"{'-'.join(model)}.pt")
    train_until(sharded, store, folder / "killed", hit=(1, 6, signal.SIGKILL))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs; the parts of one of them are begun by one process, and one is left killed."""
    folder = tmp_path_factory.mktemp("runs")
    alone = recipe("learnable", fsdp=True, batch_size=8)
    with pytest.raises(SystemExit):
        train_until(alone, store, folder / "from-one", hit=(0, 3, signal.SIGINT))
    results = launch(folder, all_of_it, folder, store, timeout=400)
    assert [code for code, *_ in results] == [1, -signal.SIGKILL], results
    ended = "waveletgpt: another process of this run has ended; go on with the same command and --resume"
    assert results[0][2].splitlines()[-1] == ended
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def evaluations(run: Path) -> list[float]:
    return [loss for _, _, loss in RunFolder(run).curve()]


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    """All weights, but for biases of keys: they shift all scores of a query alike, so softmax takes them out, their
    gradient is rounding, and Adam makes steps of full size of it."""
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        if name.endswith("qkv_proj.bias"):
            width = len(weight) // 3
            keep = torch.cat([torch.arange(width), torch.arange(2 * width, 3 * width)])
            torch.testing.assert_close(got[name][keep], weight[keep], rtol=0, atol=atol)
        else:
            torch.testing.assert_close(got[name], weight, rtol=0, atol=atol)


@pytest.mark.parametrize("name", RUNS)
def test_parts_train_what_copies_train(folder: Path, name: str) -> None:
    copies, parts = folder / f"{name}-copies", folder / f"{name}-parts"
    assert_equal(weights(parts), weights(copies), 4e-7)
    assert evaluations(parts) == pytest.approx(evaluations(copies), abs=1e-6)
    holds = {path: [int((path / f"held-{rank}").read_text()) for rank in range(2)] for path in (copies, parts)}
    assert holds[copies][0] == holds[copies][1] == sum(holds[parts])
    # Rows are dealt out: of the odd number of embeddings one process has a row of 16 more, in both moments.
    assert abs(holds[parts][0] - holds[parts][1]) == 2 * 16


@pytest.mark.parametrize(("mixing", "architecture"), MODELS)
def test_sharded_by_hand_a_model_trains_as_it_does_alone(folder: Path, mixing: str, architecture: str) -> None:
    got = torch.load(folder / f"{mixing}-{architecture}.pt")
    assert_equal(got, by_hand(mixing, architecture), 1e-10)


def test_stopped_and_gone_on_with_parts_end_alike(folder: Path) -> None:
    whole, resumed = folder / "learnable-parts", folder / "resumed"
    assert evaluations(resumed) == evaluations(whole)
    assert_equal(weights(resumed), weights(whole), 0)


def test_two_go_on_with_what_one_began(folder: Path) -> None:
    assert evaluations(folder / "from-one") == pytest.approx(evaluations(folder / "learnable-parts"), abs=1e-6)
    assert_equal(weights(folder / "from-one"), weights(folder / "learnable-parts"), OTHER_BATCHES)


def test_one_goes_on_with_what_two_left_when_killed(
    folder: Path, store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(folder / "killed", out)
    run = RunFolder(out)
    assert run.info["status"] == "running"
    assert [step for step, _ in run.checkpoints()] == [4]
    assert {file.name for file in (run.checkpoints()[-1][1] / "optimizer").iterdir()} == {
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
    }
    one = recipe("learnable", fsdp=True, batch_size=4, accumulation=2)
    trainer.train(one, store, out, data="words.txt", resume=True)
    assert "one process: `training.fsdp` has nothing to share out" in capsys.readouterr().err
    whole = folder / "learnable-parts"
    assert evaluations(out) == pytest.approx(evaluations(whole), abs=1e-6)
    assert_equal(weights(out), weights(whole), OTHER_BATCHES)
    assert run.info["status"] == "finished"


def test_every_checkpoint_and_the_end_load_anywhere(folder: Path) -> None:
    run = folder / "learnable-parts"
    for path in (run, *(path for _, path in RunFolder(run).checkpoints())):
        model, report = WaveletGPTForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(report.values())
        assert model.lm_head.weight is model.model.embed_tokens.weight
        # Tied weights are in the file once, as they are in a run with copies.
        assert weights(path).keys() == weights(folder / "learnable-copies").keys()
    assert_equal(weights(run), weights(path), 0)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def flip(file: Path) -> None:
    """Damage inside a file, whose length stays."""
    content = bytearray(file.read_bytes())
    place = content.index(b"PK\x03\x04")
    content[place : place + 4] = b"\0\0\0\0"
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (cut, "optimizer/__1_0.distcp", "(optimizer/__1_0.distcp is missing or cut short)"),
        (Path.unlink, "optimizer/__0_0.distcp", "(optimizer/__0_0.distcp is missing or cut short)"),
        (cut, "optimizer/.metadata", "(optimizer/.metadata is missing or cut short)"),
        (flip, "optimizer/__0_0.distcp", "(optimizer: "),
        (cut, "model.safetensors", "(model.safetensors is cut short)"),
        (Path.unlink, "config.json", "(config.json is missing or cut short)"),
        (cut, "scheduler.pt", "(scheduler.pt is missing or cut short)"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    folder: Path, store: TokenStore, tmp_path: Path, damage: Any, name: str, words: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(folder / "killed", out)
    checkpoint = RunFolder(out).checkpoints()[-1][1]
    damage(checkpoint / name)
    one = recipe("learnable", fsdp=True, batch_size=8)
    with pytest.raises(UserError) as told:
        trainer.train(one, store, out, data="words.txt", resume=True, show_progress=False)
    assert str(told.value).startswith(f"checkpoint {checkpoint} is broken {words}")
    assert str(told.value).endswith("delete it, and `resume=True` goes on from the one before")
