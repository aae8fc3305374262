"""The classifier: padding, both directions, pooling, two documents, waveforms; losses; saving; what it costs.

Shapes: B batch, T tokens, E embedding, C mixed channels, N samples.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    DynamicCache,
    PreTrainedTokenizerFast,
)

from tests.model.test_mixing import make_mixer, oracle
from tests.tiny import PAD, tiny_config, tiny_model, tokens
from waveletgpt import WaveletGPTConfig, WaveletGPTForCausalLM, WaveletGPTForSequenceClassification
from waveletgpt.model import cost
from waveletgpt.model.frames import split_frames
from waveletgpt.model.mixing import MIXERS

MIXINGS = ["none", *MIXERS]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LABELS = 5


def classifier(seed: int = 0, **changes: object) -> WaveletGPTForSequenceClassification:
    """In evaluation mode, with all weights random, and logits of size about 1."""
    torch.manual_seed(seed)
    model = WaveletGPTForSequenceClassification(tiny_config(num_labels=LABELS, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def pad(x: torch.Tensor, before: int, after: int, value: float = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., T) with padding, and its mask."""
    mask = F.pad(torch.ones(x.shape, dtype=torch.long), (before, after))
    return F.pad(x, (before, after), value=value), mask


# ---- padding ----


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_padding_on_either_side_changes_nothing(mixing: str, architecture: str, causal: bool) -> None:
    ids = tokens(2)
    for edge, placement in (("zero", "input"), ("partial", "block")):
        model = classifier(
            mixing=mixing, architecture=architecture, causal=causal, mix_edge=edge, mix_placement=placement,
            pooling="attention",
        )  # fmt: skip
        # One set of weights for all poolings; a query that is there changes nothing in the others.
        for pooling in ("last", "mean", "attention"):
            model.score.pooling = pooling
            model.score.query = model.score.query if pooling == "attention" else None
            alone = model(ids).logits
            assert alone.std() > 0.1
            for before, after in ((5, 0), (0, 5), (2, 3)):
                torch.testing.assert_close(model(*pad(ids, before, after)).logits, alone, **CLOSE)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), left=st.booleans(), causal=st.booleans())
@settings(max_examples=25, deadline=None)
def test_each_example_of_a_batch_is_as_alone(lengths: list[int], left: bool, causal: bool) -> None:
    model = classifier(causal=causal, mix_edge="partial", pooling="attention", mixing="learnable")
    rows = [tokens(1, length, seed=length) for length in lengths]
    longest = max(lengths)
    padded = [pad(row, (longest - row.shape[1]) * left, (longest - row.shape[1]) * (not left)) for row in rows]
    together = model(torch.cat([ids for ids, _ in padded]), torch.cat([mask for _, mask in padded])).logits
    torch.testing.assert_close(together, torch.cat([model(row).logits for row in rows]), **CLOSE)


def test_padding_takes_no_position() -> None:
    model, ids = classifier(n_positions=16), tokens(1, 16)
    for before, after in ((8, 8), (0, 8)):
        torch.testing.assert_close(model(*pad(ids, before, after)).logits, model(ids).logits, **CLOSE)
    with pytest.raises(ValueError, match="17 tokens exceed n_positions=16"):
        model(tokens(1, 17))


@pytest.mark.parametrize("pooling", ["last", "mean", "attention"])
@pytest.mark.parametrize("causal", [True, False])
def test_an_empty_document_is_no_accident(causal: bool, pooling: str) -> None:
    for implementation in ("sdpa", "eager"):
        model = classifier(causal=causal, pooling=pooling, mix_edge="partial", attn_implementation=implementation)
        ids, mask = tokens(2), torch.ones(2, 12, dtype=torch.long)
        mask[0] = 0
        out = model(ids, mask, labels=torch.tensor([0, 1]))
        out.loss.backward()
        assert out.logits.isfinite().all()
        torch.testing.assert_close(out.logits[1:], model(ids[1:]).logits, **CLOSE)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---- both directions ----


