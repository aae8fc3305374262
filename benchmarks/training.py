"""What mixing costs in training, and how the baseline's speed compares with nanoGPT's.

    python benchmarks/training.py [--preset paper] [--nanogpt CLONE]                          # CPU, float32
    python benchmarks/training.py --device cuda --preset gpt2 --bf16 --compile [...]          # GPU

Table 1: one training step (forward, backward, clipping, AdamW) of every mixing, interleaved round by round on the same
batch; the ratio to "none" is the median of the rounds' ratios, which a busy machine disturbs least. Limits for `fixed`:
1.05 on a CPU, 1.02 on a GPU. Peak memory is printed on GPUs.

Table 2 (with --nanogpt, a clone of github.com/karpathy/nanoGPT): tokens/s of this package's own trainer with mixing
"none" beside nanoGPT's model in nanoGPT's loop, same sizes, batch, optimiser and precision, taken in turns. The limit
is 0.95.

Refuses to print a speed before parity: the operator must equal its reference on the device.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from waveletgpt import WaveletGPTConfig, WaveletGPTForCausalLM
from waveletgpt.data import DataSettings, prepare
from waveletgpt.ops import wavelet_mix
from waveletgpt.recipe import PRESETS, Recipe
from waveletgpt.training import train

MIXINGS = ("none", "fixed", "fixed, windows 2-4", "learnable", "ema", "conv", "shift")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--steps", type=int, default=10, help="steps of each turn of table 2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    check_operator(options.device)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"torch {torch.__version__}, {machine}, {options.threads} CPU thread(s), preset {options.preset}, batch "
        f"{options.batch_size}, {'bfloat16' if options.bf16 else 'float32'}{', compiled' if options.compile else ''}, "
        f"{options.rounds} rounds, {time.strftime('%Y-%m-%d')}"
    )
    mixing_cost(options)
    if options.nanogpt:
        beside_nanogpt(options)


def check_operator(device: str) -> None:
    """Parity first."""
    windows = WaveletGPTConfig(n_embd=128, n_head=8, n_positions=512).mix_windows()
    x = torch.randn(2, 300, 64, device=device)
    want = wavelet_mix(x.cpu().double(), windows, backend="reference")
    error = float((wavelet_mix(x, windows).cpu().double() - want).abs().max())
    if error > 1e-5:
        sys.exit(f"the fast operator is off by {error:.2g}: no speed is worth printing")


def mixing_cost(options: argparse.Namespace) -> None:
    steps: dict[str, Callable[[], float]] = {}
    memory: dict[str, float] = {}
    for name in MIXINGS:
        mixing, _, short = name.partition(", ")
        sizes = {**PRESETS[options.preset], "max_window": 4 if short else None}
        config = WaveletGPTConfig(vocab_size=256, mixing=mixing, **sizes)
        torch.manual_seed(0)
        model = WaveletGPTForCausalLM(config).to(options.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        ids = torch.randint(256, (options.batch_size, config.n_positions), device=options.device)
        run = torch.compile(model) if options.compile else model
        steps[name] = partial(step, run, optimizer, ids, options.bf16)
        for _ in range(2):
            steps[name]()
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            steps[name]()
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(options.rounds):
        for name in list(steps)[i % len(steps) :] + list(steps)[: i % len(steps)]:
            times[name].append(steps[name]())
    limit = 1.05 if options.device == "cpu" else 1.02
    print(f"\n{'mixing':<20}{'ms/step':>10}{'x none':>9}   quartiles")
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times["none"], strict=True))
        quarter = len(ratios) // 4
        note = f"   limit {limit}" if name == "fixed" else ""
        if name in memory:
            note += f"   {memory[name]:.0f} MiB at the peak"
        print(
            f"{name:<20}{statistics.median(values) * 1e3:>10.1f}{statistics.median(ratios):>9.3f}   "
            f"{ratios[quarter]:.3f} ... {ratios[-1 - quarter]:.3f}{note}"
        )


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, bf16: bool) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        loss = model(input_ids=ids, shift_labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def beside_nanogpt(options: argparse.Namespace) -> None:
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
    ratio = statistics.median(a / b for a, b in zip(ours, others, strict=True))
    print(
        f"\ntokens/s, trainer with mixing none: {statistics.median(ours):,.0f}; nanoGPT's model and loop: "
        f"{statistics.median(others):,.0f}; ratio {ratio:.3f} (limit 0.95)"
    )


if __name__ == "__main__":
    main()
