"""The models: equal to Hugging Face's where they should be, causal, trainable, saveable; what they cost.

Shapes: B batch, T tokens, E embedding, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import create_causal_mask

from tests.tiny import PAD, VOCAB, tiny_config, tiny_model, tokens
from waveletgpt import WaveletGPTConfig, WaveletGPTForCausalLM, WaveletGPTModel
from waveletgpt.model import cost
from waveletgpt.model.configuration import SITES
from waveletgpt.model.decoding import reach_told
from waveletgpt.model.mixing import MIXERS, Mixer
from waveletgpt.model.modeling import sinusoids

MIXINGS = ["none", *MIXERS]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""float32 rounding of two ways to compute logits of size about 1."""


# ---- equal to Hugging Face's models ----


def test_without_mixing_it_is_gpt2() -> None:
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=4, n_inner=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    ours = tiny_model(mixing="none")
    names = {
        "model": "transformer", "embed_tokens": "wte", "embed_positions": "wpe", "blocks": "h", "norm": "ln_f",
        "norm_1": "ln_1", "norm_2": "ln_2", "attention": "attn", "feed_forward": "mlp", "qkv_proj": "c_attn",
        "up_proj": "c_fc", "out_proj": "c_proj",
    }  # fmt: skip
    for name, weight in ours.state_dict().items():
        theirs_name = ".".join(names.get(part, part) for part in name.split("."))
        # GPT-2 keeps its linear maps transposed.
        theirs.get_parameter(theirs_name).data.copy_(weight.T if "_proj.weight" in name else weight)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    ids, mask = tokens(), torch.ones(2, 12, dtype=torch.long)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)
    mask[1, 7:] = 0
    padded = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    torch.testing.assert_close(ours(ids, **padded).loss, theirs(ids, **padded).loss, **CLOSE)


@pytest.mark.parametrize(("tied", "n_kv_head"), [(True, 2), (False, 1), (True, 4)])
def test_without_mixing_it_is_llama(tied: bool, n_kv_head: int) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=n_kv_head, intermediate_size=32, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        rope_parameters=rope,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    ours = tiny_model(
        architecture="llama", mixing="none", tie_word_embeddings=tied, n_kv_head=n_kv_head, rope_parameters=rope
    )
    names = {
        "blocks": "layers", "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attention": "self_attn",
        "feed_forward": "mlp",
    }  # fmt: skip
    head = 16 // 4
    with torch.no_grad():
        for name, weight in ours.state_dict().items():
            theirs_name = ".".join(names.get(part, part) for part in name.split("."))
            if "qkv_proj" in name:
                parts = weight.split([16, n_kv_head * head, n_kv_head * head])
                targets = [theirs_name.replace("qkv", part) for part in "qkv"]
            elif "up_proj" in name:  # the gate comes first
                parts, targets = weight.chunk(2), [theirs_name.replace("up_", "gate_"), theirs_name]
            else:
                out = "o_proj" if "self_attn" in theirs_name else "down_proj"
                parts, targets = [weight], [theirs_name.replace("out_proj", out)]
            for part, target in zip(parts, targets, strict=True):
                theirs.get_parameter(target).copy_(part)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    ids = tokens()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)
    # Packed documents keep to themselves, as there.
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]), "use_cache": False}
    torch.testing.assert_close(ours(ids, **packed).logits, theirs(ids, **packed).logits, **CLOSE)
    torch.testing.assert_close(ours(ids, **packed).logits[:, 5:8], ours(ids[:, 5:8]).logits, **CLOSE)


# ---- positions and norms ----


