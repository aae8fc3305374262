"""Speed of the operators on a GPU, beside the measured copy bandwidth for the bytes they must move.

    python benchmarks/operator_gpu.py [--seconds 100] [--out FOLDER]

Parity first: results and gradients must agree with the definition, computed in float64, before any speed is printed.
Then, in bfloat16 at (32, 1024, 384) and (8, 4096, 2048), every way takes its turn in each round. Limits: means at 70 %
of the copy bandwidth, forward and backward; learned kernels 10 times faster than F.conv1d up to 512 taps, and at most
3 times as long as the mean over a window of as many taps up to 64; packed documents 1.05 times as long as none.

Peers: F.conv1d with groups, a cumulative sum, FFT convolution, and the short convolutions of causal-conv1d and
flash-linear-attention where they are installed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from measuring import Report, Stopwatch, microseconds, ratio
from operators import Way, check, copy, dyadic_windows, learned_ways, mean_ways, measure, signal

from waveletgpt.ops import available_backends, reach_of, unavailable_backends, wavelet_mix

SHAPES = [(32, 1024, 384), (8, 4096, 2048)]
TAPS = [2, 4, 8, 16, 32, 64, 128, 256, 512]
Times = dict[str, tuple[list[float], list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=100, help="about; every way runs once in any case")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the script")
    parser.add_argument("--tiny", action="store_true", help="to try the script: small shapes, few taps")
    parser.add_argument("--out", type=Path, help="folder for results (JSON)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device; --device cpu --tiny tries the script without one")
    torch.manual_seed(0)
    # Some convolutions would round float32 to ten bits.
    torch.backends.cudnn.allow_tf32 = False
    report = Report("operator_gpu", options.out, device=options.device)
    for name, reason in unavailable_backends().items():
        print(f"without {name}: {reason}")
    fastest = "triton" if options.device == "cuda" else "cpp"
    backends = [name for name in (fastest, "torch") if name in available_backends()]
    shapes, taps = (SHAPES, TAPS) if not options.tiny else ([(2, 64, 32)], [2, 16])
    parity(report, options.device, backends)
    stopwatch = Stopwatch(options.device)
    each = options.seconds / len(shapes) / (4 + len(taps))
    for shape in shapes:
        means(report, shape, backends, stopwatch, each)
    for shape in shapes:
        packed(report, shape, backends, stopwatch, 2 * each)
    for shape in shapes:
        learned(report, shape, taps, backends, stopwatch, each)


def parity(report: Report, device: str, backends: list[str]) -> None:
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((2, 1000, 96), (3, 63, 40)):
            start = time.perf_counter()
            x, grad = signal(shape, device, dtype), torch.randn(shape, device=device).to(dtype)
            for longest in (4, 4096):
                windows = dyadic_windows(longest, shape[2])
                ways = mean_ways(x, windows, [*backends, "reference"], peers=False)
                check(ways[:-1], ways[-1], grad, f"mean 2 ... {longest} at {shape} in {dtype}")
            for count in (3, 17, 200):
                ways = learned_ways(x, [count] * shape[2], [*backends, "reference"], peers=False)
                check(ways[:-1], ways[-1], grad, f"{count} taps at {shape} in {dtype}")
            rows.append([str(dtype), " x ".join(map(str, shape)), f"{time.perf_counter() - start:.1f}"])
    report.table("parity holds", ["type", "shape", "seconds, compiling included"], rows)


def means(
    report: Report, shape: tuple[int, int, int], backends: list[str], stopwatch: Stopwatch, seconds: float
) -> None:
    """Share of the copy bandwidth: a copy's time over ours."""
    device = "cuda" if stopwatch.cuda else "cpu"
    x, grad = signal(shape, device, torch.bfloat16), torch.randn(shape, device=device).bfloat16()
    rows: list[list[object]] = []
    moved = 2 * x.numel() * x.element_size()
    names: list[str] = []
    for longest in (4, shape[1]):
        ways = mean_ways(x, dyadic_windows(longest, shape[2]), [*backends, "reference"])
        check_large(ways, grad, f"mean 2 ... {longest} at {shape}")
        ways = [copy(x), *(way for way in ways if way.name != "reference")]
        names = names or [way.name for way in ways[1:]]
        times = measure(ways, grad, stopwatch, seconds)
        limit = times["copy"][0]
        bandwidth = moved / statistics.median(limit) / 1e9
        for i, direction in enumerate(("forward", "backward")):
            share = statistics.median(c / t for c, t in zip(limit, times[backends[0]][i], strict=True))
            row: list[object] = [
                f"2 ... {longest}",
                direction,
                microseconds(statistics.median(limit)),
                f"{bandwidth:.0f}",
            ]
            row += [microseconds(statistics.median(times[name][i])) if name in times else "" for name in names]
            rows.append([*row, f"{share:.0%}"])
    title = f"means, {' x '.join(map(str, shape))}, bfloat16: microseconds"
    columns = ["windows", "", "copy", "copy, GB/s", *names, f"{backends[0]}: share of the copy bandwidth"]
    report.table(title, columns, rows, "Limit: 70 %.")


