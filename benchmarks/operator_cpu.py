"""Speed of the operators on a CPU, beside what bounds it: a copy of the same bytes.

    python benchmarks/operator_cpu.py [--seconds 120] [--threads 1] [--out FOLDER]

For every shape each way to compute the same thing takes its turn in each round; the medians over the rounds are
printed, in microseconds, with the median ratio to a copy in brackets. No speed is printed before results and gradients
agree with the definition, computed in float64 (`reference` applies F.conv1d to the channels of each window;
`conv1d` pads all to the longest). Limits: means 3 copies forward and backward; learned kernels better than `conv1d`,
20 times at 256 taps; packed documents 1.05 times one document.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from measuring import Report, Stopwatch, in_turn, microseconds, ratio
from operators import (
    Way,
    check,
    copy,
    dyadic_windows,
    ema_ways,
    learned_ways,
    mean_ways,
    measure,
    signal,
)

from waveletgpt.ops import available_backends, ema_mix, unavailable_backends, wavelet_mix

# B, T, C: the presets and the smallest and largest shapes that the operator was built for.
SHAPES = [(1, 1, 64), (1, 256, 64), (16, 512, 16), (16, 256, 64), (8, 512, 64), (16, 1024, 384)]
TAPS = [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="about; every way runs once in any case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for results (JSON)")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    # glibc hands freed memory back to the system, and page faults drown everything else, until it has seen a large
    # block freed; a training process has.
    del_me = torch.zeros(31 << 18)
    del del_me
    report = Report("operator_cpu", options.out, threads=options.threads)
    for name, reason in unavailable_backends().items():
        print(f"without {name}: {reason}")
    backends = [name for name in ("cpp", "torch") if name in available_backends()]
    stopwatch = Stopwatch("cpu")
    tables = 4 * len(SHAPES) + len(TAPS) + 4
    each = options.seconds / tables
    for shape in SHAPES:
        rows = []
        x, grad = signal(shape, "cpu", torch.float32), torch.randn(shape)
        longest = dyadic_windows(shape[1], shape[2])
        operators: dict[str, list[Way]] = {
            f"mean 2 ... {max(longest)}": mean_ways(x, longest, [*backends, "reference"]),
            f"learned 2 ... {max(longest)}": learned_ways(x, longest, [*backends, "reference"]),
            "ema": ema_ways(x, [*backends, "reference"]),
        }
        if max(longest) > 4:
            operators = {"mean 2, 4": mean_ways(x, dyadic_windows(4, shape[2]), [*backends, "reference"]), **operators}
        for name, ways in operators.items():
            check(ways, next(way for way in ways if way.name == "reference"), grad, f"{name} at {shape}")
            rows += compare(name, [copy(x), *ways], grad, stopwatch, each)
        columns = ["", "", "copy", *backends, "reference", "cumsum", "fft", "conv1d"]
        report.table(f"{' x '.join(map(str, shape))}: microseconds (copies of the same bytes)", columns, rows)
    learned_by_taps(report, backends, stopwatch, each)
    packed(report, backends, stopwatch, each)
    with torch.no_grad():
        decoding(report, stopwatch, each)


def compare(name: str, ways: list[Way], grad: torch.Tensor, stopwatch: Stopwatch, seconds: float) -> list[list[str]]:
    times = measure(ways, grad, stopwatch, seconds)
    # The gradient is as many bytes; that of a copy is free.
    limit = times["copy"][0]
    rows = []
    for i, direction in enumerate(("forward", "backward")):
        row = [name, direction, microseconds(statistics.median(limit))]
        for way in ("cpp", "torch", "reference", "cumsum", "fft", "conv1d"):
            if way in times:
                median = microseconds(statistics.median(times[way][i]))
                row.append(f"{median} ({ratio(times[way][i], limit):.1f})")
            elif way != "cpp":
                row.append("")
        rows.append(row)
    return rows


def learned_by_taps(report: Report, backends: list[str], stopwatch: Stopwatch, seconds: float) -> None:
    """All channels with as many taps: the table beside `conv1d`."""
    shape, rows = (16, 512, 64), []
    for taps in TAPS:
        x, grad = signal(shape, "cpu", torch.float32), torch.randn(shape)
        ways = learned_ways(x, [taps] * shape[2], [*backends, "reference"])
        check(ways, next(way for way in ways if way.name == "reference"), grad, f"{taps} taps")
        ways = [way for way in ways if way.name != "reference"]
        times = measure(ways, grad, stopwatch, seconds)
        cells = [" + ".join(microseconds(statistics.median(part)) for part in times[way.name]) for way in ways]
        mine, theirs = times[backends[0]], times["conv1d"]
        together = [[f + b for f, b in zip(*both, strict=True)] for both in (theirs, mine)]
        rows.append([taps, *cells, *(round(ratio(*pair), 1) for pair in (*zip(theirs, mine, strict=True), together))])
    columns = ["taps", *backends, "fft", "conv1d", "conv1d / ours: forward", "backward", "both"]
    title = f"learned kernels, {' x '.join(map(str, shape))}: microseconds, forward + backward"
    report.table(title, columns, rows, "Limits: 1 at every length, 20 at 256 taps.")


def packed(report: Report, backends: list[str], stopwatch: Stopwatch, seconds: float) -> None:
    """Documents of 1 to 400 tokens in each row, beside rows of one document."""
    shape, rows = (16, 1024, 384), []
    x, grad = signal(shape, "cpu", torch.float32), torch.randn(shape)
    reach = torch.stack(
        [torch.cat([torch.arange(n) for n in torch.randint(1, 400, (1024,)).tolist()])[:1024] for _ in range(16)]
    )
    for label, windows in (("mean 2, 4", dyadic_windows(4, 384)), ("mean 2 ... 1024", dyadic_windows(1024, 384))):
        for backend in backends:
            both = [
                Way(name, lambda x, w=windows, b=backend, r=r: wavelet_mix(x, w, reach=r, backend=b), [x])
                for name, r in (("one", None), ("packed", reach))
            ]
            exact = Way("reference", lambda x, w=windows: wavelet_mix(x, w, reach=reach[:1], backend="reference"), [x])
            check(both[1:], exact, grad, f"{label}, packed")
            times = measure([copy(x), *both], grad, stopwatch, seconds)
            cells = [microseconds(statistics.median(part)) for part in (*times["one"], *times["packed"])]
            together = [[f + b for f, b in zip(*times[name], strict=True)] for name in ("packed", "one")]
            ratios = [ratio(*pair) for pair in (*zip(times["packed"], times["one"], strict=True), together)]
            rows.append([label, backend, *cells, *(round(value, 3) for value in ratios)])
    columns = ["", "", "one: forward", "backward", "packed: forward", "backward"]
    columns += ["packed / one: forward", "backward", "both"]
    report.table(f"packed documents, {' x '.join(map(str, shape))}: microseconds", columns, rows, "Limit: 1.05 (cpp).")


def decoding(report: Report, stopwatch: Stopwatch, seconds: float) -> None:
    """One token after a full window, for a batch of 1: the limit is a copy of the state."""
    channels, longest = 64, 256
    windows = dyadic_windows(longest, channels)
    x, state = torch.randn(1, 1, channels), torch.randn(1, longest - 1, channels)
    kernels = [torch.randn(windows.count(w), w) / w for w in sorted(set(windows))]
    decay = torch.linspace(0.01, 0.99, channels)
    runs = {
        "mean": lambda **k: wavelet_mix(x, windows, state=state, **k),
        "learned": lambda **k: wavelet_mix(x, windows, kernels, state=state, **k),
        "ema": lambda **k: ema_mix(x, decay, state=state[:, -1], **k),
    }
    for run in runs.values():
        torch.testing.assert_close(run(), run(backend="reference"), rtol=1e-5, atol=1e-5)
    ways = {**runs, "reference mean": lambda: runs["mean"](backend="reference"), "copy of the state": state.clone}
    times = in_turn(ways, stopwatch, seconds)
    rows = [[name, microseconds(statistics.median(values))] for name, values in times.items()]
    report.table(f"decoding, 1 x 1 x {channels} after {longest - 1}", ["", "microseconds"], rows)


if __name__ == "__main__":
    main()
