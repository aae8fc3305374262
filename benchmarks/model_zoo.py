"""Mixing in every causal language model of the installed transformers: which take it, which are refused, which break.

    python benchmarks/model_zoo.py [MODEL_TYPE ...] [--placement block] [--seconds 60] [--out FOLDER]

Tiny random models, whose sizes are set by guess: some cannot be built so, and are left out. What is checked of those
that take mixing: no token sees later ones; tokens generated with a cache are those of full recomputation; padding on
the left changes no more than it does without mixing; a loss has gradients. Stricter tests of 28 of them are in
tests/integrations. Ends with code 1 if one breaks.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import Report
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from waveletgpt import add_mixing
from waveletgpt.errors import UserError

# A small value for each name of a size; a configuration gets those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), None),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout"), 0.0),
    **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99, "moe_intermediate_size": 16},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
}
LARGEST = 30_000_000  # parameters: what is larger has a size of another name


class TooLongError(Exception):
    """A model took longer than `--seconds`."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLongError(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tiny(model_type: str) -> Any:
    """A random model of two small layers, of two kinds where its layers differ."""
    kind = CONFIG_MAPPING[model_type]
    usual = kind()
    sizes = {name: value for name, value in SIZES.items() if hasattr(usual, name)}
    layers = getattr(usual, "layer_types", None)
    if layers is not None:
        other = next((name for name in layers if name != layers[0]), layers[0])
        sizes["layer_types"] = [layers[0], other]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**sizes)).eval()


def changed_by_padding(model: Any, ids: torch.Tensor, logits: torch.Tensor) -> float:
    """How far three tokens of padding on the left move the logits of `ids` (B, T); infinite where they raise."""
    mask = torch.ones(len(ids), ids.shape[1] + 3, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([ids.new_zeros(len(ids), 3), ids], 1)
    try:
        return float((model(padded, attention_mask=mask).logits[:, 3:] - logits).abs().max())
    except RuntimeError:
        return math.inf


def check(model_type: str, placement: str) -> tuple[str, list[str]]:
    """What came of it ("mixes", "refused", "breaks", "left out"), and what to say about it."""
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    try:
        model = tiny(model_type)
        if model.num_parameters() > LARGEST:
            return "left out", ["too large"]
        stock = model(ids).logits
        allowed = 2 * changed_by_padding(model, ids, stock) + 1e-4
    except TooLongError:
        raise
    except Exception as error:  # whatever a guess of sizes can do to two hundred models
        return "left out", [f"{type(error).__name__} without mixing"]
    try:
        add_mixing(model, mixing="fixed", max_window=4, mix_placement=placement)
        whole = model(ids).logits
        made = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
        again = model(made.sequences).logits[:, 11:-1]
        wrong = {
            "mixing changes nothing": torch.equal(whole, stock),
            "tokens see later ones": not torch.allclose(model(ids[:, :8]).logits, whole[:, :8], atol=1e-5),
            "cached is not full": not torch.allclose(torch.stack(made.logits, 1), again, atol=1e-5),
            "padding counts": changed_by_padding(model, ids, whole) > allowed,
        }
        with torch.enable_grad():
            model.train()(ids, labels=ids).loss.backward()
    except UserError as error:
        return "refused", [str(error)]
    except TooLongError:
        raise
    except Exception as error:
        return "breaks", [f"{type(error).__name__}: {error}"]
    found = [what for what, so in wrong.items() if so]
    return ("breaks", found) if found else ("mixes", [])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="model_type of transformers; default: all causal language models")
    parser.add_argument("--placement", default="block", help="sites, as add_mixing takes them")
    parser.add_argument("--seconds", type=int, default=60, help="at most for one model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for results (JSON)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    report = Report("model_zoo", options.out, placement=options.placement)
    rows = []
    for model_type in options.models or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with at_most(options.seconds):
                outcome, notes = check(model_type, options.placement)
        except TooLongError as error:
            outcome, notes = "left out", [str(error)]
        print(f"{model_type}: {outcome}{': ' if notes else ''}{'; '.join(notes)}", file=sys.stderr, flush=True)
        rows.append([model_type, outcome, "; ".join(notes)])
    report.table("mixing in models of transformers", ["model_type", "outcome", "why"], rows)
    if any(outcome == "breaks" for _, outcome, _ in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
