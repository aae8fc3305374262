"""Speed of the operators on a CPU, beside what bounds it: a copy of the same bytes.

    python benchmarks/operator_cpu.py [--seconds 90] [--threads 1]

For every shape each way to compute the same thing takes its turn in each round, so that a busy machine slows all of
them; the medians over the rounds are printed, in microseconds, and how many copies that is. With one thread these are
of processor time, which other programs lengthen less. No speed is printed before results and gradients agree with the
definition (`reference`, which applies F.conv1d to the coordinates of each window; `conv1d` pads all to the longest).

Shapes: B batch, T tokens, C mixed coordinates (half of the embedding: a view, as in the model), S tokens of state.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from waveletgpt.ops import ema_mix, wavelet_mix

# B, T, C: the presets and the smallest and largest shapes that the operator was built for.
SHAPES = [(1, 1, 64), (1, 256, 64), (16, 512, 16), (16, 256, 64), (8, 512, 64), (16, 1024, 384)]
COLUMNS = ("forward", "backward")


@dataclass
class Way:
    """One way to compute an operator: `run` takes `inputs` (the first is x) and gives y."""

    name: str
    run: Callable[..., Tensor]
    inputs: list[Tensor]


def dyadic_windows(tokens: int, coordinates: int) -> list[int]:
    levels = max(1, (tokens - 1).bit_length())
    return [2 ** (1 + c * levels // coordinates) for c in range(coordinates)]


def by_cumsum(x: Tensor, windows: list[int]) -> Tensor:
    sums = F.pad(x.cumsum(1), (0, 0, max(windows), 0))
    parts = []
    for w in sorted(set(windows)):
        first, end = windows.index(w), windows.index(w) + windows.count(w)
        late, early = sums[:, max(windows) :, first:end], sums[:, max(windows) - w : -w, first:end]
        parts.append((late - early) / w)
    return torch.cat(parts, 2)


def by_fft(x: Tensor, kernels: Tensor) -> Tensor:
    length = 1 << (x.shape[1] + kernels.shape[1] - 2).bit_length()
    spectrum = torch.fft.rfft(x.transpose(1, 2), length) * torch.fft.rfft(kernels, length)
    return torch.fft.irfft(spectrum, length)[..., : x.shape[1]].transpose(1, 2)


def by_conv1d(x: Tensor, kernels: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (kernels.shape[1] - 1, 0))
    return F.conv1d(padded, kernels.flip(1).unsqueeze(1), groups=len(kernels)).transpose(1, 2)


def ways(operator: str, shape: tuple[int, int, int]) -> list[Way]:
    batch, tokens, coordinates = shape
    x = torch.randn(batch, tokens, 2 * coordinates)[..., :coordinates].requires_grad_()
    windows = dyadic_windows(tokens, coordinates)
    longest = max(windows)
    copy = Way("copy", lambda x: x.clone(memory_format=torch.contiguous_format), [x])
    if operator == "ema":
        decay = torch.linspace(0.01, 0.99, coordinates)
        return [
            copy,
            Way("torch", lambda x: ema_mix(x, decay), [x]),
            Way("reference", lambda x: ema_mix(x, decay, backend="reference"), [x]),
        ]
    if operator == "mean":
        kernels = torch.stack([F.pad(torch.full((w,), 1 / w), (0, longest - w)) for w in windows])
        return [
            copy,
            Way("torch", lambda x: wavelet_mix(x, windows), [x]),
            Way("reference", lambda x: wavelet_mix(x, windows, backend="reference"), [x]),
            Way("cumsum", lambda x: by_cumsum(x, windows), [x]),
            Way("fft", lambda x: by_fft(x, kernels), [x]),
            Way("conv1d", lambda x: by_conv1d(x, kernels), [x]),
        ]
    groups = [torch.randn(windows.count(w), w) / w for w in sorted(set(windows))]
    kernels = torch.cat([F.pad(group, (0, longest - group.shape[1])) for group in groups]).requires_grad_()
    groups = [group.requires_grad_() for group in groups]
    return [
        copy,
        Way("torch", lambda x, *k: wavelet_mix(x, windows, k), [x, *groups]),
        Way("reference", lambda x, *k: wavelet_mix(x, windows, k, backend="reference"), [x, *groups]),
        Way("fft", by_fft, [x, kernels]),
        Way("conv1d", by_conv1d, [x, kernels]),
    ]


def check(candidates: list[Way], grad: Tensor) -> None:
    """Same result and same gradient of x as the definition; sums of thousands in float32 differ by rounding."""
    reference = next(way for way in candidates if way.name == "reference")
    expected = reference.run(*reference.inputs)
    (expected_grad,) = torch.autograd.grad(expected, reference.inputs[:1], grad)
    for way in candidates:
        if way.name in ("copy", "reference"):
            continue
        tolerance = 1e-5 if way.name == "torch" else 1e-3
        y = way.run(*way.inputs)
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        (got,) = torch.autograd.grad(y, way.inputs[:1], grad)
        torch.testing.assert_close(got, expected_grad, rtol=tolerance, atol=tolerance)


def measure(candidates: list[Way], grad: Tensor, seconds: float) -> dict[str, tuple[float, float]]:
    """Median microseconds of forward and backward, over as many rounds as fit in the time, at least one."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    samples: dict[str, tuple[list[float], list[float]]] = {way.name: ([], []) for way in candidates}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 1 or (time.perf_counter() < end and rounds < 500):
        for way in candidates:
            start = clock()
            y = way.run(*way.inputs)
            middle = clock()
            torch.autograd.grad(y, way.inputs, grad)
            samples[way.name][0].append(middle - start)
            samples[way.name][1].append(clock() - middle)
            del y
        rounds += 1
    return {name: (statistics.median(f) * 1e6, statistics.median(b) * 1e6) for name, (f, b) in samples.items()}