@pytest.mark.parametrize("edge", ["zero", "partial"])
@pytest.mark.parametrize("kind", list(MIXERS))
def test_both_directions_are_the_mean_of_a_filter_and_its_mirror_image(kind: str, edge: str) -> None:
    mixer = make_mixer(kind, mix_edge=edge, causal=False)
    hidden, C = torch.randn(2, 11, 16), mixer.n_mixed
    out = mixer(hidden)
    x = hidden[..., :C].double().numpy()
    expected = (oracle(mixer, kind, x, edge) + oracle(mixer, kind, x[:, ::-1], edge)[:, ::-1]) / 2
    np.testing.assert_allclose(out[..., :C].detach(), expected, atol=1e-6)
    assert torch.equal(out[..., C:], hidden[..., C:])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_both_directions_treat_a_text_as_its_mirror_image(mixing: str, architecture: str) -> None:
    changes = {"mixing": mixing, "architecture": architecture, "position_embedding": "none", "pooling": "mean"}
    ids = tokens()
    both = classifier(causal=False, mix_edge="partial", **changes)
    torch.testing.assert_close(both(ids.flip(1)).logits, both(ids).logits, **CLOSE)
    one = classifier(**changes)
    assert (one(ids.flip(1)).logits - one(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("mixing", MIXINGS)
def test_both_directions_see_every_token_from_every_token(mixing: str) -> None:
    model, ids = classifier(causal=False, mixing=mixing).model, tokens(1)
    base = model(ids).last_hidden_state
    for t in (0, 5, 11):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % PAD
        assert ((model(changed).last_hidden_state - base).abs().amax(-1) > 1e-5).all()


def test_attention_to_both_sides_in_a_few_lines() -> None:
    ids = tokens()
    for implementation in ("eager", "sdpa"):
        model = classifier(causal=False, mixing="none", n_layer=1, attn_implementation=implementation).model
        hidden = model.embed_tokens(ids) + model.embed_positions(torch.arange(12))
        block = model.blocks[0]
        q, k, v = block.attention.qkv_proj(block.norm_1(hidden)).view(2, 12, 12, 4).transpose(1, 2).chunk(3, dim=1)
        attended = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).reshape(2, 12, 16)
        hidden = hidden + block.attention.out_proj(attended)
        hidden = hidden + block.feed_forward(block.norm_2(hidden))
        torch.testing.assert_close(model(ids).last_hidden_state, model.norm(hidden), **CLOSE)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_attention_implementations_agree(architecture: str, padded: bool) -> None:
    model, inputs = (
        classifier(architecture=architecture, causal=False, pooling="mean"),
        pad(tokens(), *[2 * padded] * 2),
    )
    logits = {}
    for implementation in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        # Flex attention compiles itself, which on a CPU takes a C++ compiler and a minute; it has no gradients there.
        stance = "force_eager" if implementation == "flex_attention" else "default"
        with torch.no_grad(), torch.compiler.set_stance(stance):
            logits[implementation] = model(*inputs).logits
    for implementation in ("sdpa", "flex_attention"):
        torch.testing.assert_close(logits[implementation], logits["eager"], **CLOSE)


def test_both_directions_keep_no_cache_and_write_no_text() -> None:
    model, ids = classifier(causal=False).model, tokens()
    assert model(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="not causal takes no past_key_values"):
        model(ids, past_key_values=DynamicCache(config=model.config))
    for settings_ in ({"causal": False}, {"frame_size": 4}):
        with pytest.raises(ValueError, match="a language model needs causal=True and tokens"):
            WaveletGPTForCausalLM(tiny_config(**settings_))


# ---- pooling and head ----


def test_poolings_in_a_few_lines() -> None:
    ids, (padded, mask) = tokens(), pad(tokens(), 2, 3)
    for pooling in ("last", "mean", "attention"):
        model = classifier(pooling=pooling)
        hidden = model.model(ids).last_hidden_state
        if pooling == "last":
            pooled = hidden[:, -1]
        elif pooling == "mean":
            pooled = hidden.mean(1)
        else:
            weights = (hidden * model.score.query).sum(-1).softmax(-1)
            pooled = (hidden * weights[..., None]).sum(1)
        first, last = model.score.layers
        expected = last(F.relu(first(pooled)))
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        torch.testing.assert_close(model(padded, mask).logits, expected, **CLOSE)


def test_attention_pooling_starts_as_the_mean_and_learns() -> None:
    torch.manual_seed(0)
    model, ids = WaveletGPTForSequenceClassification(tiny_config(num_labels=LABELS, pooling="attention")), tokens()
    hidden = torch.randn(2, 12, 16)
    torch.testing.assert_close(model.score.pool(hidden, None), hidden.mean(1))
    model(ids, labels=torch.tensor([1, 2])).loss.backward()
    assert (model.score.query.grad != 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_two_documents_go_through_one_encoder(causal: bool) -> None:
    model = classifier(n_inputs=2, causal=causal, pooling="mean")
    a, b = tokens(3, 9, seed=1), tokens(3, 12, seed=2)
    u, v = (model.score.pool(model.model(x).last_hidden_state, None) for x in (a, b))
    first, second, last = model.score.layers
    x = torch.cat([u, v, u - v, u * v], -1)
    expected = last(F.relu(second(F.relu(first(x)))))
    for before, after in ((0, 3), (3, 0)):
        padded, mask = pad(a, before, after)
        pair = torch.stack([padded, b], 1), torch.stack([mask, torch.ones_like(b)], 1)
        torch.testing.assert_close(model(*pair).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match=r"an input has shape \(3, 12\): n_inputs=2 needs \(B, 2, ...\)"):
        model(b)


# ---- waveforms ----


def test_a_waveform_is_cut_into_frames() -> None:
    model = classifier(frame_size=8, frame_hidden=24, pooling="mean")
    waves = torch.rand(2, 45) * 2 - 1
    frames = F.pad(waves, (0, 3)).view(2, 6, 8)
    embedding = model.model.embed_tokens
    hidden = embedding.down_proj(F.gelu(embedding.up_proj(frames), approximate="tanh"))
    expected = model(inputs_embeds=hidden).logits
    torch.testing.assert_close(model(input_values=waves).logits, expected, **CLOSE)
    assert model.main_input_name == "input_values"
    for inputs in ({"input_ids": tokens()}, {"input_values": waves, "input_ids": tokens()}, {}):
        with pytest.raises(ValueError, match=r"this model reads input_values|give one of input_ids"):
            model(**inputs)
    with pytest.raises(ValueError, match="reads input_ids, no waveforms"):
        classifier()(input_values=waves)


@given(length=st.integers(1, 40), before=st.integers(0, 20), after=st.integers(0, 20), causal=st.booleans())
@settings(max_examples=25, deadline=None)
def test_padding_of_a_waveform_changes_nothing(length: int, before: int, after: int, causal: bool) -> None:
    model = classifier(frame_size=8, frame_hidden=24, pooling="attention", causal=causal, mix_edge="partial")
    wave = torch.rand(1, length) * 2 - 1
    padded, mask = pad(wave, before, after, value=0.7)
    torch.testing.assert_close(
        model(input_values=padded, attention_mask=mask).logits, model(None, None, None, wave).logits, **CLOSE
    )


@given(length=st.integers(1, 40), before=st.integers(0, 20), after=st.integers(0, 20), size=st.integers(1, 9))
def test_frames_put_together_are_the_waveform(length: int, before: int, after: int, size: int) -> None:
    wave = torch.randn(1, length)
    frames, mask = split_frames(*pad(wave, before, after, value=9.0), size)
    assert frames.shape[1:] == (math.ceil((before + length + after) / size), size)
    assert mask.tolist() == [[int(t * size < length) for t in range(frames.shape[1])]]
    assert torch.equal(frames.flatten(1)[:, :length], wave)
    assert not frames.flatten(1)[:, length:].any()


# ---- losses and training ----


def test_losses() -> None:
    ids = tokens(4)
    model = classifier()
    labels = torch.tensor([0, 4, 2, 2])
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    # Accumulating gradients, the trainer divides by the examples of all batches (multi-label: by all their labels).
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=8).loss, out.loss / 2)
    model = classifier(problem_type="multi_label_classification")
    several = torch.randint(0, 2, (4, LABELS))
    expected = F.binary_cross_entropy_with_logits(out.logits, several.float())
    for given_ in (several, several.bool(), several.float()):
        torch.testing.assert_close(model(ids, labels=given_).loss, expected)
    torch.testing.assert_close(model(ids, labels=several, num_items_in_batch=8 * LABELS).loss, expected / 2)


