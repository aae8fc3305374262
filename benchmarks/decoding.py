"""Speed of cached generation with and without mixing, and the bytes it keeps.

    python benchmarks/decoding.py [--device cpu] [--preset small] [--seconds 90] [--out FOLDER]

Every mixing takes its turn in each round: greedy, one token at a time, at the start of the context and near its end.
Parity first: the cached logits must equal those of one uncached pass. The ratio to "none" is the median of the rounds'
ratios. Limit: 0.95 at batch 1 and 64. State bytes are those of the tensors in the cache, beside what `waveletgpt info`
says. `--static` also times `generate` with a static cache, compiled, from 16 tokens to the end of the context.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measuring import Report, demand_parity, ratio, rounds
from transformers import CompileConfig, DynamicCache

from waveletgpt import WaveletGPTConfig, WaveletGPTForCausalLM
from waveletgpt.model.cost import decoding_state_bytes
from waveletgpt.training.recipe import PRESETS

MIXINGS = {
    "none": {"mixing": "none"},
    "fixed, windows 2 and 4": {"mixing": "fixed", "max_window": 4},
    "fixed, windows 2 ... context": {"mixing": "fixed", "max_window": None},
    "learnable, windows 2 and 4": {"mixing": "learnable", "max_window": 4},
    "learnable, windows 2 ... context": {"mixing": "learnable", "max_window": None},
    "ema": {"mixing": "ema"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--tokens", type=int, default=32, help="generated in each turn")
    parser.add_argument("--seconds", type=float, default=90, help="about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--static", action="store_true", help="also generate() with a static cache")
    parser.add_argument("--out", type=Path, help="folder for results (JSON)")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    report = Report("decoding", options.out, device=options.device, preset=options.preset, threads=options.threads)
    models = {name: build(settings, options.preset, options.device) for name, settings in MIXINGS.items()}
    with torch.inference_mode():
        for name, model in models.items():
            check(name, model)
        for batch in options.batch_sizes:
            speeds(report, models, batch, options.tokens, options.seconds / len(options.batch_sizes))
        states(report, models, options.tokens)
    if options.static:
        static(report, models, options.batch_sizes, options.device)


def build(settings: dict[str, Any], preset: str, device: str) -> Any:
    config = WaveletGPTConfig(vocab_size=256, **{**PRESETS[preset], **settings})
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return WaveletGPTForCausalLM(config).to(device, dtype).eval()


def check(name: str, model: Any) -> None:
    """Cached logits equal those of one pass; in float32, for a rounding of bfloat16 grows over the blocks."""
    model = model.float()
    ids = torch.randint(256, (2, min(96, model.config.n_positions)), device=model.device)
    cache = DynamicCache(config=model.config)
    parts = [ids[:, :64], *ids[:, 64:].split(1, dim=1)]
    logits = torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)
    demand_parity(f"cached decoding with {name}", logits, model(ids, use_cache=False).logits, 1e-3)
    if model.device.type == "cuda":
        model.bfloat16()


def prefill(model: Any, batch: int, length: int) -> tuple[Any, torch.Tensor]:
    ids = torch.randint(256, (batch, length), device=model.device)
    cache = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, logits.argmax(-1)


def decode(model: Any, cache: Any, ids: torch.Tensor, tokens: int) -> float:
    """Seconds for so many tokens."""
    _wait(model)
    start = time.perf_counter()
    for _ in range(tokens):
        ids = model(ids, past_key_values=cache, use_cache=True).logits.argmax(-1)
    _wait(model)
    return time.perf_counter() - start


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def speeds(report: Report, models: dict[str, Any], batch: int, tokens: int, seconds: float) -> None:
    context = next(iter(models.values())).config.n_positions
    places = {"start": min(16, context - tokens), "end": context - tokens - 1}
    times: dict[str, dict[str, list[float]]] = {name: {place: [] for place in places} for name in models}
    for i in rounds(seconds):
        names = list(models)[i % len(models) :] + list(models)[: i % len(models)]
        for name in names:
            for place, length in places.items():
                cache, ids = prefill(models[name], batch, length)
                times[name][place].append(decode(models[name], cache, ids, tokens))
    rows = []
    for name, here in times.items():
        row: list[object] = [name]
        for place in places:
            rate = batch * tokens / statistics.median(here[place])
            row += [f"{rate:,.0f}", round(ratio(times["none"][place], here[place]), 3)]
        rows.append(row)
    columns = ["mixing", "tokens/s, start of the context", "x none", "tokens/s, end of the context", "x none"]
    note = f"{len(times['none']['start'])} rounds; context {context}. Limit: 0.95."
    report.table(f"batch {batch}", columns, rows, note)


def states(report: Report, models: dict[str, Any], tokens: int) -> None:
    rows = []
    for name, model in models.items():
        context = model.config.n_positions
        cache, ids = prefill(model, 1, context - tokens - 1)
        decode(model, cache, ids, tokens)
        mixing = keys_values = 0
        for layer in cache.layers:
            mixing += sum(state.last().nbytes for state in getattr(layer, "states", {}).values())
            keys_values += layer.keys.nbytes + layer.values.nbytes
        said = decoding_state_bytes(model.config, model.dtype.itemsize)
        rows.append([name, f"{mixing:,}", f"{said['mixing']:,}", f"{keys_values:,}", f"{said['keys_values']:,}"])
    columns = ["mixing", "bytes of mixing states", "said", "bytes of keys and values", "said, at the full context"]
    report.table("state of one sequence near the end of the context", columns, rows)


def static(report: Report, models: dict[str, Any], batch_sizes: list[int], device: str) -> None:
    torch._dynamo.config.recompile_limit = 64  # all models share the code that is compiled
    compilation = CompileConfig()
    if device == "cpu":
        compilation._compile_all_devices = True  # without it `generate` compiles on GPUs only
        compilation.mode = "default"  # the other one is CUDA graphs
    rows = []
    for batch in batch_sizes:
        prompt = torch.randint(256, (batch, 16), device=device)
        tokens = next(iter(models.values())).config.n_positions - prompt.shape[1]

        def seconds(model: Any, prompt: torch.Tensor = prompt, tokens: int = tokens) -> float:
            _wait(model)
            start = time.perf_counter()
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                cache_implementation="static",
                compile_config=compilation,
                pad_token_id=0,
            )
            _wait(model)
            return time.perf_counter() - start

        for model in models.values():
            seconds(model)  # compiles
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(9):
            for name, model in models.items():
                times[name].append(seconds(model))
        for name, here in times.items():
            rate = batch * tokens / statistics.median(here)
            rows.append([name, batch, f"{rate:,.0f}", round(ratio(times["none"], here), 3)])
    report.table("generate() with a static cache, compiled", ["mixing", "batch", "tokens/s", "x none"], rows)


if __name__ == "__main__":
    main()
