"""Other people's tools on saved models: `trust_remote_code` without this package, PEFT, lm-eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import VOCAB, tiny_model, tokens
from waveletgpt import WaveletGPTForCausalLM

# Runs where `import waveletgpt` fails, and gets folders to load; prints logits of each, and of each saved and loaded
# once more.
ELSEWHERE = """
import json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "waveletgpt":
            raise ImportError("waveletgpt is not installed here")

sys.meta_path.insert(0, Block())
import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
results = []
for folder in sys.argv[2:]:
    AutoConfig.from_pretrained(folder, trust_remote_code=True).save_pretrained(folder + "-configuration")
    for at in (folder, folder + "-again"):
        model = AutoModelForCausalLM.from_pretrained(at, trust_remote_code=True).eval()
        assert model.__module__.startswith("transformers_modules."), model.__module__
        with torch.no_grad():
            new = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=28)
            results.append([model(ids).logits.tolist(), new.tolist()])
        model.save_pretrained(folder + "-again")
assert "waveletgpt" not in sys.modules
print(json.dumps(results))
"""


def test_saved_models_load_where_this_package_is_not_installed(tmp_path: Path) -> None:
    models = [
        tiny_model(mixing="fixed", mix_edge="partial"),
        tiny_model(mixing="learnable", architecture="llama", mix_placement="input", tie_word_embeddings=False),
        tiny_model(mixing="ema", mix_layers="inner"),
    ]
    folders = []
    for index, model in enumerate(models):
        model.save_pretrained(folder := tmp_path / f"model-{index}")
        folders.append(str(folder))
    ids = tokens()
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(ids.tolist()), *folders],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 2 * len(models)
    for index, (logits, new) in enumerate(results):
        model = models[index // 2]
        # There the operator is its reference; here the fast one.
        torch.testing.assert_close(torch.tensor(logits), model(ids).logits, atol=1e-5, rtol=1e-5)
        assert new == model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=28).tolist()
    # And what was saved there loads here.
    again = WaveletGPTForCausalLM.from_pretrained(f"{folders[1]}-again").eval()
    assert torch.equal(again(ids).logits, models[1](ids).logits)


@pytest.mark.parametrize("settings", [{"mixing": "fixed"}, {"mixing": "learnable", "architecture": "llama"}])
def test_lora_trains_saves_loads_and_merges(settings: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = tokens()
    base = tiny_model(**settings)
    before = base(ids).logits
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=True)
    )
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"qkv_proj", "up_proj", "out_proj"}
    torch.testing.assert_close(model(ids).logits, before)  # an adapter starts as nothing
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    first = model(ids, labels=ids).loss
    first.backward()
    optimizer.step()
    assert model(ids, labels=ids).loss < first
    trained = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(**settings), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, trained)
    generated = loaded.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=28)
    merged = loaded.merge_and_unload()
    assert type(merged) is WaveletGPTForCausalLM
    torch.testing.assert_close(merged(ids).logits, trained, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=28), generated)


def save_with_tokenizer(model: WaveletGPTForCausalLM, folder: Path) -> None:
    """One token a letter, as `waveletgpt.data` makes tokenizers; the last one ends a document."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    letters = "abcdefghijklmnopqrstuvwxyz ."
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, end])}, merges=[], unk_token=end))
    tokenizer.decoder = decoders.Fuse()
    assert tokenizer.get_vocab_size() == VOCAB
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end, unk_token=end
    ).save_pretrained(folder)
    model.save_pretrained(folder)


def test_lm_eval_scores_a_saved_model_at_any_batch_size(tmp_path: Path) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance
    from transformers import AutoTokenizer

    model = tiny_model(mixing="fixed", mix_edge="partial")
    save_with_tokenizer(model, tmp_path)
    pairs = [("the cat sat", " on a mat."), ("a", " b"), ("", "once upon a time"), ("seven quiet birds", " sang.")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = []
    for context, continuation in pairs:
        target = tokenizer(continuation)["input_ids"]
        ids = torch.tensor([(tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]) + target])
        logs = model(ids).logits[0].log_softmax(-1)[-len(target) - 1 : -1]
        best = logs.argmax(-1).tolist() == target
        expected.append((logs[range(len(target)), target].sum().item(), best))

    for batch_size in (1, 2):
        scorer = huggingface.HFLM(pretrained=str(tmp_path), device="cpu", batch_size=batch_size)
        assert type(scorer.model) is WaveletGPTForCausalLM
        scores = scorer.loglikelihood(requests, disable_tqdm=True)
        for (score, best), (expected_score, expected_best) in zip(scores, expected, strict=True):
            assert score == pytest.approx(expected_score, abs=1e-4)
            assert best == expected_best
