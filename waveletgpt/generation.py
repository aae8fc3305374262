"""Generating from a trained model, the same way for reports and for the `generate` command."""

from __future__ import annotations

from typing import Any

import torch

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

    `temperature=0` is greedy. `stop`: end a sample at the end-of-text token.

    Raises:
        UserError: settings out of range, or a prompt beyond the learned positions.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or samples < 1 or tokens < 1:
        raise UserError(
            f"temperature {temperature} must be >= 0, top-p {top_p} in (0, 1], top-k {top_k} >= 0, "
            f"samples {samples} and tokens {tokens} >= 1"
        )
    if not prompt:
        raise UserError("the prompt gives no token the model knows; give a longer one")
    config = model.config
    if config.position_embedding == "learned" and len(prompt) + tokens > config.n_positions:
        if len(prompt) >= config.n_positions:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the model's learned positions end at "
                f"{config.n_positions}; shorten it"
            )
        tokens = config.n_positions - len(prompt)
    was_training, device = model.training, model.device
    model.eval()
    ids = torch.tensor([prompt] * samples, device=device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=None if stop else tokens,
            pad_token_id=config.pad_token_id if config.pad_token_id is not None else 0,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
    model.train(was_training)
    rows = out[:, len(prompt) :].tolist()
    end = config.eos_token_id
    return [row[: row.index(end)] if stop and end in row else row for row in rows]


def sample_run(model: Any, store: Any, recipe: Any) -> list[dict[str, Any]]:
    """The samples of a finished run: held-out excerpts continued, the same prompts for every arm."""
    count, context = recipe.training.samples, model.config.n_positions
    tokens = store.split("validation")
    length = max(1, min(32, context // 4, len(tokens) // 2))
    tokenizer = store.load_tokenizer()
    rows = []
    for i in range(count):
        start = i * (len(tokens) - length) // max(1, count)
        prompt = [int(t) for t in tokens[start : start + length]]
        new = generate_tokens(
            model,
            prompt,
            tokens=min(recipe.training.sample_tokens, context - length),
            temperature=0.8,
            seed=recipe.seed + i,
            stop=False,
        )[0]
        rows.append({"kind": "text", "prompt": tokenizer.decode(prompt), "text": tokenizer.decode(new)})
    return rows