def measure_decoding(seconds: float) -> None:
    """One token after a full window, for a batch of 1: the limit is a copy of the state."""
    coordinates, longest = 64, 256
    windows = dyadic_windows(longest, coordinates)
    x, state = torch.randn(1, 1, coordinates), torch.randn(1, longest - 1, coordinates)
    kernels = [torch.randn(windows.count(w), w) / w for w in sorted(set(windows))]
    decay = torch.linspace(0.01, 0.99, coordinates)
    runs: dict[str, Callable[..., Tensor]] = {
        "mean": lambda **k: wavelet_mix(x, windows, state=state, **k),
        "learned": lambda **k: wavelet_mix(x, windows, kernels, state=state, **k),
        "ema": lambda **k: ema_mix(x, decay, state=state[:, -1], **k),
    }
    for run in runs.values():
        torch.testing.assert_close(run(), run(backend="reference"), rtol=1e-5, atol=1e-5)
    timed = {**runs, "reference mean": lambda: runs["mean"](backend="reference"), "copy of the state": state.clone}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    samples: dict[str, list[float]] = {name: [] for name in timed}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not samples["mean"]:
        for name, run in timed.items():
            start = clock()
            run()
            samples[name].append(clock() - start)
    print(f"\ndecoding, 1 x 1 x {coordinates} after {longest - 1}:")
    print("  " + ", ".join(f"{name} {statistics.median(times) * 1e6:.0f} us" for name, times in samples.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="about; every way runs once in any case")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    # glibc hands freed memory back to the system, and page faults drown everything else, until it has seen a large
    # block freed; a training process has.
    del_me = torch.zeros(31 << 18)
    del del_me
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {options.threads} thread(s)")
    print("microseconds, median (times a copy of the same bytes)")
    operators = ("mean", "learned", "ema")
    each = options.seconds / (len(SHAPES) * len(operators) + 1)
    for shape in SHAPES:
        batch, tokens, coordinates = shape
        print(f"\n{batch} x {tokens} x {coordinates}, windows 2 ... {max(dyadic_windows(tokens, coordinates))}:")
        for operator in operators:
            candidates = ways(operator, shape)
            grad = torch.randn(shape)
            check(candidates, grad)
            medians = measure(candidates, grad, each)
            limit = medians["copy"][0]  # the gradient is as many bytes; that of a copy is free
            for i, column in enumerate(COLUMNS):
                cells = (f"{name} {times[i]:.0f} ({times[i] / limit:.1f})" for name, times in medians.items())
                print(f"  {operator:8}{column:9}" + "".join(f"{cell:24}" for cell in cells).rstrip(), flush=True)
    with torch.no_grad():
        measure_decoding(each)


if __name__ == "__main__":
    main()
