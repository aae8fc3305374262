"""How time and memory grow with the tokens T, the width, and the largest window, for the operator and for the model.

    python benchmarks/scaling.py [--device cpu] [--seconds 120] [--out FOLDER]

Time is that of a forward and backward pass, memory the peak above what was there before. The slope is the power p in
time ~ size^p over the sizes that were run: 1 is proportional. Sizes that would not fit in the time are left out; those
of the model stop earlier than those of the operator because attention grows with T^2.

Memory is that of torch's tensors, not of the process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from measuring import Report, Stopwatch, demand_parity, peak_memory, rounds, slope
from operators import dyadic_windows

from waveletgpt import WaveletGPTConfig, WaveletGPTForCausalLM
from waveletgpt.ops import wavelet_mix

TOKENS = [256 << i for i in range(9)]
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=120, help="about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most", type=int, default=TOKENS[-1], help="tokens of the longest sequence")
    parser.add_argument("--out", type=Path, help="folder for results (JSON)")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    # Some convolutions would round float32 to ten bits.
    torch.backends.cudnn.allow_tf32 = False
    report = Report("scaling", options.out, device=options.device, threads=options.threads)
    device, stopwatch = options.device, Stopwatch(options.device)
    gpu = device == "cuda"
    tokens = [size for size in TOKENS if size <= options.most]
    # Wide enough to keep the device busy at the first size.
    batch, width = (8, 512) if gpu else (1, 64)
    fixed_tokens = min(4096, options.most)

    def operator(kind: str, size: int, channels: int, longest: int) -> Step:
        windows = dyadic_windows(longest, channels)
        x = torch.randn(batch, size, channels, device=device, requires_grad=True)
        distinct = sorted(set(windows))
        kernels = [torch.randn(windows.count(w), w, device=device).div_(w).requires_grad_() for w in distinct]
        kernels = kernels if kind == "learned" else []
        grad = torch.randn_like(x)
        y, wanted = (wavelet_mix(x, windows, kernels or None, backend=b) for b in ("auto", "reference"))
        demand_parity(f"{kind} at {size} x {channels}, windows 2 ... {longest}", y, wanted, 1e-4)
        return lambda: torch.autograd.grad(wavelet_mix(x, windows, kernels or None), [x, *kernels], grad)

    def model(mixing: str, size: int, embedding: int, longest: int) -> Step:
        config = WaveletGPTConfig(
            vocab_size=256,
            n_embd=embedding,
            n_layer=2,
            n_head=max(1, embedding // 64),
            n_positions=size,
            max_window=longest,
            mixing=mixing,
        )
        config._attn_implementation = "sdpa"
        net = WaveletGPTForCausalLM(config).to(device)
        ids = torch.randint(256, (1, size), device=device)

        def step() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=gpu):
                loss = net(input_ids=ids, shift_labels=ids, use_cache=False).loss
            loss.backward()
            net.zero_grad(set_to_none=True)

        return step

    wide = 4096 if gpu else 1024
    curves: list[tuple[str, str, list[int], Callable[[int], Step]]] = []
    for kind in ("mean", "learned"):
        for longest in (4, 256):
            curves.append(
                (f"{kind}, windows 2 ... {longest}", "T", tokens, lambda n, k=kind, w=longest: operator(k, n, width, w))
            )
        widths = [size for size in (64, 128, 256, 512, 1024, 2048, 4096) if size <= wide]
        curves.append((f"{kind}, windows 2 ... 256", "C", widths, lambda n, k=kind: operator(k, fixed_tokens, n, 256)))
        windows = [size for size in (4, 16, 64, 256, 1024, 4096) if size <= fixed_tokens]
        curves.append((kind, "largest window", windows, lambda n, k=kind: operator(k, fixed_tokens, width, n)))
    embedding = 512 if gpu else 64
    for mixing in ("none", "fixed", "learnable"):
        curves.append((f"model, {mixing}", "T", tokens, lambda n, m=mixing: model(m, n, embedding, min(256, n))))
    for mixing in ("none", "fixed", "learnable"):
        sizes = [size for size in (64, 128, 256, 512, 1024) if size <= wide // 4]
        curves.append((f"model, {mixing}", "E", sizes, lambda n, m=mixing: model(m, 512, n, 256)))
        sizes = [2, 8, 32, 128, 512]
        if mixing != "none":
            curves.append(
                (f"model, {mixing}", "largest window", sizes, lambda n, m=mixing: model(m, 512, embedding, n))
            )
    rows, each = [], options.seconds / len(curves)
    try:
        for name, axis, sizes, make in curves:
            measured = curve(sizes, make, stopwatch, each)
            seconds = [point[1] for point in measured]
            times = ", ".join(f"{size}: {value * 1e3:.3g}" for size, value, _ in measured)
            memory = ", ".join(f"{size}: {peak / 2**20:.3g}" for size, _, peak in measured)
            taken = [(size, peak) for size, _, peak in measured if peak > 0]
            growth = slope([size for size, _ in taken], [peak for _, peak in taken])
            rows.append(
                [name, axis, times, round(slope([p[0] for p in measured], seconds), 2), memory, round(growth, 2)]
            )
    finally:  # what there is, if time runs out
        columns = ["", "against", "size: ms forward and backward", "slope", "size: MiB at the peak", "slope"]
        note = f"Operator: batch {batch}, C = {width}, T = {fixed_tokens} unless they vary, float32. Model: 2 blocks, "
        note += f"batch 1, E = {embedding}, T = 512 unless they vary, {'bfloat16' if gpu else 'float32'}."
        report.table("growth", columns, rows, note)


def curve(
    sizes: Iterable[int], make: Callable[[int], Step], stopwatch: Stopwatch, seconds: float
) -> list[tuple[int, float, int]]:
    """(size, median seconds, bytes at the peak) for as many sizes as fit in the time, at least two."""
    points: list[tuple[int, float, int]] = []
    end = time.perf_counter() + seconds
    for size in sizes:
        # The next one may take four times as long, once to warm up and once to measure.
        if len(points) > 1 and time.perf_counter() + 8 * points[-1][1] > end:
            break
        try:
            step = make(size)
            step()
            peak = peak_memory(step, stopwatch.cuda)
            share = max(0.0, end - time.perf_counter()) / 4
            times = [stopwatch(step)[0] for _ in rounds(share, at_most=15)]
        except torch.cuda.OutOfMemoryError:
            break
        points.append((size, statistics.median(times), peak))
        del step
    return points


if __name__ == "__main__":
    main()
