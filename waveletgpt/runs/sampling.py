"""Generating from a trained model, the same way for reports and for the `generate` command."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from waveletgpt.data import MODALITIES
from waveletgpt.data.mixture import parts_of
from waveletgpt.data.progress import bar
from waveletgpt.errors import UserError
from waveletgpt.integrations.architecture import context_of, end_tokens

LEAST_TEMPERATURE = 1e-3
"""Below it logits divided by the temperature may be too large for their numbers."""


def generate_tokens(model: Any, prompt: list[int], *, samples: int = 1, **settings: Any) -> list[list[int]]:
    """Continue `prompt` several times; settings, result and errors: `continue_prompts`."""
    return continue_prompts(model, [prompt] * samples, **settings)


def continue_prompts(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: bool = True,
    suppress_tokens: Sequence[int] = (),
    watch: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """Continue `prompts`, which have one length, side by side and with the cache: each by up to `tokens` token ids.

    `temperature=0` is greedy. `stop`: end a sample at the end-of-text token. `suppress_tokens` never come. `watch` is
    given the new token of every sample as soon as there is one. When the context is full, its last half is kept as the
    prompt for more.

    Raises:
        UserError: settings out of range, an empty prompt, or a model whose outputs are NaN.
    """
    samples = len(prompts)
    if not temperature >= 0 or not 0 < top_p <= 1 or top_k < 0 or samples < 1 or tokens < 1 or not 0 <= seed < 2**63:
        raise UserError(
            f"temperature {temperature} must be >= 0, top-p {top_p} in (0, 1], top-k {top_k} >= 0, "
            f"samples {samples} and tokens {tokens} >= 1, seed {seed} from 0 to 2^63 - 1"
        )
    length = len(prompts[0])
    if not length:
        raise UserError("the prompt gives no token the model knows; give a longer one")
    config, device, was_training = model.config, model.device, model.training
    context, ends = context_of(config), end_tokens(config) if stop else []
    choice = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    ids = torch.tensor(prompts, device=device)
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while ids.shape[1] < length + tokens:
            seen = ids if ids.shape[1] <= context else ids[:, -max(1, context // 2) :]
            new = min(
                context + 1 - seen.shape[1], length + tokens - ids.shape[1]
            )  # the last new token is not read again
            try:
                out = model.generate(
                    seen,
                    attention_mask=torch.ones_like(seen),
                    max_new_tokens=new,
                    eos_token_id=ends or None,
                    pad_token_id=config.pad_token_id if config.pad_token_id is not None else 0,
                    suppress_tokens=list(suppress_tokens) or None,
                    streamer=_Watched(watch) if watch else None,
                    **(choice if temperature > 0 else {"do_sample": False}),
                )
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                if temperature < LEAST_TEMPERATURE:
                    problem = f"temperature {temperature} is too small for its numbers; give 0 for the likeliest tokens"
                    raise UserError(problem) from None
                raise UserError(
                    "the model gives no probabilities (inf or nan): its weights are damaged, or it diverged"
                ) from None
            ids = torch.cat([ids, out[:, seen.shape[1] :]], dim=1)
            if ends and all(not set(ends).isdisjoint(row) for row in ids[:, length:].tolist()):
                break
    model.train(was_training)
    rows = ids[:, length:].tolist()
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]


class _Watched(BaseStreamer):
    """transformers' way to hear of each token."""

    def __init__(self, watch: Callable[[list[int]], None]):
        self.watch = watch

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 1:  # the first call brings the prompt, in two dimensions
            self.watch(value.tolist())

    def end(self) -> None:
        pass


@contextlib.contextmanager
def counting(description: str, total: int) -> Iterator[Callable[[Any], None]]:
    """A bar over `total` tokens on standard error, where that is a terminal; yields what to call at each of them."""
    with bar(description, total, sys.stderr.isatty(), "tokens") as advance:
        done = itertools.count(1)
        yield lambda _: advance(next(done))


def sample_run(model: Any, store: Any, recipe: Any, folder: Path) -> list[dict[str, Any]]:
    """The samples of a finished run: held-out excerpts continued, the same prompts for every arm.

    Returns what samples.json holds: kind, prompt, text, and for sounds and pictures the file, relative to `folder`.
    """
    modality, tokenizer = MODALITIES[store.modality], store.load_tokenizer()
    rows: list[dict[str, Any]] = []
    parts, count = parts_of(store), recipe.training.samples
    # Of a mixture each source in turn.
    excerpts = [modality.excerpts(p.store.split("validation"), -(-count // len(parts)), tokenizer) for p in parts]
    prompts = list(itertools.islice(itertools.chain(*zip(*excerpts, strict=True)), count))
    # Half a second of sound is thousands of tokens: prompts of one length are continued side by side.
    alike: dict[tuple[int, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        length = recipe.training.sample_tokens or modality.new_tokens(prompt, tokenizer)
        alike.setdefault((len(prompt), length), []).append(i)
    continued: dict[int, list[int]] = {}
    for (_, length), members in alike.items():
        with counting("samples " + ", ".join(str(i + 1) for i in members), length) as advance:
            made = continue_prompts(
                model, [prompts[i] for i in members], tokens=length, temperature=0.8, seed=recipe.seed + members[0],
                stop=False, suppress_tokens=modality.suppress_tokens, watch=advance,
            )  # fmt: skip
        continued.update(zip(members, made, strict=True))
    for i, prompt in enumerate(prompts):
        new = continued[i]
        (folder / "samples").mkdir(exist_ok=True)
        sample = modality.write_sample(prompt + new, tokenizer, folder / "samples" / str(i))
        row = {"kind": sample.kind, "prompt": "", "text": sample.text or "", "file": f"samples/{sample.path.name}"}
        if sample.text is not None:
            given = tokenizer.decode(prompt)
            # A character may be cut between prompt and continuation.
            whole = sample.text.startswith(given)
            row.update(prompt=given, text=sample.text.removeprefix(given) if whole else tokenizer.decode(new))
        else:
            row["prompt"] = f"the first {len(prompt)} tokens are held-out data"
            row["prompt"] += f"; {sample.repaired}" if sample.repaired else ""
        rows.append(row)
    return rows