def test_sinusoidal_positions_are_the_formula_of_2017() -> None:
    E, T = 16, 50
    p, i = np.arange(T)[:, None], np.arange(E // 2)[None]
    angle = p / 10000 ** (2 * i / E)
    expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # the paper interleaves them: a permutation
    np.testing.assert_allclose(sinusoids(torch.arange(T)[None], E)[0], expected, atol=1e-5)
    model = tiny_model(mixing="none", position_embedding="sinusoidal")
    ids = tokens()
    first = model(ids, output_hidden_states=True).hidden_states[0]
    embedded = model.model.embed_tokens(ids) * math.sqrt(E) + torch.tensor(expected[:12], dtype=torch.float32)
    torch.testing.assert_close(first, embedded, **CLOSE)


def test_without_positions_the_order_of_the_prefix_does_not_matter() -> None:
    ids = tokens(1)
    shuffled = torch.cat([ids[:, torch.randperm(11)], ids[:, 11:]], dim=1)
    blind = tiny_model(mixing="none", position_embedding="none", n_layer=1)
    torch.testing.assert_close(blind(ids).logits[:, -1], blind(shuffled).logits[:, -1], **CLOSE)
    for settings in ({"position_embedding": "rope"}, {"mixing": "fixed", "n_layer": 2}):  # mixing tells the order
        seeing = tiny_model(**{"mixing": "none", "position_embedding": "none", "n_layer": 1, **settings})
        assert (seeing(ids).logits[:, -1] - seeing(shuffled).logits[:, -1]).abs().max() > 1e-3


def test_rotary_positions_are_relative() -> None:
    model, ids = tiny_model(architecture="llama", mix_edge="zero"), tokens(1)
    moved = model(ids, position_ids=torch.arange(100, 112)[None])
    torch.testing.assert_close(moved.logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mixing", ["none", "fixed"])
def test_post_norm_in_a_few_lines(mixing: str) -> None:
    model, ids = tiny_model(norm_position="post", position_embedding="sinusoidal", mixing=mixing), tokens()
    hidden = model(ids, output_hidden_states=True).hidden_states[0]
    for block in model.model.blocks:
        q, k, v = block.attention.qkv_proj(hidden).view(2, 12, 12, 4).transpose(1, 2).chunk(3, dim=1)
        scores = (q @ k.transpose(-1, -2) / 2).masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf)
        attended = block.attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 12, 16))
        hidden = block.norm_1(hidden + attended)
        inner = F.gelu(block.feed_forward.up_proj(hidden), approximate="tanh")
        hidden = block.norm_2(hidden + block.feed_forward.out_proj(inner))
        if mixing == "fixed":
            hidden = block.mixers[0](hidden)
    torch.testing.assert_close(model(ids).logits, hidden @ model.lm_head.weight.T, **CLOSE)


# ---- size ----


def meta_model(**settings: object) -> WaveletGPTForCausalLM:
    with torch.device("meta"):
        return WaveletGPTForCausalLM(WaveletGPTConfig(**settings))


PAPER = {"vocab_size": 28, "n_embd": 128, "n_layer": 10, "n_head": 8, "n_positions": 512}


