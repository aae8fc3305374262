"""Training: exact resume, atomic checkpoints, the same batches for every arm, and plain words when it goes wrong."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import make_store, tiny_recipe, waveletgpt
from tests.processes import begin
from waveletgpt.data import TokenStore, prepare
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.windows import FixedWindows, RandomWindows
from waveletgpt.errors import UserError
from waveletgpt.runs.environment import peak_flops
from waveletgpt.runs.evaluation import evaluate_run
from waveletgpt.runs.folder import RunFolder
from waveletgpt.training.task import LanguageModeling
from waveletgpt.training.trainer import Diverged, Interrupted, Recorder, train

DATA = "words.txt"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(tiny_recipe(), store, tmp_path_factory.mktemp("runs") / "whole", data=DATA, show_progress=False)


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.path / "model.safetensors")


def assert_same_weights(a: RunFolder, b: RunFolder) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def without_seconds(run: RunFolder) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in run.metrics()]


def test_random_windows_depend_on_seed_and_index_alone() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    forward = [RandomWindows(tokens, 8, 50, seed=3)[i]["input_ids"].tolist() for i in range(50)]
    other = RandomWindows(tokens, 8, 99, seed=3)
    assert [other[i]["input_ids"].tolist() for i in reversed(range(50))] == forward[::-1]
    assert [RandomWindows(tokens, 8, 50, seed=4)[i]["input_ids"].tolist() for i in range(50)] != forward


def test_random_windows_reach_both_ends_and_stay_inside() -> None:
    tokens = np.arange(20, dtype=np.uint16)
    data = RandomWindows(tokens, 8, 400, seed=0)
    items = [data[i] for i in range(len(data))]
    starts = {int(item["input_ids"][0]) for item in items}
    assert starts == set(range(12))  # 20 tokens hold 12 windows of 8 + 1
    for item in items:
        assert torch.equal(item["shift_labels"], item["input_ids"] + 1)


@pytest.mark.parametrize("count", [1, 3, 12, 100])
def test_fixed_windows_do_not_overlap(count: int) -> None:
    data = FixedWindows(np.arange(101, dtype=np.uint16), 8, count)
    seen = [int(t) for i in range(len(data)) for t in data[i]["input_ids"]]
    assert len(seen) == len(set(seen)) == 8 * min(count, 12)


def test_windows_start_where_records_start() -> None:
    tokens = np.arange(95, dtype=np.uint16)  # nine whole records of 10, and a half
    random = RandomWindows(tokens, 9, 200, seed=0, record=10)
    assert {int(random[i]["input_ids"][0]) for i in range(200)} == set(range(0, 90, 10))
    fixed = FixedWindows(tokens, 9, None, record=10)
    assert [int(fixed[i]["input_ids"][0]) for i in range(len(fixed))] == list(range(0, 90, 10))
    # A context shorter than a record must still see its end.
    assert max(int(RandomWindows(tokens, 4, 200, seed=0, record=10)[i]["shift_labels"][-1]) for i in range(200)) == 94


def test_positions_start_again_where_a_document_is_begun() -> None:
    tokens = np.array([5, 6, 0, 7, 8, 9, 0, 0, 4, 3], dtype=np.uint16)
    row = FixedWindows(tokens, 9, None, end=0)[0]
    assert row["input_ids"].tolist() == [5, 6, 0, 7, 8, 9, 0, 0, 4]
    assert row["position_ids"].tolist() == [0, 1, 0, 1, 2, 3, 0, 0, 1]
    assert torch.equal(RandomWindows(tokens, 9, 1, seed=0, end=0)[0]["position_ids"], row["position_ids"])


def test_packing_learns_documents_apart(tmp_path: Path) -> None:
    """The same tokens and targets as without; the loss is that of each piece of a document alone."""
    for i, word in enumerate(("ab ", "cd ", "ef ")):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i}.txt").write_text(word * 40)
    store = prepare(str(tmp_path / "texts"), "bytes", DataSettings())
    recipe = tiny_recipe(max_steps=4).override({"training": {"packing": True}}, "test")
    run = train(recipe, store, tmp_path / "run", data="texts")
    model = AutoModelForCausalLM.from_pretrained(run.path).eval()
    end, total, count = store.end_of_documents(), 0.0, 0
    for row in LanguageModeling(store).eval_data(recipe, model):
        ids, targets = row["input_ids"], row["shift_labels"]
        begins = [0, *(t for t in range(1, len(ids)) if ids[t] == end), len(ids)]
        for first, stop in itertools.pairwise(begins):
            with torch.no_grad():
                logits = model(ids[None, first:stop]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, targets[first:stop], reduction="sum"))
            count += stop - first
    assert run.info["result"]["final_nll"] == pytest.approx(total / count, abs=2e-5)
    assert evaluate_run(run.path)["nll"] == pytest.approx(evaluate_run(run.path, batch_size=1)["nll"], abs=1e-5)
    assert run.info["result"]["breakdown"]["near_attention"]["windows"] > 0


def test_packing_needs_documents(tmp_path: Path) -> None:
    made = make_store(tmp_path)
    made.meta["tokenizer_files"] = []
    recipe = tiny_recipe().override({"training": {"packing": True}}, "test")
    with pytest.raises(UserError, match=r"training\.packing: tokens of \w+ have none that ends a document"):
        train(recipe, made, tmp_path / "run", data="words.txt")


def test_arms_start_from_the_same_weights(store: TokenStore) -> None:
    none = dict(LanguageModeling(store).build_model(tiny_recipe(mixing="none")).named_parameters())
    for mixing in ("fixed", "learnable", "ema", "conv"):
        other = dict(LanguageModeling(store).build_model(tiny_recipe(mixing=mixing)).named_parameters())
        for name, value in none.items():
            assert torch.equal(value, other[name]), (mixing, name)


def test_run_folder_is_complete(undisturbed: RunFolder, store: TokenStore) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    info = undisturbed.info
    assert info["status"] == "finished"
    assert info["recipe"]["max_steps"] == 12
    assert info["environment"]["torch"] == torch.__version__
    rows = undisturbed.metrics()
    assert [row["step"] for row in rows if "nll" in row] == [0, 3, 6, 9, 12]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(rows))
    assert info["result"]["final_nll"] == rows[-1]["nll"] < rows[0]["nll"]
    assert info["result"]["tokens"] == 12 * 4 * 16
    bits = info["result"]["final_nll"] / np.log(2) / store.bytes_per_token("validation")
    assert info["result"]["bits_per_byte"] == pytest.approx(bits)
    assert len(undisturbed.checkpoints()) == 2  # rotated
    model = AutoModelForCausalLM.from_pretrained(undisturbed.path)
    tokenizer = AutoTokenizer.from_pretrained(undisturbed.path)
    assert model(**tokenizer("the cat", return_tensors="pt")).logits.shape[-1] == store.vocab_size
    assert not list(undisturbed.path.rglob("training_args.bin"))
    assert not (undisturbed.path / ".saving").exists()


def test_held_out_loss_is_that_of_a_plain_loop(undisturbed: RunFolder, store: TokenStore) -> None:
    from waveletgpt.model.modeling import WaveletGPTForCausalLM

    model = WaveletGPTForCausalLM.from_pretrained(undisturbed.path).eval()
    data = FixedWindows(store.split("validation"), 16, 8)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(data[i]["input_ids"][None]).logits[0], data[i]["shift_labels"])
            for i in range(len(data))
        ]
    assert undisturbed.info["result"]["final_nll"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


def test_weight_decay_spares_biases_norms_and_kernels(store: TokenStore) -> None:
    from waveletgpt.training.trainer import RunTrainer

    model = LanguageModeling(store).build_model(tiny_recipe(mixing="learnable"))
    decayed = set(RunTrainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert all("kernels" not in name and "norm" not in name and not name.endswith("bias") for name in decayed)
    assert {"model.embed_tokens.weight", "model.blocks.0.attention.qkv_proj.weight"} <= decayed


def test_learned_kernels_may_have_a_rate_of_their_own(store: TokenStore, tmp_path: Path) -> None:
    def moved(**changes: float) -> tuple[float, float]:
        """How far the kernels, and the other weights, are from those without a step."""
        recipe = tiny_recipe(mixing="learnable", **changes)
        run = train(recipe, store, tmp_path / f"run{changes}", data=DATA, show_progress=False)
        start = LanguageModeling(store).build_model(recipe).state_dict()
        steps = {k: float((v - start[k]).abs().mean()) for k, v in load_file(run.path / "model.safetensors").items()}
        kernels = [step for name, step in steps.items() if "kernels" in name]
        others = [step for name, step in steps.items() if "kernels" not in name]
        return max(kernels), min(others)

    (all_alike, others), (slow, same) = moved(), moved(kernel_lr_scale=1e-3)
    assert slow < all_alike / 100
    assert same > others / 2


@pytest.mark.parametrize(
    "extra",
    [{}, {"accumulation": 2}, {"precision": "bf16"}, {"mixing": "learnable", "dropout": 0.1, "kernel_lr_scale": 0.5}],
)
def test_interrupted_run_resumes_bit_for_bit(
    extra: dict, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(**extra)
    whole = train(recipe, store, tmp_path / "whole", data=DATA, show_progress=False)
    original = Recorder.on_step_end

    def interrupt_at_5(self: Recorder, args, state, control, **kwargs) -> None:
        self.interrupted = self.interrupted or state.global_step == 5
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", interrupt_at_5)
        with pytest.raises(Interrupted, match="step 5 of 12"):
            train(recipe, store, tmp_path / "parts", data=DATA, show_progress=False)
    assert RunFolder(tmp_path / "parts").info["status"] == "interrupted"
    parts = train(recipe, store, tmp_path / "parts", data=DATA, resume=True, show_progress=False)
    assert_same_weights(whole, parts)
    losses = [[(r["step"], r["loss"]) for r in run.metrics() if "loss" in r] for run in (whole, parts)]
    assert losses[0] == losses[1]


def test_resuming_a_finished_run_changes_nothing(undisturbed: RunFolder, store: TokenStore) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("*") if path.is_file()}
    train(tiny_recipe(), store, undisturbed.path, data=DATA, resume=True, show_progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("*") if path.is_file()}


def test_a_finished_run_needs_no_checkpoint(undisturbed: RunFolder, store: TokenStore, tmp_path: Path) -> None:
    """Who has removed the optimiser's state to save disk is not told to train again."""
    shutil.copytree(undisturbed.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    (run.checkpoints()[-1][1] / "optimizer.pt").unlink()
    assert train(tiny_recipe(), store, run.path, data=DATA, resume=True, show_progress=False).finished


def test_a_copy_of_a_checkpoint_is_the_users(undisturbed: RunFolder, store: TokenStore, tmp_path: Path) -> None:
    shutil.copytree(undisturbed.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    for name in ("best-checkpoint-2", "my_checkpoint-99"):
        shutil.copytree(run.checkpoints()[-1][1], run.path / name)
    assert [folder.name for _, folder in run.checkpoints()] == ["checkpoint-9", "checkpoint-12"]
    shutil.rmtree(run.path / "checkpoint-12")
    run.update_info(status="interrupted")
    train(tiny_recipe(), store, run.path, data=DATA, resume=True, show_progress=False)
    assert (run.path / "best-checkpoint-2").is_dir()
    assert (run.path / "my_checkpoint-99").is_dir()


def go_on(store: Path, out: Path, steps: int) -> None:
    recipe = tiny_recipe(max_steps=steps, save_every=2, eval_every=4)
    train(recipe, TokenStore.open(store), out, data="words.txt", resume=True, show_progress=False)


def test_kill_9_at_random_moments_changes_no_bit(store: TokenStore, tmp_path: Path) -> None:
    """Every life of the run gets some steps further and is killed at a random moment: between steps, in one, while it
    evaluates or while it saves."""
    kills, rng = int(os.environ.get("WAVELETGPT_TEST_KILLS", 3)), random.Random(0)
    steps = 8 * kills + 8
    recipe = tiny_recipe(max_steps=steps, save_every=2, eval_every=4)
    whole = train(recipe, store, tmp_path / "whole", data=DATA, show_progress=False)
    killed = RunFolder(tmp_path / "killed")
    told = {name: tmp_path / name for name in ("out", "err")}
    for _ in range(kills):
        process = begin(go_on, store.path, killed.path, steps, **told)
        saved = max((step for step, _ in killed.checkpoints()), default=0)
        goal = saved + rng.randint(3, 8)  # at least one checkpoint further
        while max((row["step"] for row in killed.metrics()), default=0) < goal:
            assert process.is_alive(), told["err"].read_text()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert max(step for step, _ in killed.checkpoints()) > saved
    process = begin(go_on, store.path, killed.path, steps, **told)
    process.join(300)
    assert process.exitcode == 0, told["err"].read_text()
    assert_same_weights(whole, killed)
    assert without_seconds(whole) == without_seconds(killed)


def test_ctrl_c_saves_and_says_how_to_go_on(store: TokenStore, tmp_path: Path) -> None:
    data = store.path.parent.parent.parent / "words.txt"
    words = [
        *(sys.executable, "-m", "waveletgpt", "train", data, "--modality", "chars", "--cache-dir", tmp_path / "cache"),
        *("--preset", "tiny", "--max-steps", "100000", "--device", "cpu", "--out", tmp_path / "run"),
    ]
    process = subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (tmp_path / "run" / "metrics.jsonl").is_file() or not RunFolder(tmp_path / "run").metrics():
        assert time.time() < deadline
        assert process.poll() is None, process.stderr
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    run = RunFolder.open(tmp_path / "run")
    assert run.info["status"] == "interrupted"
    assert run.checkpoints()


def test_refuses_an_out_that_holds_another_run(undisturbed: RunFolder, store: TokenStore) -> None:
    with pytest.raises(UserError, match=r"already holds a run \(finished\)"):
        train(tiny_recipe(), store, undisturbed.path, data=DATA, show_progress=False)


def test_one_process_at_a_time_trains_in_a_folder(store: TokenStore, tmp_path: Path) -> None:
    """A second one would write between the lines of the first; one that was killed is in nobody's way."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom waveletgpt.training.resuming import claimed\n"
        "with claimed(Path(sys.argv[1])):\n    print('claimed', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        with pytest.raises(UserError, match="another process is training there"):
            train(tiny_recipe(), store, tmp_path / "run", data="words", show_progress=False)
        assert list((tmp_path / "run").iterdir()) == []
        other.kill()
    run = train(tiny_recipe(), store, tmp_path / "run", data="words", show_progress=False)
    assert run.finished
    # What is refused leaves no folder behind.
    with pytest.raises(UserError):
        train(tiny_recipe(n_head=3), store, tmp_path / "none", data="words", show_progress=False)
    assert not (tmp_path / "none").exists()


def test_refuses_to_resume_with_other_settings(undisturbed: RunFolder, store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lr is 0\.1, the run .* has 0\.002"):
        train(tiny_recipe(lr=0.1), store, undisturbed.path, data=DATA, resume=True, show_progress=False)
    with pytest.raises(UserError, match=r"model\.n_embd is 32"):
        train(tiny_recipe(n_embd=32), store, undisturbed.path, data=DATA, resume=True, show_progress=False)
    other = make_store(tmp_path / "other", words=5000)
    with pytest.raises(UserError, match="other data"):
        train(tiny_recipe(), other, undisturbed.path, data=DATA, resume=True, show_progress=False)


def test_refuses_folders_and_files_that_are_no_run(store: TokenStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        train(tiny_recipe(), store, tmp_path / "file", data=DATA, show_progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        train(tiny_recipe(), store, tmp_path / "full", data=DATA, show_progress=False)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"


def test_what_a_kill_at_the_first_write_leaves_is_no_other_run(store: TokenStore, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.4711.tmp").write_text('{"sch')
    assert train(tiny_recipe(), store, tmp_path / "run", data=DATA, resume=True, show_progress=False).finished


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "optimizer.bin", "trainer_state.json"])
def test_truncated_checkpoint_is_named(name: str, store: TokenStore, tmp_path: Path) -> None:
    run = train(tiny_recipe(max_steps=6), store, tmp_path / "run", data=DATA, show_progress=False)
    run.update_info(status="interrupted")
    file = run.checkpoints()[-1][1] / name
    if name == "optimizer.bin":  # as FSDP called it
        (file.parent / "optimizer.pt").rename(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoint-6 is broken .*delete it"):
        train(tiny_recipe(max_steps=6), store, tmp_path / "run", data=DATA, resume=True, show_progress=False)


def test_too_short_data(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train split has \d+ tokens, a window needs 100001"):
        train(tiny_recipe(n_positions=100000), store, tmp_path / "run", data=DATA, show_progress=False)
    assert not (tmp_path / "run").exists()


def test_device_that_is_not_there(store: TokenStore, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="`device=cuda`"):
        train(tiny_recipe(device="cuda"), store, tmp_path / "run", data=DATA, show_progress=False)


def test_diverging_run_stops_with_a_diagnosis(store: TokenStore, tmp_path: Path) -> None:
    recipe = tiny_recipe(lr=1e30, clip=1e30, schedule="constant", warmup_steps=0)
    with pytest.raises(Diverged, match=r"loss became (nan|inf).*`lr`"):
        train(recipe, store, tmp_path / "run", data=DATA, show_progress=False)
    info = RunFolder(tmp_path / "run").info
    assert info["status"] == "failed"
    assert "`lr`" in info["error"]
    for _, folder in RunFolder(tmp_path / "run").checkpoints():
        assert all(torch.isfinite(value).all() for value in load_file(folder / "model.safetensors").values())


def test_full_disk_is_one_line_and_keeps_what_was_saved(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    original = Trainer._save_optimizer_and_scheduler

    def full(self: Trainer, output_dir: str) -> None:
        if self.state.global_step >= 6:
            raise OSError(28, "No space left on device")
        original(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(UserError, match=r"no room left.*`resume=True`"):
        train(tiny_recipe(), store, tmp_path / "run", data=DATA, show_progress=False)
    assert [step for step, _ in RunFolder(tmp_path / "run").checkpoints()] == [3]
    monkeypatch.undo()
    whole = train(tiny_recipe(), store, tmp_path / "whole", data=DATA, show_progress=False)
    assert_same_weights(
        whole, train(tiny_recipe(), store, tmp_path / "run", data=DATA, resume=True, show_progress=False)
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "plateau"])
def test_schedules(schedule: str, store: TokenStore, tmp_path: Path) -> None:
    recipe = tiny_recipe(schedule=schedule, max_steps=20, warmup_steps=4, eval_every=1)
    run = train(recipe, store, tmp_path / "run", data=DATA, show_progress=False)
    rates = [row["lr"] for row in run.metrics() if "loss" in row]
    if schedule != "plateau":
        assert rates[0] < rates[2] < rates[4] == pytest.approx(recipe.lr)  # warm-up
    ends = {"cosine": 0.1 * recipe.lr, "linear": 0.0, "constant": recipe.lr}
    if schedule in ends:
        assert rates[-1] == pytest.approx(ends[schedule], abs=0.08 * recipe.lr)
    else:
        assert set(np.round(np.log10(np.array(rates) / recipe.lr), 6)) <= {0.0, -1.0, -2.0, -3.0}


def test_two_processes_are_one_with_twice_the_batch(store: TokenStore, tmp_path: Path) -> None:
    data = store.path.parent.parent.parent / "words.txt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        *("train", data, "--modality", "chars", "--cache-dir", tmp_path / "cache", "--preset", "tiny"),
        *("--max-steps", 12, "--device", "cpu", "--training.eval-every", 4, "--training.log-every", 1),
        *("--training.eval-windows", 16, "--training.threads", 1, "--model.n-positions", 32),
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [*launch, "-m", "waveletgpt", *words, "--batch-size", 4, "--out", tmp_path / "two"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    result = waveletgpt(*words, "--batch-size", 8, "--out", tmp_path / "one")
    assert result.returncode == 0, result.stderr
    one, two = (RunFolder(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one.metrics(), two.metrics(), strict=True):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        key = "loss" if "loss" in a else "nll"
        assert a[key] == pytest.approx(b[key], abs=2e-4)  # float32 sums in another order
    assert json.loads((tmp_path / "two" / "run.json").read_text())["environment"]["processes"] == 2


def test_a_run_says_how_fast_it_computed_and_how_long_it_waited(undisturbed: RunFolder) -> None:
    info = undisturbed.info
    result = info["result"]
    assert result["flops_per_second"] == pytest.approx(result["tokens_per_second"] * info["model"]["flops_per_token"])
    assert result["mfu"] is None  # a CPU's peak is not known
    assert 0 < result["waiting_for_data"] < 1


def test_peaks_of_gpus() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA L4", "fp32") == 60e12
    assert peak_flops("NVIDIA L40", "bf16") is None
    assert peak_flops(None, "bf16") is None
