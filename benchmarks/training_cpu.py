"""What mixing costs in training, and how the baseline's speed compares with nanoGPT's.

    python benchmarks/training_cpu.py [--nanogpt CLONE] [--preset paper] [--rounds 9]

Table 1: one training step (forward, backward, clipping, AdamW) of every mixing, interleaved round by round on the same
batch; the ratio to "none" is the median of the rounds' ratios, which a busy machine disturbs least. The limit for
`fixed` is 1.05.

Table 2 (with --nanogpt, a clone of github.com/karpathy/nanoGPT): tokens/s of this package's own trainer with mixing
"none" beside nanoGPT's model in nanoGPT's loop, same sizes, batch, optimiser and precision, taken in turns. The limit
is 0.95.

Refuses to print a speed before parity: `fixed` must equal the reference operator, and the two baselines must have the
same number of parameters up to nanoGPT's own options.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

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
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--steps", type=int, default=10, help="steps of each turn of table 2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    check_operator()
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {options.threads} thread(s), "
        f"preset {options.preset}, batch {options.batch_size}, float32, {options.rounds} rounds, "
        f"{time.strftime('%Y-%m-%d')}"
    )
    mixing_cost(options.preset, options.batch_size, options.rounds)
    if options.nanogpt:
        beside_nanogpt(options.nanogpt, options.preset, options.batch_size, options.rounds, options.steps)


def check_operator() -> None:
    """Parity first."""
    x, windows = torch.randn(2, 300, 64), WaveletGPTConfig(n_embd=128, n_head=8, n_positions=512).mix_windows()
    want = wavelet_mix(x.double(), windows, backend="reference")
    error = float((wavelet_mix(x, windows).double() - want).abs().max())
    if error > 1e-5:
        sys.exit(f"the fast operator is off by {error:.2g}: no speed is worth printing")


def mixing_cost(preset: str, batch_size: int, rounds: int) -> None:
    steps = {}
    for name in MIXINGS:
        mixing, _, short = name.partition(", ")
        config = WaveletGPTConfig(vocab_size=256, mixing=mixing, max_window=4 if short else None, **PRESETS[preset])
        torch.manual_seed(0)
        model = WaveletGPTForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        ids = torch.randint(256, (batch_size, config.n_positions))
        steps[name] = lambda model=model, optimizer=optimizer, ids=ids: step(model, optimizer, ids)
    for run in steps.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        names = list(steps)[i % len(steps) :] + list(steps)[: i % len(steps)]
        for name in names:
            times[name].append(steps[name]())
    print(f"\n{'mixing':<20}{'ms/step':>10}{'x none':>9}   quartiles")
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times["none"], strict=True))
        quarter = len(ratios) // 4
        note = "   limit 1.05" if name == "fixed" else ""
        print(
            f"{name:<20}{statistics.median(values) * 1e3:>10.1f}{statistics.median(ratios):>9.3f}   "
            f"{ratios[quarter]:.3f} ... {ratios[-1 - quarter]:.3f}{note}"
        )


def step(model: WaveletGPTForCausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, shift_labels=ids, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def beside_nanogpt(clone: Path, preset: str, batch_size: int, rounds: int, steps: int) -> None:
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
        )
        optimizer = theirs.configure_optimizers(0.1, 2e-3, (0.9, 0.95), "cpu")

        def their_turn() -> float:
            start = time.perf_counter()
            for _ in range(steps):
                starts = torch.randint(len(tokens) - context, (batch_size,))
                x, y = (
                    torch.stack(
                        [torch.from_numpy(tokens[i + shift : i + shift + context].astype(np.int64)) for i in starts]
                    )
                    for shift in (0, 1)
                )
                _, loss = theirs(x, y)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return steps * batch_size * context / (time.perf_counter() - start)

        def our_turn(turn: int) -> float:
            recipe = Recipe().override(
                {
                    "preset": preset,
                    "mixing": "none",
                    "max_steps": steps,
                    "batch_size": batch_size,
                    "device": "cpu",
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
            return result["tokens"] / result["seconds"]

        their_turn()
        ours, others = [], []
        for turn in range(rounds):
            ours.append(our_turn(turn))
            others.append(their_turn())
    ratio = statistics.median(a / b for a, b in zip(ours, others, strict=True))
    print(
        f"\ntokens/s, trainer with mixing none: {statistics.median(ours):,.0f}; nanoGPT's model and loop: "
        f"{statistics.median(others):,.0f}; ratio {ratio:.3f} (limit 0.95)"
    )


if __name__ == "__main__":
    main()
