"""What the benchmarks share: timing ways in turn, the figures made of the times, and the tables of results.

python benchmarks/measuring.py FOLDER      # all results in a folder as one page, results.md
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]


class Stopwatch:
    """Seconds that a call takes on a device.

    On a CPU with one thread: of processor time, which other programs lengthen less. On a GPU: between two events, with
    the device kept busy before the first, so that neither the launch nor anything left in its caches counts.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.filler = torch.empty(1 << 30, dtype=torch.uint8, device=device) if self.cuda else None

    def __call__(self, run: Run) -> tuple[float, Any]:
        if self.filler is None:
            start = self.clock()
            result = run()
            return self.clock() - start, result
        for _ in range(3):  # about a millisecond: longer than Python takes to launch
            self.filler.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result


def training_step(model: Any, optimizer: torch.optim.Optimizer, inputs: Mapping[str, Any], bf16: bool) -> float:
    """Seconds of one: forward to the loss, backward, clipping, and the optimiser's."""
    device = next(x.device for x in inputs.values() if isinstance(x, torch.Tensor))
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss = model(**inputs).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(run: Run, cuda: bool) -> int:
    """Bytes that a call has allocated at its peak, above what there was before; on a CPU those of torch's tensors."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silenced_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    return max(accumulate((e["args"]["Bytes"] for e in changes), initial=0))


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Of the whole process: the profiler writes two lines there each time, whatever its level of logging."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def rounds(seconds: float, at_most: int = 500) -> Iterator[int]:
    """Counts rounds until the time is up, at least one."""
    end = time.perf_counter() + seconds
    for i in range(at_most):
        yield i
        if time.perf_counter() > end:
            return


def in_turn(ways: Mapping[str, Run], measure: Callable[[Run], tuple[float, Any]], seconds: float) -> dict[str, list]:
    """Times of every way, one of each in every round, so that a busy machine slows all of them; which one is first
    goes round too."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for i in rounds(seconds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(measure(ways[name])[0])
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The values a quarter from either end of the order."""
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power p of `values` ~ sizes^p, by least squares on the logarithms. NaN for fewer than two sizes."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    if len(x) < 2:
        return math.nan
    return statistics.linear_regression(x, y).slope


def demand_parity(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Ends the program unless `got` equals `want` up to `tolerance` of its largest value."""
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    if not error <= tolerance:
        sys.exit(f"{name} is off by {error:.2g} of the largest value: no speed is worth printing")


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


class Report:
    """Tables, printed as they come and kept in FOLDER/NAME.json (if a folder is given)."""

    def __init__(self, name: str, folder: Path | None, **settings: Any) -> None:
        from waveletgpt.runs.environment import environment

        self.path = folder / f"{name}.json" if folder else None
        where = environment()
        machine = where["gpu"] if settings.get("device") == "cuda" else where["cpu"]
        self.content: dict[str, Any] = {
            "name": name,
            "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "machine": machine,
            "settings": settings,
            "environment": where,
            "tables": [],
        }
        heading = f"torch {where['torch']}, {machine}, {where['threads']} CPU thread(s), {where['date'][:10]}"
        print(f"# {name}\n\n{heading}, revision {where['git_revision']}", flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        table = {"title": title, "columns": list(columns), "rows": [list(row) for row in rows], "note": note}
        self.content["tables"].append(table)
        print(f"\n{markdown(table)}", flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(".tmp")
            draft.write_text(json.dumps(self.content, indent=1, default=str))
            os.replace(draft, self.path)


def markdown(table: Mapping[str, Any]) -> str:
    lines = [f"**{table['title']}**", ""] if table["title"] else []
    for row in (table["columns"], ["---"] * len(table["columns"]), *table["rows"]):
        lines.append("| " + " | ".join(_cell(value) for value in row) + " |")
    return "\n".join([*lines, *(["", table["note"]] if table["note"] else [])])


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def page(folder: Path) -> str:
    """All results in a folder, as Markdown."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        where = content["environment"]
        about = f"{content['machine']}, torch {where['torch']}, {where['date'][:10]}, revision {where['git_revision']}"
        parts += [f"## {content['name']}", f"    {content['command']}", about, *map(markdown, content["tables"])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    results = Path(sys.argv[1])
    (results / "results.md").write_text(page(results))