def test_shares_of_one_class_are_that_class() -> None:
    model, ids, labels = classifier(), tokens(4), torch.tensor([0, 4, 2, 2])
    whole, share = (model(ids, labels=each).loss for each in (labels, F.one_hot(labels, LABELS).float()))
    assert torch.allclose(whole, share, atol=1e-6)
    mixed = 0.25 * F.one_hot(labels, LABELS) + 0.75 * F.one_hot(labels.flip(0), LABELS)
    between = 0.25 * whole + 0.75 * model(ids, labels=labels.flip(0)).loss
    assert torch.allclose(model(ids, labels=mixed).loss, between, atol=1e-6)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("pooling", ["last", "mean", "attention"])
def test_half_precision(pooling: str, problem: str) -> None:
    ids, labels = tokens(4), torch.tensor([0, 4, 2, 2])
    if problem.startswith("multi"):
        labels = F.one_hot(labels, LABELS).float()
    model = classifier(pooling=pooling, problem_type=problem, causal=False)
    reference = model(*pad(ids, 0, 3)).logits
    half = classifier(pooling=pooling, problem_type=problem, causal=False).bfloat16()
    out = half(*pad(ids, 0, 3), labels=labels)
    assert (out.logits.dtype, out.loss.dtype) == (torch.bfloat16, torch.float32)
    # bfloat16 has 8 bits: 0.4 % a step, and a few dozen steps from tokens to logits.
    assert (out.logits.float() - reference).norm() / reference.norm() < 0.05
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*pad(ids, 0, 3), labels=labels)
    assert (out.logits.float() - reference).norm() / reference.norm() < 0.05
    waves = classifier(frame_size=8, frame_hidden=24).bfloat16()
    assert waves(input_values=torch.rand(2, 40)).logits.dtype == torch.bfloat16


