"""Generating from a trained model, the same way for reports and for the `generate` command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .data import MODALITIES
from .errors import UserError


def generate_tokens(
    model: Any,
    prompt: list[int],
    *,
    tokens: int,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: bool = True,
) -> list[list[int]]:
    """Continue `prompt`, with the cache: `samples` lists of up to `tokens` new token ids.

    `temperature=0` is greedy. `stop`: end a sample at the end-of-text token. Where the context is full, generation goes
    on from its last half.

    Raises:
        UserError: settings out of range, or an empty prompt.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or samples < 1 or tokens < 1:
        raise UserError(
            f"temperature {temperature} must be >= 0, top-p {top_p} in (0, 1], top-k {top_k} >= 0, "
            f"samples {samples} and tokens {tokens} >= 1"
        )
    if not prompt:
        raise UserError("the prompt gives no token the model knows; give a longer one")
    config, device, was_training = model.config, model.device, model.training
    context, end = config.n_positions, config.eos_token_id
    choice = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    ids = torch.tensor([prompt] * samples, device=device)
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while ids.shape[1] < len(prompt) + tokens:
            seen = ids if ids.shape[1] < context else ids[:, -max(1, context // 2) :]
            new = min(context - seen.shape[1], len(prompt) + tokens - ids.shape[1])
            out = model.generate(
                seen,
                attention_mask=torch.ones_like(seen),
                max_new_tokens=new,
                eos_token_id=end if stop else None,
                pad_token_id=config.pad_token_id if config.pad_token_id is not None else 0,
                **(choice if temperature > 0 else {"do_sample": False}),
            )
            ids = torch.cat([ids, out[:, seen.shape[1] :]], dim=1)
            if stop and end is not None and bool((ids[:, len(prompt) :] == end).any(dim=1).all()):
                break
    model.train(was_training)
    rows = ids[:, len(prompt) :].tolist()
    return [row[: row.index(end)] if stop and end in row else row for row in rows]


def sample_run(model: Any, store: Any, recipe: Any, folder: Path) -> list[dict[str, Any]]:
    """The samples of a finished run: held-out excerpts continued, the same prompts for every arm.

    Returns what samples.json holds: kind, prompt, text, and for sounds and pictures the file, relative to `folder`.
    """
    modality = MODALITIES[store.modality]
    context, count = model.config.n_positions, recipe.training.samples
    tokens, record = store.split("validation"), store.meta.get("record")
    tokenizer = store.load_tokenizer()
    length = max(1, min(record // 2 if record else min(32, context // 4), len(tokens) // 2))
    rest = record - length if record else (recipe.training.sample_tokens or getattr(modality, "sample_tokens", 200))
    rows: list[dict[str, Any]] = []
    for i in range(count):
        start = i * (len(tokens) - length) // count
        if record:
            start -= start % record
        prompt = [int(t) for t in tokens[start : start + length]]
        new = generate_tokens(model, prompt, tokens=rest, temperature=0.8, seed=recipe.seed + i, stop=False)[0]
        (folder / "samples").mkdir(exist_ok=True)
        sample = modality.write_sample(prompt + new, tokenizer, folder / "samples" / str(i))
        row = {"kind": sample.kind, "prompt": "", "text": sample.text or "", "file": f"samples/{sample.path.name}"}
        if sample.kind == "text":
            row.update(prompt=tokenizer.decode(prompt), text=tokenizer.decode(new))
        else:
            row["prompt"] = f"the first {length} tokens are held-out data"
        rows.append(row)
    return rows