def test_parameters_that_mixing_adds() -> None:
    none, extra = cost.count_parameters(meta_model(mixing="none", **PAPER))
    assert extra == 0
    assert 1.9e6 < none < 2.1e6  # "about 2.0 M"
    for kind in ("fixed", "wavelet", "ema", "shift"):
        assert cost.count_parameters(meta_model(mixing=kind, **PAPER)) == (none, 0)
    # One kernel a channel: windows 1 ... 512 on 64 channels would be 10 x 6.4 x 1023 = 0.065 M if 64 were a
    # multiple of the 10 levels; the longest one gets 6 channels.
    for min_window, stated, within in ((1, 10 * 6.4 * 1023, 0.04), (2, 10 * 64 / 9 * 1022, 0.04)):
        all_, extra = cost.count_parameters(meta_model(mixing="learnable", min_window=min_window, **PAPER))
        assert all_ == none + extra
        assert extra == 10 * sum(WaveletGPTConfig(min_window=min_window, **PAPER).mix_windows())
        assert extra == pytest.approx(stated, rel=within)
    # One kernel a level, windows 2 ... 1024: 10 (2 + 4 + ... + 1024) = 0.0205 M.
    _, extra = cost.count_parameters(meta_model(mixing="learnable", mix_sharing="level", max_window=1024, **PAPER))
    assert extra == 10 * (2**11 - 2) == 20460


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_all_mixings_start_from_the_same_weights(architecture: str) -> None:
    def start(mixing: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return WaveletGPTForCausalLM(tiny_config(architecture=architecture, mixing=mixing)).state_dict()

    none = start("none")
    for kind in MIXERS:
        other = start(kind)
        assert all(torch.equal(other[name], weight) for name, weight in none.items())
        assert all("mixers" in name for name in other.keys() - none.keys())


def test_initial_weights_have_the_stated_spread() -> None:
    torch.manual_seed(0)
    config = WaveletGPTConfig(vocab_size=100, n_embd=128, n_layer=8, n_head=8, n_positions=64, mixing="learnable")
    model = WaveletGPTForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "mixers" in name:
            torch.testing.assert_close(parameter, torch.full_like(parameter, 1 / parameter.shape[-1]))
        elif parameter.ndim == 2:
            # What is added to the residual stream is scaled by 1 / sqrt(2 n_layer) = 1/4 (GPT-2).
            expected = 0.02 / 4 if "out_proj" in name else 0.02
            # The spread of n samples has a standard error of 1 / sqrt(2 n); n >= 6,400.
            assert parameter.std().item() == pytest.approx(expected, rel=0.04), name
        else:
            assert set(parameter.unique().tolist()) == {float("norm" in name and name.endswith("weight"))}, name


# ---- what a language model must do ----


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_no_logit_depends_on_a_later_token(mixing: str, architecture: str) -> None:
    for changes in ({}, {"mix_placement": "input", "mix_edge": "partial", "norm_position": "post"}):
        model, ids = tiny_model(architecture=architecture, mixing=mixing, **changes), tokens(1)
        base = model(ids).logits
        for t in (3, 11):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % PAD
            difference = (model(changed).logits - base).abs().amax(-1)[0]
            assert difference[:t].max() == 0
            assert difference[t] > 1e-4


@pytest.mark.parametrize("mixing", MIXINGS)
def test_padding_on_either_side_changes_nothing_for_real_tokens(mixing: str) -> None:
    ids = tokens(1)
    for changes in ({"mix_edge": "partial"}, {"mix_placement": "input", "architecture": "llama"}):
        model = tiny_model(mixing=mixing, **changes)
        alone = model(ids).logits
        pad, real = torch.full((1, 5), PAD), torch.ones(1, 12, dtype=torch.long)
        no = torch.zeros_like(pad)
        right = model(torch.cat([ids, pad], 1), attention_mask=torch.cat([real, no], 1)).logits[:, :12]
        torch.testing.assert_close(right, alone, **CLOSE)
        left = model(torch.cat([pad, ids], 1), attention_mask=torch.cat([no, real], 1)).logits[:, 5:]
        torch.testing.assert_close(left, alone, **CLOSE)
        # With the positions that generate() makes: 0 at padding, on either side.
        for row, mask in (([pad, ids], [no, real]), ([ids, pad], [real, no])):
            attend = torch.cat(mask, 1)
            positions = (attend.cumsum(-1) - 1).masked_fill(attend == 0, 0)
            logits = model(torch.cat(row, 1), attention_mask=attend, position_ids=positions).logits
            torch.testing.assert_close(logits[attend.bool()], alone[0], **CLOSE)


def test_loss_is_cross_entropy_of_the_next_token() -> None:
    model, ids = tiny_model(), tokens()
    labels = ids.clone()
    labels[0, 4:7] = -100
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, expected)
    # Accumulating gradients, the trainer divides by the tokens of all batches.
    counted = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=2 * counted).loss, expected / 2)


def test_outputs_in_every_form() -> None:
    model, ids = tiny_model(attn_implementation="eager"), tokens()
    full = model(ids)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full.logits[:, -3:], **CLOSE)
    at = torch.tensor([1, 5])
    torch.testing.assert_close(model(ids, logits_to_keep=at).logits, full.logits[:, at], **CLOSE)
    torch.testing.assert_close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, full.logits, **CLOSE)
    for both in ({}, {"input_ids": ids, "inputs_embeds": model.model.embed_tokens(ids)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**both)

    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 12, 16)] * 3  # embeddings and two blocks
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 12, 12)] * 2
    for attention in out.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 12))
        assert attention.triu(1).abs().max() == 0
    # The last one is what the head reads.
    torch.testing.assert_close(out.hidden_states[-1] @ model.lm_head.weight.T, full.logits, **CLOSE)
    assert full.hidden_states is full.attentions is None

    logits, cache = model(ids, return_dict=False)
    assert torch.equal(logits, full.logits)
    assert isinstance(cache, DynamicCache)
    [logits] = model(ids, return_dict=False, use_cache=False)
    assert torch.equal(logits, full.logits)
    assert model(ids, use_cache=False).past_key_values is None


