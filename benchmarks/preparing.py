"""How fast text becomes tokens, and what that takes of memory and disk.

    python benchmarks/preparing.py [--megabytes 300] [--modalities bytes chars text8 bpe] [--cores 1 2] [--rounds 3]
    python benchmarks/preparing.py --against CHECKOUT      # that version beside this one, in turn

Prose of made-up words in one file, with digits, accents and dashes as English has them. Each preparation is a process
with a cache of its own, held to so many cores; its tokens must be the same in every way. Medians of the rounds; MB/s is
of wall time, from the file to the store, its fingerprint included; "cpu" is processor time, which other programs on the
machine lengthen less; memory is that at the peak beyond the imports (on Linux); disk is the largest sum of the sizes of
all files in the cache, looked at every 20 ms, over the size of the text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import Report

HERE = Path(__file__).resolve().parents[1]
CHILD = """
import json, os, sys, time
cores, modality, data, cache = int(sys.argv[1]), *sys.argv[2:]
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
os.environ["RAYON_NUM_THREADS"] = str(cores)
os.cpu_count = lambda: cores  # what versions before this one go by
import transformers, tokenizers
from waveletgpt.data import DataSettings, prepare
def peak():  # in kB, since the last time; what a process has at its start is in getrusage's
    with open("/proc/self/status") as file:
        found = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return found
peak()
before = peak()
wall, cpu = time.perf_counter(), time.process_time()
store = prepare(data, modality, DataSettings(cache_dir=cache), progress=False)
figures = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "store": str(store.path)}
figures["memory"] = (peak() - before) / 1024
print(json.dumps(figures))
"""


def write_prose(path: Path, size: int) -> None:
    """A file of `size` bytes or somewhat more."""
    choose = random.Random(0)
    words = ["".join(choose.choices("etaoinshrdlucmfwypvbgkjqxz", k=choose.randint(1, 9))) for _ in range(20_000)]
    words[100:150] = [str(choose.randint(1, 2030)) for _ in range(50)]
    words[200:230] = ["café", "naïve", "—", "“so”", "it’s", "Müller"] * 5
    weights = [1 / (rank + 10) for rank in range(len(words))]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            for _ in range(200):
                file.write(" ".join(choose.choices(words, weights, k=15)).capitalize() + choose.choice((". ", ".\n")))


def prepared(checkout: Path, cores: int, modality: str, data: Path, folder: str) -> dict[str, Any]:
    """The figures of one preparation, and what tells its tokens from others."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(cores), modality, str(data.resolve()), cache],
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"},
            cwd=cache, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        disk = 0
        while process.poll() is None:
            disk = max(disk, on_disk(cache))
            time.sleep(0.02)
        if process.returncode:
            sys.exit(f"preparing as {modality} failed in {checkout}")
        assert process.stdout is not None
        figures: dict[str, Any] = json.loads(process.stdout.read())
        digest = hashlib.sha256()
        for file in sorted(Path(figures["store"]).glob("tokens-*.bin")):
            digest.update(file.read_bytes())
    return {**figures, "disk": disk / data.stat().st_size, "tokens": digest.hexdigest()}


def on_disk(folder: str) -> int:
    """Bytes of all files below a folder, which another process writes and deletes."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:  # gone by now
                continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--modalities", nargs="+", default=["bytes", "chars", "text8", "bpe"])
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--text", type=Path, help="a file of one's own instead of made-up prose")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--folder", type=Path, help="where the text and the caches lie (default: a temporary folder)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    ways = [
        (name, checkout, cores)
        for cores in arguments.cores
        for name, checkout in (("before", arguments.against), ("now", HERE))
        if checkout
    ]
    report = Report("preparing", arguments.out, megabytes=arguments.megabytes, rounds=arguments.rounds)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        data = arguments.text or Path(folder) / "prose.txt"
        if not arguments.text:
            write_prose(data, arguments.megabytes * 10**6)
        megabytes = data.stat().st_size / 1e6
        for modality in arguments.modalities:
            rounds = [
                [prepared(checkout.resolve(), cores, modality, data, folder) for _, checkout, cores in ways]
                for _ in range(arguments.rounds)
            ]
            if len({figures["tokens"] for turn in rounds for figures in turn}) > 1:
                sys.exit(f"the tokens of {modality} are not the same in every way: no speed is worth printing")
            rows = []
            for (name, _, cores), figures in zip(ways, zip(*rounds, strict=True), strict=True):
                wall, cpu, memory = (statistics.median(f[what] for f in figures) for what in ("wall", "cpu", "memory"))
                disk = max(f["disk"] for f in figures)
                rows.append([name, cores, megabytes / wall, megabytes / cpu, f"{memory:.0f}", f"{disk:.2f}"])
            columns = ["version", "cores", "MB/s", "MB/s of cpu", "memory, MB", "disk, corpora"]
            report.table(f"{modality}, {megabytes:.0f} MB", columns, rows)


if __name__ == "__main__":
    main()
