"""Texts longer than a model was trained on: the loss by context, as it is and with positions stretched by YaRN.

    python benchmarks/length.py RUN... [--contexts 256 512 1024 2048] [--tokens 65536] [--yarn] [--out FOLDER]

Runs are of `waveletgpt train`, `compare` or `ladder`, with Llama blocks. Told are the mean over all positions and over
those beyond the trained length, whose loss alone does not say whether far tokens are read: for that see recall.py.
`--yarn` adds each run with rotary positions stretched to each context (arXiv 2309.00071), without training.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Report
from torch.utils.data import DataLoader

from waveletgpt.data.windows import FixedWindows
from waveletgpt.model.modeling import WaveletGPTForCausalLM
from waveletgpt.runs.evaluation import load_model, load_store
from waveletgpt.runs.folder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=1 << 16, help="held-out tokens read at each context")
    parser.add_argument("--yarn", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for results (JSON)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("length", options.out, contexts=options.contexts, tokens=options.tokens)
    losses = []
    for path in options.runs:
        run = RunFolder.open(path)
        model, tokens = load_model(run), load_store(run).split("validation")
        trained = model.config.n_positions
        for how in ("as trained", "YaRN")[: 1 + options.yarn]:
            row: list[object] = [f"{run.info['arm']} seed {run.info['seed']}", how]
            far: list[object] = []
            for context in options.contexts:
                reader = stretched(model, context / trained) if how == "YaRN" else model
                nll = losses_by_position(reader, tokens, context, max(1, options.tokens // context))
                row.append(f"{nll.mean():.3f}")
                far.append(f"{nll[trained:].mean():.3f}" if context > trained else "")
            losses.append([*row, *far])
    names = [str(context) for context in options.contexts]
    report.table(
        "loss by context, nats a token",
        ["run", "positions", *names, *(f"{name}, beyond the trained" for name in names)],
        losses,
    )


def stretched(model: Any, factor: float) -> Any:
    """The model with rotary positions for texts `factor` times as long as those that it was trained on."""
    if factor <= 1:
        return model
    config = copy.deepcopy(model.config)
    theta = (config.rope_parameters or {}).get("rope_theta", 10000.0)
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": config.n_positions,
    }
    other = WaveletGPTForCausalLM(config).to(model.device).eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.inference_mode()
def losses_by_position(model: Any, tokens: np.ndarray, context: int, windows: int) -> torch.Tensor:
    """(context,) mean loss at each position, in nats."""
    total, count = torch.zeros(context, dtype=torch.float64), 0
    for batch in DataLoader(FixedWindows(tokens, context, windows), batch_size=max(1, 4096 // context)):
        logits = model(batch["input_ids"].to(model.device), use_cache=False).logits.float()
        nll = torch.nn.functional.cross_entropy(logits.mT, batch["shift_labels"].to(model.device), reduction="none")
        total += nll.sum(0).double().cpu()
        count += len(nll)
    return total / count


if __name__ == "__main__":
    main()
