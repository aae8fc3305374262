"""Recall beyond the trained length: does a model read far tokens, or only not break?

    python benchmarks/recall.py [--steps 2000] [--seeds 2] [--lr 2e-3 4e-3] [--out FOLDER]

A made task (multi-query associative recall, as in arXiv 2312.04927, with gaps): a text of noise has pairs of a key and
its value at random places, and later, at random places, some of the keys again, each followed by its value. Small
models with Llama blocks learn it on 256 tokens; then the share of values that they name is told for texts of up to
4,096 tokens, of pairs more than half a text back, with positions as trained and stretched by YaRN. Arms: mixers, and
shares of the heads' channels with rotary positions (`rope_fraction`). Every arm has the same texts and steps.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from length import stretched
from measuring import Report

from waveletgpt import WaveletGPTConfig, WaveletGPTForCausalLM

KEYS, VALUES, NOISE = 48, 48, 32  # kinds of tokens
TRAINED = 256
HAAR = {"mixing": "learnable", "mix_start": "haar", "mix_placement": "attention_input+mlp_input", "max_window": 4}
ARMS: dict[str, dict[str, Any]] = {
    "none": {"mixing": "none"},
    "none, rope_fraction 0.5": {"mixing": "none", "rope_fraction": 0.5},
    "none, rope_fraction 0": {"mixing": "none", "rope_fraction": 0.0},
    "fixed at block": {"mixing": "fixed", "max_window": 4},
    "Haar at inputs": HAAR,
    "Haar at inputs, rope_fraction 0.5": {**HAAR, "rope_fraction": 0.5},
    "Haar at inputs, rope_fraction 0": {**HAAR, "rope_fraction": 0.0},
}


def texts(count: int, length: int, pairs: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, length) tokens, and the distance from each to the pair that tells the token after it; 0 where none does.

    Places are even: a pair and a query take two tokens each. Pairs lie in the first half, or anywhere in long texts.
    """
    slots = length // 2
    noise = torch.randint(KEYS + VALUES, KEYS + VALUES + NOISE, (count, length), generator=generator)
    distance = torch.zeros(count, length, dtype=torch.long)
    for row in range(count):
        keys = torch.randperm(KEYS, generator=generator)[:pairs]
        values = KEYS + torch.randint(VALUES, (pairs,), generator=generator)
        places = torch.randperm(slots // 2, generator=generator)[:pairs]
        asked = slots // 2 + torch.randperm(slots - slots // 2, generator=generator)[:pairs]
        for key, value, first, again in zip(keys, values, places, asked, strict=True):
            for place in (first, again):
                noise[row, 2 * place], noise[row, 2 * place + 1] = key, value
            distance[row, 2 * again] = 2 * (again - first)
    return noise, distance


def train(settings: dict[str, Any], steps: int, lr: float, seed: int) -> Any:
    torch.manual_seed(seed)
    vocab = KEYS + VALUES + NOISE
    config = WaveletGPTConfig(
        architecture="llama", vocab_size=vocab, n_positions=TRAINED, n_embd=64, n_layer=2, n_head=2,
        initializer_range=1 / 8, attn_implementation="eager", **settings,
    )  # fmt: skip
    model = WaveletGPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rate = min(1.0, (step + 1) / (0.05 * steps)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        ids, distance = texts(16, TRAINED, 16, generator)
        logits = model(ids, use_cache=False).logits[:, :-1]
        asked = distance[:, :-1] > 0
        loss = torch.nn.functional.cross_entropy(logits[asked], ids[:, 1:][asked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


@torch.inference_mode()
def accuracy(model: Any, length: int, count: int, near: int, far: int) -> float:
    """Share of the values named whose pair lies more than `near` and at most `far` tokens before; chance is 1/48."""
    ids, distance = texts(count, length, 16, torch.Generator().manual_seed(1 << 20))
    right = asked = 0
    for part, ago in zip(ids.split(max(1, 4096 // length)), distance.split(max(1, 4096 // length)), strict=True):
        found = model(part, use_cache=False).logits[:, :-1].argmax(-1) == part[:, 1:]
        counted = (ago[:, :-1] > near) & (ago[:, :-1] <= far)
        right, asked = right + int(found[counted].sum()), asked + int(counted.sum())
    return right / max(asked, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, nargs="+", default=[4e-3], help="of several, each arm gets its best")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--texts", type=int, default=32, help="at each length")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for results (JSON)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("recall", options.out, steps=options.steps, lr=options.lr, seeds=options.seeds, texts=options.texts)
    rows = []
    for arm in options.arms:
        for seed in range(options.seeds):
            start = time.perf_counter()
            tried = {lr: train(ARMS[arm], options.steps, lr, seed) for lr in options.lr}
            learned = {lr: accuracy(model, TRAINED, 64, 0, TRAINED) for lr, model in tried.items()}
            lr = max(learned, key=lambda rate: learned[rate])
            for how in ("as trained", *(("YaRN",) if tried[lr].config.rotary_width else ())):
                row: list[object] = [f"{arm}, seed {seed}", f"{lr:g}", how]
                for length in options.lengths:
                    reader = stretched(tried[lr], length / TRAINED) if how == "YaRN" else tried[lr]
                    near = length // 2 if length > TRAINED else 0
                    row.append(f"{accuracy(reader, length, options.texts, near, length):.0%}")
                rows.append(row)
            print(*rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    far = [f"{n}" if n <= TRAINED else f"{n}, over {n // 2} back" for n in options.lengths]
    report.table("values recalled, by length of the text", ["arm", "lr", "positions", *far], rows)


if __name__ == "__main__":
    main()
