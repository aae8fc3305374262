"""What mixing costs in training, and how the baseline's speed compares with nanoGPT's.

    python benchmarks/training.py [--preset paper] [--nanogpt CLONE] [--out FOLDER]           # CPU, float32
    python benchmarks/training.py --device cuda --preset gpt2 --bf16 --compile [...]          # GPU

Table 1: one training step (forward, backward, clipping, AdamW) of every mixing, interleaved round by round on the same
batch; the ratio to "none" is the median of the rounds' ratios, which a busy machine disturbs least. Limits: `fixed`
1.03 on a CPU and 1.02 on a GPU, `learnable` 1.10; peak memory of tensors (weights, optimiser, step) 1.02. The
utilisation is the model's FLOPs per second (PaLM's count) over those of a large matrix product of the same type here.

Table 2 (with --nanogpt, a clone of github.com/karpathy/nanoGPT): tokens/s of this package's own trainer with mixing
"none" beside nanoGPT's model in nanoGPT's loop, same sizes, batch, optimiser and precision, taken in turns. Limit: 1.

Parity first: the operator must equal its definition on the device.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measuring import Report, Stopwatch, demand_parity, peak_memory, quartiles, ratio, rounds, training_step

from waveletgpt import WaveletGPTConfig, WaveletGPTForCausalLM
from waveletgpt.model.cost import flops_per_token
from waveletgpt.ops import wavelet_mix
from waveletgpt.training.recipe import PRESETS, Recipe

MIXINGS = ("none", "fixed", "fixed, windows 2-4", "learnable", "wavelet", "ema", "conv", "shift")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper", choices=PRESETS)
    parser.add_argument("--mixings", nargs="+", default=MIXINGS, choices=MIXINGS, metavar="MIXING")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no further model is begun")
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--steps", type=int, default=10, help="steps of each turn of table 2")
    parser.add_argument("--out", type=Path, help="folder for results (JSON)")
    options = parser.parse_args()
    options.mixings = list(dict.fromkeys(["none", *options.mixings]))
    torch.set_num_threads(options.threads)
    check_operator(options.device)
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("out", "device")}
    report = Report("training", options.out, device=options.device, **settings)
    mixing_cost(report, options)
    if options.nanogpt:
        beside_nanogpt(report, options)


def check_operator(device: str) -> None:
    for longest in (4, 512):
        windows = WaveletGPTConfig(n_embd=128, n_head=8, n_positions=512, max_window=longest).mix_windows()
        x = torch.randn(2, 300, 64, device=device)
        want = wavelet_mix(x.cpu().double(), windows, backend="reference")
        demand_parity("the operator", wavelet_mix(x, windows).cpu(), want, 1e-5)


def mixing_cost(report: Report, options: argparse.Namespace) -> None:
    cuda = options.device == "cuda"
    steps: dict[str, Callable[[], float]] = {}
    memory: dict[str, int] = {}
    flops: dict[str, float] = {}
    start = time.perf_counter()
    for name in options.mixings:
        if steps and time.perf_counter() - start > options.seconds:
            print(f"without {name}: {options.seconds:.0f} seconds have passed")
            continue
        mixing, _, short = name.partition(", ")
        sizes = {**PRESETS[options.preset], "max_window": 4 if short else None}
        config = WaveletGPTConfig(vocab_size=256, mixing=mixing, **sizes)
        torch.manual_seed(0)
        model = WaveletGPTForCausalLM(config).to(options.device)
        flops[name] = flops_per_token(model) * options.batch_size * config.n_positions
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        ids = torch.randint(256, (options.batch_size, config.n_positions), device=options.device)
        inputs = {"input_ids": ids, "shift_labels": ids, "use_cache": False}
        run = torch.compile(model) if options.compile else model
        steps[name] = partial(training_step, run, optimizer, inputs, options.bf16)
        for _ in range(2):
            steps[name]()
        tensors = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
        memory[name] = peak_memory(steps[name], cuda) + sum(tensor.nbytes for tensor in tensors)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(options.rounds):
        for name in list(steps)[i % len(steps) :] + list(steps)[: i % len(steps)]:
            times[name].append(steps[name]())
    most = matrix_flops(options.device, torch.bfloat16 if options.bf16 else torch.float32)
    rows = []
    for name, values in times.items():
        seconds = statistics.median(values)
        low, high = quartiles([a / b for a, b in zip(values, times["none"], strict=True)])
        row: list[object] = [name, f"{seconds * 1e3:.1f}", f"{ratio(values, times['none']):.3f}"]
        row += [f"{low:.3f} ... {high:.3f}", f"{flops[name] / seconds / most:.0%}"]
        row += [f"{memory[name] / 2**20:.0f}", f"{memory[name] / memory['none']:.3f}"]
        rows.append(row)
    columns = ["mixing", "ms/step", "x none", "quartiles", "model FLOPs utilisation", "MiB at the peak", "x none"]
    limit = "1.02" if cuda else "1.03"
    note = f"{options.rounds} rounds. Limits: `fixed` {limit}, `learnable` 1.10, memory 1.02. "
    note += f"A matrix product reaches {most / 1e12:.2f} TFLOP/s here."
    report.table(f"training step, preset {options.preset}, batch {options.batch_size}", columns, rows, note)


def matrix_flops(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    stopwatch = Stopwatch(device)
    a @ b
    return 2 * size**3 / statistics.median(stopwatch(lambda: a @ b)[0] for _ in rounds(2, at_most=20))


def beside_nanogpt(report: Report, options: argparse.Namespace) -> None:
    # What else they need, a benchmark of the model alone does not.
    from waveletgpt.data import DataSettings, prepare
    from waveletgpt.training.trainer import train

    clone, preset, batch_size, steps = options.nanogpt, options.preset, options.batch_size, options.steps
    spec = importlib.util.spec_from_file_location("nanogpt_model", clone / "model.py")
    if spec is None or spec.loader is None:
        sys.exit(f"no model.py in {clone}")
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = nanogpt
    spec.loader.exec_module(nanogpt)
    sizes = PRESETS[preset]
    context = sizes["n_positions"]
    with tempfile.TemporaryDirectory() as folder:
        store = prepare("python-stdlib", "bytes", DataSettings(), progress=False)
        tokens = store.split("train")
        torch.manual_seed(0)
        theirs = nanogpt.GPT(
            nanogpt.GPTConfig(
                block_size=context,
                vocab_size=store.vocab_size,
                n_layer=sizes["n_layer"],
                n_head=sizes["n_head"],
                n_embd=sizes["n_embd"],
                dropout=0.0,
                bias=True,
            )
        ).to(options.device)
        compiled = torch.compile(theirs) if options.compile else theirs
        optimizer = theirs.configure_optimizers(0.1, 2e-3, (0.9, 0.95), options.device)

        def their_turn() -> float:
            start = time.perf_counter()
            for _ in range(steps):
                starts = torch.randint(len(tokens) - context, (batch_size,))
                x, y = (
                    torch.stack(
                        [torch.from_numpy(tokens[i + shift : i + shift + context].astype(np.int64)) for i in starts]
                    ).to(options.device)
                    for shift in (0, 1)
                )
                with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
                    _, loss = compiled(x, y)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if options.device == "cuda":
                torch.cuda.synchronize()
            return steps * batch_size * context / (time.perf_counter() - start)

        def our_turn(turn: int) -> float:
            recipe = Recipe().override(
                {
                    "preset": preset,
                    "mixing": "none",
                    "max_steps": steps,
                    "batch_size": batch_size,
                    "device": options.device,
                    "precision": "bf16" if options.bf16 else "fp32",
                    "compile": options.compile,
                    "eval_every": steps,
                    "eval_windows": 1,
                    "save_every": steps,
                    "log_every": 10,
                    "samples": 0,
                    "threads": torch.get_num_threads(),
                },
                "benchmark",
            )
            run = train(recipe, store, Path(folder) / str(turn), data="python-stdlib", show_progress=False)
            result = run.info["result"]
            # Compiled, the mean would hold the compilation; the median over the logging intervals does not.
            return result["tokens_per_second"] if options.compile else result["tokens"] / result["seconds"]

        their_turn()
        ours, others = [], []
        for turn in range(options.rounds):
            ours.append(our_turn(turn))
            others.append(their_turn())
    rows = [["ours", f"{statistics.median(ours):,.0f}"], ["nanoGPT", f"{statistics.median(others):,.0f}"]]
    note = f"Median ratio {ratio(ours, others):.3f} (limit 1)."
    report.table("tokens/s, trainer with mixing none and nanoGPT's model and loop", ["", "tokens/s"], rows, note)


if __name__ == "__main__":
    main()