def packed(
    report: Report, shape: tuple[int, int, int], backends: list[str], stopwatch: Stopwatch, seconds: float
) -> None:
    """Documents of 200 tokens kept apart, beside one sequence."""
    device = "cuda" if stopwatch.cuda else "cpu"
    x, grad = signal(shape, device, torch.bfloat16), torch.randn(shape, device=device).bfloat16()
    reach = reach_of(shape[1], positions=torch.arange(shape[1], device=device)[None] % 200)
    rows: list[list[object]] = []
    for label, windows, learned in (
        ("means, 2 and 4", dyadic_windows(4, shape[2]), False),
        (f"means, 2 ... {shape[1]}", dyadic_windows(shape[1], shape[2]), False),
        ("4 taps", [4] * shape[2], True),
    ):
        taps = [torch.randn(shape[2], 4, device=device).requires_grad_()] if learned else []
        ways = [
            Way(
                f"{backend}{kind}",
                lambda x, *k, b=backend, w=windows, r=within: wavelet_mix(x, w, k or None, reach=r, backend=b),
                [x, *taps],
            )
            for backend in [*backends, "reference"]
            for kind, within in (("", None), (", packed", reach))
        ]
        apart = [way for way in ways if way.name.endswith("packed")]
        # The definition is checked in the first sequence alone, for which a row of reach serves.
        check(apart[:-1], apart[-1], grad, f"{label} packed at {shape}")
        times = measure([way for way in ways if not way.name.startswith("reference")], grad, stopwatch, seconds / 3)
        for backend in backends:
            whole, parts = times[backend], times[f"{backend}, packed"]
            row = [microseconds(statistics.median(t)) for t in (*whole, *parts)]
            rows.append([label, backend, *row, *(f"{ratio(parts[i], whole[i]):.2f}" for i in range(2))])
    columns = ["", "backend", "forward", "backward", "packed: forward", "backward", "ratio: forward", "backward"]
    title = f"packed documents of 200 tokens, {' x '.join(map(str, shape))}, bfloat16: microseconds"
    report.table(title, columns, rows, "Limit: 1.05.")


def learned(
    report: Report,
    shape: tuple[int, int, int],
    all_taps: list[int],
    backends: list[str],
    stopwatch: Stopwatch,
    seconds: float,
) -> None:
    device = "cuda" if stopwatch.cuda else "cpu"
    x, grad = signal(shape, device, torch.bfloat16), torch.randn(shape, device=device).bfloat16()
    rows: list[list[object]] = []
    names: list[str] = []
    try:
        for taps in all_taps:
            windows = [taps] * shape[2]
            ways = learned_ways(x, windows, [*backends, "reference"])
            check_large(ways, grad, f"{taps} taps at {shape}")
            mean = Way("mean", mean_ways(x, windows, backends[:1], peers=False)[0].run, [x])
            ways = [way for way in ways if way.name != "reference"]
            times = measure([*ways, mean], grad, stopwatch, seconds)
            # Short convolutions have a column of their own, empty where they do not go.
            names = names or [way.name for way in ways]
            mine, theirs = times[backends[0]], times["conv1d"]
            row: list[object] = [taps]
            for name in names:
                row.append(" + ".join(microseconds(statistics.median(t)) for t in times[name]) if name in times else "")
            row += [round(ratio(theirs[i], mine[i]), 1) for i in range(2)]
            rows.append([*row, *(round(ratio(mine[i], times["mean"][i]), 1) for i in range(2))])
    finally:  # what there is, if time runs out
        columns = ["taps", *names, "conv1d / ours: forward", "backward", "ours / mean: forward", "backward"]
        title = f"learned kernels, {' x '.join(map(str, shape))}, bfloat16: microseconds, forward + backward"
        report.table(title, columns, rows, "Limits: conv1d / ours 10; ours / mean 3 up to 64 taps.")


def check_large(ways: list[Way], grad: torch.Tensor, label: str) -> None:
    """Parity at full size, all ways but the definition itself."""
    reference = next(way for way in ways if way.name == "reference")
    check([way for way in ways if way is not reference], reference, grad, label)


if __name__ == "__main__":
    main()
