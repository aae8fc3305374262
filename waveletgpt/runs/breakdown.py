"""Where a language model's held-out loss comes from: kinds of tokens, positions in the context, how far it attends.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from waveletgpt.runs.records import Breakdown, LossPart, NearAttention, SourceLoss

NEAR = 2
"""Attention to the token itself and to the tokens up to so many before it counts as near."""


def seen_pairs(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Which targets complete a pair of tokens (input, target) that came before in the same row: (B, T) -> (B, T) bool.

    These are what a model may copy from its context; Arora et al. 2023 (arXiv 2312.04927) call them associative recall
    hits and find in them most of the difference between architectures.
    """
    pairs = inputs.long() * (int(targets.max()) + 1) + targets
    # Of each pair the first in order of time has not been seen; a stable sort keeps that order among equals.
    ordered, places = pairs.sort(dim=-1, stable=True)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.empty_like(again).scatter_(-1, places, again)


def position_bins(context: int) -> list[tuple[int, int]]:
    """(first, last) of log-spaced bins of the number of tokens that a prediction has seen: 1, 2, 3-4, 5-8, ..."""
    bins, last = [(1, 1)], 1
    while last < context:
        bins.append((last + 1, min(2 * last, context)))
        last = bins[-1][1]
    return bins


@torch.inference_mode()
def break_down(model: Any, batches: Iterable[dict[str, torch.Tensor]], attention_windows: int = 4) -> Breakdown:
    """Loss by kind of token and by position, and the share of attention within two tokens.

    Args:
        model: a causal language model, in evaluation mode and on its device.
        batches: of `input_ids` and `shift_labels`, all (B, T) with one T, as of `FixedWindows`, and `position_ids`
            where documents are kept apart.
        attention_windows: of how many rows, the first, attention is looked at. It takes their attention weights,
            (heads, T, T) for each block.

    Returns:
        pairs: {"seen", "new"} -> {"nll", "tokens"}, see `seen_pairs`. positions: [{"first", "last", "nll", "tokens"}],
        see `position_bins`. near_attention: {"share", "by_block", "windows"}, see `near_attention`. A kind without
        tokens has nll None.
    """
    sums: dict[str, torch.Tensor] = {}
    first: list[dict[str, torch.Tensor]] = []
    for batch in batches:
        given = {name: value.to(model.device) for name, value in batch.items() if name != "shift_labels"}
        inputs, targets = given["input_ids"], batch["shift_labels"].to(model.device)
        logits = model(**given, use_cache=False).logits.float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").cpu().double()
        seen = seen_pairs(inputs, targets).cpu()
        here = {"nll": nll.sum(0), "seen": (nll * seen).sum(), "tokens": seen.sum(), "rows": torch.tensor(len(inputs))}
        sums = {name: value + sums.get(name, 0) for name, value in here.items()}
        if sum(len(rows["input_ids"]) for rows in first) < attention_windows:
            first.append(given)
    context, rows, known = len(sums["nll"]), int(sums["rows"]), int(sums["tokens"])
    whole = float(sums["nll"].sum())

    def entry(total: float, tokens: int) -> LossPart:
        return {"nll": total / tokens if tokens else None, "tokens": tokens}

    return {
        "pairs": {
            "seen": entry(float(sums["seen"]), known),
            "new": entry(whole - float(sums["seen"]), context * rows - known),
        },
        "positions": [
            {"first": a, "last": b, **entry(float(sums["nll"][a - 1 : b].sum()), (b - a + 1) * rows)}
            for a, b in position_bins(context)
        ],
        "near_attention": near_attention(
            model, **{name: torch.cat([rows[name] for rows in first])[:attention_windows] for name in first[0]}
        ),
    }


@torch.inference_mode()
def near_attention(model: Any, input_ids: torch.Tensor, **told: torch.Tensor) -> NearAttention | None:
    """Share of the attention that goes to the token itself and the two before it, by block and as a mean over blocks.

    Mean over heads, rows of `input_ids` (B, T) and the later half of the tokens, which have enough to choose from. None
    for a model that does not give its attention weights.
    """
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")  # the others do not form the weights
        blocks = model(input_ids=input_ids, use_cache=False, output_attentions=True, **told).attentions
    finally:
        model.set_attn_implementation(before)
    if not blocks or blocks[0] is None:
        return None
    T = input_ids.shape[1]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    near = ((distance >= 0) & (distance <= NEAR))[T // 2 :].to(input_ids.device)
    shares = [float((weights[..., T // 2 :, :].float() * near).sum(-1).mean()) for weights in blocks]
    return {"share": sum(shares) / len(shares), "by_block": [*shares], "windows": len(input_ids)}


class UnknownToken(ValueError):
    """A token that the model has no embedding for."""


@torch.inference_mode()
def mean_loss(model: Any, data: Dataset, batch_size: int) -> float:
    """Nats per token over windows of one length. Raises UnknownToken for those beyond the vocabulary."""
    total, count = 0.0, 0
    for batch in DataLoader(data, batch_size=batch_size):
        if max(int(batch[name].max()) for name in ("input_ids", "shift_labels")) >= model.config.vocab_size:
            raise UnknownToken
        batch = {name: value.to(model.device) for name, value in batch.items()}
        total += float(model(**batch, labels=batch["shift_labels"], use_cache=False).loss) * len(batch["input_ids"])
        count += len(batch["input_ids"])
    return total / count


def by_source(model: Any, sources: Mapping[str, Any], batch_size: int) -> dict[str, SourceLoss]:
    """Loss on each source of a mixture: its windows -> {"nll", "windows"}. UnknownToken names the source."""
    found: dict[str, SourceLoss] = {}
    for name, data in sources.items():
        try:
            found[name] = {"nll": mean_loss(model, data, batch_size), "windows": len(data)}
        except UnknownToken:
            raise UnknownToken(name) from None
    return found