def gradients(model: WaveletGPTForSequenceClassification, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def inputs_for(model: WaveletGPTForSequenceClassification) -> dict[str, torch.Tensor]:
    labels = torch.tensor([1, 3])
    if model.config.frame_size is not None:
        values, mask = pad(torch.rand(2, 70) * 2 - 1, 5, 6)
        return {"input_values": values, "attention_mask": mask, "labels": labels}
    ids, mask = pad(tokens(4).view(2, 2, 12) if model.config.n_inputs == 2 else tokens(), 0, 3)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


VARIANTS = [
    {"mixing": "learnable", "pooling": "attention", "causal": False, "mix_edge": "partial"},
    {"architecture": "llama", "pooling": "mean", "n_inputs": 2, "mix_placement": "input"},
    {"frame_size": 8, "frame_hidden": 24, "causal": False, "mixing": "ema"},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_gradient_checkpointing_changes_no_gradient(changes: dict) -> None:
    model = classifier(attn_pdrop=0.1, **changes).train()
    inputs = inputs_for(model)
    torch.manual_seed(0)
    expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    for name, gradient in gradients(model, **inputs).items():
        torch.testing.assert_close(gradient, expected[name], msg=name, **CLOSE)


@pytest.mark.parametrize("changes", VARIANTS)
def test_compiles_into_one_graph(changes: dict) -> None:
    torch.compiler.reset()
    model = classifier(n_layer=1, problem_type="single_label_classification", **changes).train()
    inputs = inputs_for(model)
    expected = gradients(model, **inputs)
    loss = model(**inputs).loss
    model.zero_grad()
    # aot_eager traces forward and backward as inductor does, and leaves out the C++ compiler.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss
    torch.testing.assert_close(compiled, loss)
    compiled.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name, **CLOSE)


def test_it_learns_what_stands_at_the_start() -> None:
    # The class is the first token; the others are noise.
    torch.manual_seed(0)
    config = tiny_config(num_labels=4, causal=False, pooling="mean", vocab_size=8)
    model = WaveletGPTForSequenceClassification(config).train()
    ids = torch.randint(4, 8, (64, 10))
    labels = torch.randint(0, 4, (64,))
    ids[:, 0] = labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert (model.eval()(ids).logits.argmax(-1) == labels).all()


# ---- saving, loading, other tools ----


@pytest.mark.parametrize("changes", VARIANTS)
def test_saved_and_loaded_it_gives_the_same_logits(changes: dict, tmp_path: Path) -> None:
    model = classifier(id2label={i: f"class {i}" for i in range(LABELS)}, **changes)
    model.save_pretrained(tmp_path)
    inputs = inputs_for(model)
    for loader in (WaveletGPTForSequenceClassification, AutoModelForSequenceClassification):
        loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is WaveletGPTForSequenceClassification
        assert not any(report.values()), report
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
        assert loaded.config.id2label == {i: f"class {i}" for i in range(LABELS)}
        assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    base, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(base.blocks[0].norm_1.weight, model.model.blocks[0].norm_1.weight)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_goes_on_as_a_classifier(tied: bool, causal: bool, tmp_path: Path) -> None:
    trained = tiny_model(tie_word_embeddings=tied, mixing="learnable")
    trained.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=LABELS, causal=causal, pooling="attention", output_loading_info=True
    )
    assert all(name.startswith("score.") for name in report["missing_keys"])
    assert {name for name, _ in loaded.named_parameters() if "score" in name} == set(report["missing_keys"])
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    # The head starts as in a new model.
    assert not loaded.score.query.any()
    for layer in loaded.score.layers:
        assert not layer.bias.any()
        assert 0 < layer.weight.std() < 0.04
    if causal:
        ids = tokens()
        torch.testing.assert_close(loaded.eval().model(ids).last_hidden_state, trained.model(ids).last_hidden_state)