def test_prepared_masks_do_what_the_plain_mask_does() -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    for mixing in ("none", "fixed"):
        model, ids = tiny_model(mixing=mixing), tokens()
        made = create_causal_mask(model.config, model.model.embed_tokens(ids), mask, None)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        prepared = model(ids, attention_mask=made, position_ids=positions, wavelet_padding=mask).logits
        torch.testing.assert_close(prepared[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()], **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_packed_documents_are_each_document_alone(mixing: str, architecture: str, attention: str) -> None:
    """Positions that start again keep attention and mixing, at every site, within a document."""
    model = tiny_model(
        mixing=mixing, architecture=architecture, mix_placement="+".join(SITES), attn_implementation=attention
    ).double()  # ten filters a block make rounding larger than it is elsewhere
    documents = [tokens(1, length, seed=length) for length in (5, 1, 9)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    packed = model(torch.cat(documents, 1), position_ids=positions).logits
    torch.testing.assert_close(packed, torch.cat([model(document).logits for document in documents], 1), **CLOSE)


@pytest.mark.parametrize(
    ("told", "begins"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, [0, 3]),
        ({"position_ids": torch.tensor([[0, 0, 0, 1, 2, 3]])}, [0, 1, 2]),  # documents of one token
        ({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, [0, 3]),
        ({"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])}, [0, 3]),
    ],
)
def test_all_ways_to_say_where_documents_begin(told: dict[str, torch.Tensor], begins: list[int]) -> None:
    ids, x = tokens(1, 6), torch.randn(1, 6, 16)
    mixer = tiny_model().model.blocks[0].mixers[0]
    parts = [mixer(x[:, first:end]) for first, end in itertools.pairwise([*begins, 6])]
    torch.testing.assert_close(mixer(x, reach_told(ids, None, dict(told))), torch.cat(parts, 1), **CLOSE)
    # Not where an attention mask says that all is one text: attention sees all of it then, too.
    if "position_ids" in told:
        whole = reach_told(ids, torch.ones(1, 6, dtype=torch.long), dict(told))
        torch.testing.assert_close(mixer(x, whole), mixer(x), **CLOSE)


def test_attention_of_serving_engines_is_refused() -> None:
    # They keep keys and values for themselves, and would decode without the mixing states.
    model = tiny_model()
    assert not model.is_backend_compatible()
    for engine in ("vllm", "sglang", "paged|eager"):
        model.config._attn_implementation = engine
        with pytest.raises(ValueError, match="keeps no mixing states"):
            model(tokens())


# ---- numerics and training ----


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_attention_implementations_agree(architecture: str) -> None:
    model, ids = tiny_model(architecture=architecture), tokens()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    logits = {}
    for implementation in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        # Flex attention compiles itself, which on a CPU takes a C++ compiler and a minute; it has no gradients there.
        stance = "force_eager" if implementation == "flex_attention" else "default"
        with torch.no_grad(), torch.compiler.set_stance(stance):
            logits[implementation] = model(ids, attention_mask=mask).logits[mask.bool()]
    for implementation in ("sdpa", "flex_attention"):
        torch.testing.assert_close(logits[implementation], logits["eager"], **CLOSE)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_half_and_double_precision(mixing: str) -> None:
    ids = tokens()
    single = tiny_model(mixing=mixing)
    reference = single(ids).logits
    double = tiny_model(mixing=mixing).double()
    torch.testing.assert_close(double(ids).logits.float(), reference, atol=1e-5, rtol=1e-5)
    half = tiny_model(mixing=mixing).bfloat16()
    out = half(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    # bfloat16 has 8 bits: 0.4 % a step, and a few dozen steps from tokens to logits.
    error = (out.logits.float() - reference).norm() / reference.norm()
    assert error < 0.05
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        out = single(ids, labels=ids)
    out.loss.backward()
    assert (out.logits.float() - reference).norm() / reference.norm() < 0.05
    assert all(p.grad.isfinite().all() for p in single.parameters())


def gradients(model: WaveletGPTForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_twice_the_same() -> None:
    model, ids = tiny_model(mixing="learnable", resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1).train(), tokens()
    torch.manual_seed(0)
    first = gradients(model, ids)
    torch.manual_seed(0)
    second = gradients(model, ids)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # And dropout does something, in training only.
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_gradient_checkpointing_changes_no_gradient(mixing: str) -> None:
    model, ids = tiny_model(mixing=mixing, attn_pdrop=0.1, mix_placement="input").train(), tokens()
    torch.manual_seed(0)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name], msg=name, **CLOSE)


@pytest.mark.parametrize("mixing", ["none", "fixed", "learnable"])
def test_compiles_into_one_graph(mixing: str) -> None:
    torch.compiler.reset()
    architecture = "llama" if mixing == "fixed" else "gpt2"
    model, ids = tiny_model(architecture=architecture, mixing=mixing, n_layer=1, use_cache=False).train(), tokens()
    expected = gradients(model, ids)
    loss = model(ids, labels=ids).loss
    model.zero_grad()
    # aot_eager traces forward and backward as inductor does, and leaves out the C++ compiler.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss
    torch.testing.assert_close(compiled, loss)
    compiled.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name, **CLOSE)


# ---- saving and loading ----


@pytest.mark.parametrize(
    "settings",
    [
        {"mixing": "fixed", "mix_edge": "partial"},
        {"mixing": "learnable", "architecture": "llama", "tie_word_embeddings": False, "mix_placement": "input"},
        {"mixing": "conv", "norm_position": "post", "position_embedding": "sinusoidal"},
    ],
)
def test_saved_and_loaded_it_gives_the_same_logits(settings: dict, tmp_path: Path) -> None:
    model, ids = tiny_model(**settings), tokens()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
        "classifier.py", "configuration.py", "decoding.py", "frames.py", "mixer.py", "mixing.py", "modeling.py",
        "reference.py", "state.py", "wavelets.py",
    }  # fmt: skip
    logits = model(ids).logits
    for loader in (WaveletGPTForCausalLM, AutoModelForCausalLM):
        loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is WaveletGPTForCausalLM
        assert not any(report.values()), report
        assert torch.equal(loaded.eval()(ids).logits, logits)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert type(base) is WaveletGPTModel
    torch.testing.assert_close(base(ids).last_hidden_state @ model.lm_head.weight.T, logits, **CLOSE)
    # Made without weights and filled afterwards, which leaves buffers (rotary frequencies) to be made anew.
    placed = WaveletGPTForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    assert torch.equal(placed(ids).logits, logits)
    half = WaveletGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    if half.model.rotary is not None:
        assert torch.equal(half.model.rotary.inv_freq, model.model.rotary.inv_freq)


def test_weights_that_a_checkpoint_lacks_start_as_they_should(tmp_path: Path) -> None:
    tiny_model(mixing="none").save_pretrained(tmp_path)
    for kind in ("learnable", "conv"):
        loaded = WaveletGPTForCausalLM.from_pretrained(tmp_path, mixing=kind)
        fresh = WaveletGPTForCausalLM(tiny_config(mixing=kind))
        for name, parameter in loaded.named_parameters():
            if "mixers" in name:
                assert torch.equal(parameter, fresh.get_parameter(name)), name


def test_settings_changed_while_loading_are_checked(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mixing='haar' is unknown"):
        WaveletGPTForCausalLM.from_pretrained(tmp_path, mixing="haar")


def test_what_is_uploaded_includes_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: set[str] = set()

    def upload(self: object, folder: Path, repo: str, before: dict[str, float], **_: object) -> None:
        uploaded.update(path.name for path in Path(folder).iterdir() if path.name not in before)

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: SimpleNamespace(repo_id="a/b"))
    monkeypatch.setattr(WaveletGPTForCausalLM, "_upload_modified_files", upload)
    tiny_model().save_pretrained(tmp_path, push_to_hub=True)
    assert uploaded >= {
        "model.safetensors",
        "modeling.py",
        "configuration.py",
        "mixer.py",
        "mixing.py",
        "decoding.py",
        "reference.py",
    }


def test_vocabulary_grows_and_stays_tied() -> None:
    for tied in (True, False):
        model, ids = tiny_model(tie_word_embeddings=tied), tokens()
        logits = model(ids).logits
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        model.resize_token_embeddings(VOCAB + 3)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert model.config.vocab_size == VOCAB + 3
        out = model(ids, labels=ids)
        assert out.logits.shape[-1] == VOCAB + 3
        torch.testing.assert_close(out.logits[..., :VOCAB], logits, **CLOSE)
        assert out.loss.isfinite()


# ---- cost ----


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_counted_flops_are_the_formula(architecture: str, tied: bool) -> None:
    n_kv_head = 2 if architecture == "llama" else 4
    model = tiny_model(
        architecture=architecture, mixing="none", tie_word_embeddings=tied, attn_implementation="eager",
        n_kv_head=n_kv_head,
    ).train()  # fmt: skip
    T = model.config.n_positions
    ids = tokens(1, T)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    formula = cost.flops_per_token(model)
    # The counter sees matrix products only; the formula counts biases and gains, 6 each, as weights too.
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    # 1 %: rotary angles, and that nothing flows back into the first block's input beyond the embedding.
    assert counter.get_total_flops() / T == pytest.approx(formula - 6 * vectors, rel=0.01)


@pytest.mark.parametrize("placement", ["block", "input"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_decoding_state_has_the_stated_size(mixing: str, placement: str) -> None:
    model = tiny_model(mixing=mixing, mix_placement=placement, mix_layers="inner", n_kv_head=2)
    cache = DynamicCache(config=model.config)
    model(tokens(1, 32), past_key_values=cache)  # the full context
    held = {"keys_values": 0, "mixing": 0}
    for layer in cache.layers:
        held["keys_values"] += layer.keys.nbytes + layer.values.nbytes
        held["mixing"] += sum(state.last().nbytes for state in getattr(layer, "states", {}).values())
    assert cost.decoding_state_bytes(model.config, itemsize=4) == held


def test_parameters_are_those_of_the_tensors(tmp_path: Path) -> None:
    model = tiny_model(mixing="learnable")
    tensors = {p.data_ptr(): p.numel() for p in model.state_dict().values()}
    mixers = sum(p.numel() for m in model.modules() if isinstance(m, Mixer) for p in m.parameters())
    assert cost.count_parameters(model) == (sum(tensors.values()), mixers)
    description = cost.describe(model)
    assert description["parameters"] == sum(tensors.values())
    assert description["flops_per_token"] > description["mixing_flops_per_token"] > 0


def test_mixing_flops_of_the_fixed_mean() -> None:
    # Windows 2, 2, 4, 4, 8, 8, 16, 16 take 1, 1, 2, 2, ... additions and a scaling each, and again for the gradient.
    config = tiny_config()
    assert config.mix_windows() == [2, 2, 4, 4, 8, 8, 16, 16]
    assert cost.mixing_flops_per_token(config) == 2 * 2 * sum(k + 1 for k in (1, 1, 2, 2, 3, 3, 4, 4))
    assert cost.mixing_flops_per_token(tiny_config(mixing="none")) == 0


# ---- accelerator ----


@pytest.mark.gpu
@pytest.mark.parametrize("mixing", MIXINGS)
def test_an_accelerator_gives_the_same_logits_and_gradients(mixing: str) -> None:
    model, ids = tiny_model(mixing=mixing), tokens()
    logits, expected = model(ids).logits, gradients(model, ids)
    model.cuda()
    # 1e-4: other summation orders, and matrix products that may use fewer bits.
    torch.testing.assert_close(model(ids.cuda()).logits.cpu(), logits, atol=1e-4, rtol=1e-3)
    for name, gradient in gradients(model, ids.cuda()).items():
        torch.testing.assert_close(gradient.cpu(), expected[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("mixing", ["none", "fixed", "learnable"])
def test_an_accelerator_compiles_it(mixing: str) -> None:
    model, ids = tiny_model(mixing=mixing, use_cache=False).cuda().train(), tokens().cuda()
    loss = model(ids, labels=ids).loss
    compiled = torch.compile(model, fullgraph=True)(ids, labels=ids).loss
    torch.testing.assert_close(compiled, loss, atol=1e-4, rtol=1e-4)
    compiled.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
