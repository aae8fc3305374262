"""What a figure depends on besides its recipe: versions, hardware, revision, date."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from waveletgpt.runs.records import EnvironmentRecord


def environment() -> EnvironmentRecord:
    """Versions of the libraries, the machine, the git revision of this package, and the date (UTC)."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    from waveletgpt import __version__

    return {
        "waveletgpt": __version__,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "accelerate": metadata.version("accelerate"),
        "numpy": metadata.version("numpy"),
        "tokenizers": metadata.version("tokenizers"),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "git_revision": _revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# Dense matrix FLOPs per second by GPU, from NVIDIA's data sheets: (bf16, TF32).
_PEAKS = {
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "L4": (121e12, 60e12),
    "RTX 4090": (165e12, 83e12),
    "A10": (125e12, 62e12),
    "T4": (65e12, 8e12),
}


def peak_flops(gpu: str | None, precision: str) -> float | None:
    """Most FLOPs per second of a GPU of this name, training in "bf16" or "fp32"; None where it is not known."""
    found = next((peak for name, peak in _PEAKS.items() if gpu and re.search(rf"\b{name}\b", gpu)), None)
    return None if found is None else found[0 if precision == "bf16" else 1]


def command() -> str:
    """The command line that started this process, to be typed again."""
    return shlex.join(["waveletgpt", *sys.argv[1:]]) if sys.argv else "waveletgpt"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _revision() -> str | None:
    """Commit of the checkout this package runs from, with "+changes" if it has any; None outside a checkout."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        return (revision + ("+changes" if git("status", "--porcelain", "-uno") else "")) or None
    except (OSError, subprocess.SubprocessError):
        return None