# Runs where `import waveletgpt` fails; prints the logits of a folder's model.
ELSEWHERE = """
import json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "waveletgpt":
            raise ImportError("waveletgpt is not installed here")

sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForSequenceClassification

torch.set_num_threads(1)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
assert model.__module__.startswith("transformers_modules."), model.__module__
print(json.dumps(model(torch.tensor(json.loads(sys.argv[1]))).logits.tolist()))
"""


def test_it_loads_where_this_package_is_not_installed(tmp_path: Path) -> None:
    model, ids = classifier(causal=False, pooling="mean", mix_edge="partial"), tokens()
    model.save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(ids.tolist()), str(tmp_path / "model")],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), model(ids).logits, **CLOSE)


@pytest.mark.parametrize("changes", VARIANTS)
def test_lora_trains_the_head_too(changes: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = classifier(**changes)
    inputs = inputs_for(base)
    before = base(**inputs)
    names = ["qkv_proj", "up_proj", "out_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=names))
    torch.testing.assert_close(model(**inputs).logits, before.logits)  # an adapter starts as nothing
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 3)[0].split(".")[-1] for name in trained if "lora" in name} == set(names)
    assert sum("score" in name for name in trained) == sum(1 for _ in base.score.original_module.parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    assert model(**inputs).loss < before.loss
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(classifier(**changes), tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_the_usual_collator_pads_it() -> None:
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>")), pad_token="<pad>"
    )
    rows = [tokens(1, length, seed=length)[0] for length in (3, 12, 7)]
    for causal in (True, False):
        model = classifier(causal=causal, pooling="mean")
        alone = torch.cat([model(row[None]).logits for row in rows])
        for side in ("left", "right"):
            tokenizer.padding_side = side
            batch = DataCollatorWithPadding(tokenizer)([{"input_ids": row.tolist(), "label": 1} for row in rows])
            out = model(**batch)
            torch.testing.assert_close(out.logits, alone, **CLOSE)
            torch.testing.assert_close(out.loss, F.cross_entropy(alone, torch.tensor([1, 1, 1])))


def test_token_zero_is_real_unless_the_mask_says_otherwise() -> None:
    model, ids = classifier(pad_token_id=0), tokens()
    ids[:, 6:] = 0
    assert (model(ids).logits - model(ids[:, :6]).logits).abs().max() > 1e-3


# ---- cost ----


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "gpt2", "causal": False, "pooling": "mean"},
        {"architecture": "llama", "n_inputs": 2, "n_kv_head": 4},
        {"frame_size": 8, "frame_hidden": 24, "causal": False},
    ],
)
def test_counted_flops_are_the_formula(changes: dict) -> None:
    model = classifier(mixing="none", attn_implementation="eager", **changes).train()
    T, documents = model.config.n_positions, model.config.n_inputs
    labels = torch.tensor([1])
    with FlopCounterMode(display=False) as counter:
        if model.config.frame_size is None:
            model(tokens(documents, T).view(1, *([2] if documents == 2 else []), T), labels=labels).loss.backward()
        else:
            model(input_values=torch.rand(1, 8 * T), labels=labels).loss.backward()
    # The counter sees matrix products only; the formula counts biases and gains, 6 each, as weights too.
    vectors = sum(p.numel() for p in model.model.parameters() if p.ndim == 1)
    # 1 %: pooling, rotary angles, the head's biases.
    assert counter.get_total_flops() / (T * documents) == pytest.approx(
        cost.flops_per_token(model) - 6 * vectors, rel=0.01
    )


def test_what_a_classifier_costs() -> None:
    config = tiny_config(num_labels=LABELS, mixing="learnable")
    both = tiny_config(num_labels=LABELS, mixing="learnable", causal=False)
    assert cost.mixing_flops_per_token(both) == 2 * cost.mixing_flops_per_token(config) > 0
    model = WaveletGPTForSequenceClassification(both)
    described = cost.describe(model)
    assert described["parameters"] == sum(p.numel() for p in model.state_dict().values())
    assert described["extra_parameters"] == sum(p.numel() for n, p in model.named_parameters() if "mixers" in n)
    assert described["state_bytes"] == {"keys_values": 0, "mixing": 0}
    # A larger vocabulary is more parameters, but no more work.
    larger = WaveletGPTForSequenceClassification(WaveletGPTConfig(**{**both.to_dict(), "vocab_size": 1000}))
    assert cost.count_parameters(larger)[0] - described["parameters"] == (1000 - both.vocab_size) * both.n_embd
    assert cost.flops_per_token(larger) == described["flops_per_token"]
