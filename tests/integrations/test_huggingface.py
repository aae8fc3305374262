"""`add_mixing` on models of transformers: each test is a column of the table in docs/your-model.md, each model a row.

All models are tiny and random; the exact comparisons are in float64 where the architecture can.
"""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    LlamaForCausalLM,
)

from tests.integrations.tiny_models import (
    MIXINGS,
    SETTINGS,
    close,
    mixed,
    mixers,
    placement,
    stock,
    tokens,
)
from waveletgpt import add_mixing
from waveletgpt.errors import UserError
from waveletgpt.integrations.huggingface import WaveletMixing, _find_layers, upgrade_cache
from waveletgpt.model.mixer import starting_taps
from waveletgpt.ops import reference

FULL = ("llama", "qwen3", "gpt2", "gpt_neox")
each_model = pytest.mark.parametrize("name", SETTINGS)
each_full = pytest.mark.parametrize("name", FULL)
each_cached = pytest.mark.parametrize("name", [*FULL, "mistral", "gemma3_text"])  # the last two have sliding caches
each_mixing = pytest.mark.parametrize("mixing", MIXINGS)
# Without mixing, too, transformers does not keep packed documents of these apart by their positions.
STOCK_CONFUSES = {"gpt_oss", "opt", "lfm2", "falcon_h1", "qwen3_next"}
LENGTHS = (5, 11, 8, 1)
ROWS = [tokens(1, n, seed=n)[0] for n in LENGTHS]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generate(
    model: Any, x: torch.Tensor, n: int = 12, mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    mask = torch.ones_like(x) if mask is None else mask
    return model.generate(x, attention_mask=mask, max_new_tokens=n, do_sample=False, **options)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """ROWS with padding on the left, of a token whose embedding isn't zero, and the mask."""
    longest = max(LENGTHS)
    x, mask = torch.full((len(ROWS), longest), 7), torch.zeros(len(ROWS), longest, dtype=torch.long)
    for i, row in enumerate(ROWS):
        x[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    return x, mask


def check_padded(model: Any, **options: Any) -> None:
    x, mask = padded()
    y = generate(model, x, mask=mask, **options)[:, x.shape[1] :]
    for i, row in enumerate(ROWS):
        assert torch.equal(y[i], generate(model, row[None])[0, len(row) :]), f"row of {len(row)} tokens"


# All models.


@each_model
@torch.no_grad()
def test_logits_are_those_of_the_definition_in_hooks(name: str) -> None:
    model, plain = mixed(name, "learnable"), stock(name)
    owner, layers = _find_layers(plain)

    def filtered(mixer: WaveletMixing, hidden: torch.Tensor) -> torch.Tensor:
        y = reference.wavelet_mix(hidden[..., :16], mixer.windows, mixer.taps())
        return torch.cat([y, hidden[..., 16:]], -1)

    def after(mixer: WaveletMixing, module: Any, args: Any, out: Any) -> Any:
        return (filtered(mixer, out[0]), *out[1:]) if isinstance(out, tuple) else filtered(mixer, out)

    def before(mixer: WaveletMixing, module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (filtered(mixer, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": filtered(mixer, kwargs["hidden_states"])}

    for ours, layer in zip(getattr(_find_layers(model)[0], layers), getattr(owner, layers), strict=True):
        assert [site for site, _ in ours.wavelet_mixers()] == placement(name).split("+")
        for site, mixer in ours.wavelet_mixers():
            if site == "block":
                layer.register_forward_hook(partial(after, mixer))
            else:
                reader = getattr(layer, ours.wavelet_readers[site])
                reader.register_forward_pre_hook(partial(before, mixer), with_kwargs=True)
    x = tokens(2, 23)
    got = model(x).logits
    close(got, plain(x).logits)
    assert (got - stock(name)(x).logits).abs().max() > 1e-3


@each_model
@torch.no_grad()
def test_cached_is_full(name: str) -> None:
    """Greedy tokens equal those of full recomputation, in batches with padding on the left those of each row alone."""
    model, x = mixed(name), tokens(2, 7)
    got = generate(model, x)
    for _ in range(12):
        x = torch.cat([x, model(input_ids=x, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, x)
    check_padded(model)


def packed_and_separate(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of documents packed in a row, told apart by positions, and of each by itself."""
    documents = [tokens(1, n, seed=n) for n in (5, 1, 9, 3)]
    positions = torch.cat([torch.arange(x.shape[1])[None] for x in documents], 1)
    packed = model(torch.cat(documents, 1), position_ids=positions, use_cache=False).logits
    parts = packed.split([x.shape[1] for x in documents], 1)
    return [(part, model(x, use_cache=False).logits) for part, x in zip(parts, documents, strict=True)]


@each_model
@torch.no_grad()
def test_packed_is_separate(name: str) -> None:
    if name in STOCK_CONFUSES:
        assert max((got - alone).abs().max().item() for got, alone in packed_and_separate(stock(name))) > 1
        return
    for got, alone in packed_and_separate(mixed(name)):
        close(got, alone)


@each_model
@torch.no_grad()
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, x = mixed(name, "learnable", dtype=torch.float32), tokens(2, 9)
    model.save_pretrained(tmp_path)
    other, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(other) is type(model)
    close(other(x).logits, model(x).logits, 1e-6)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["base_model_type"]) == ("wavelet_mixed", model.config.model_type)
    assert saved["architectures"] == [type(model).__name__]


@each_model
def test_checkpointing_changes_nothing(name: str) -> None:
    """Neither loss nor gradients, with padding, and with another forward pass before the backward one."""

    def gradients(reentrant: bool | None) -> dict[str, torch.Tensor]:
        model = mixed(name, "learnable").train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        x = tokens(2, 12)
        mask = torch.ones_like(x)
        mask[0, :5] = 0
        loss = model(x, attention_mask=mask, labels=x).loss
        model(tokens(2, 9), labels=tokens(2, 9))
        loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    expected = gradients(None)
    assert any("wavelet_mixing" in key for key in expected)
    for reentrant in (False, True) if name in FULL else (False,):
        got = gradients(reentrant)
        assert got.keys() == expected.keys()
        for key in got:
            close(got[key], expected[key], 1e-7)


# Four models, the rest.


@each_full
@each_mixing
@torch.no_grad()
def test_chunks_with_padding_are_the_whole(name: str, mixing: str) -> None:
    """Chunks that hold nothing but padding, and chunks of one token, among them."""
    model = mixed(name, mixing)
    x, mask = padded()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(x, attention_mask=mask, position_ids=positions).logits
    for size in (1, 3):
        cache, parts = DynamicCache(config=model.config), []
        for first in range(0, x.shape[1], size):
            now, end = slice(first, first + size), min(first + size, x.shape[1])
            out = model(x[:, now], attention_mask=mask[:, :end], position_ids=positions[:, now], past_key_values=cache)
            parts.append(out.logits)
        real = mask == 1
        close(torch.cat(parts, 1)[real], whole[real])
    for i, row in enumerate(ROWS):
        close(whole[i, -len(row) :], model(row[None]).logits[0])


@each_cached
def test_static_cache(name: str) -> None:
    """Also beyond a sliding window, where keys and values are overwritten."""
    model, x = mixed(name), tokens(2, 7)
    assert torch.equal(generate(model, x, cache_implementation="static"), generate(model, x))
    check_padded(model, cache_implementation="static")
    # Chunks that end in padding, which only the mask can tell from a document's first token.
    x, mask = padded()
    chunks = generate(model, x, mask=mask, cache_implementation="static", prefill_chunk_size=4)
    assert torch.equal(chunks, generate(model, x, mask=mask))


@each_full
def test_beams(name: str) -> None:
    model, x = mixed(name), tokens(2, 7)
    assert torch.equal(generate(model, x, num_beams=3), generate(model, x, num_beams=3, use_cache=False))


@each_cached
def test_sampled(name: str) -> None:
    """The same seed gives the same tokens with every cache and with none, rows padded on the left among them."""
    model, (x, mask) = mixed(name), padded()

    def sample(**options: Any) -> torch.Tensor:
        torch.manual_seed(5)
        return model.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=True, top_k=20, **options)

    expected = sample(use_cache=False)
    assert not torch.equal(expected, generate(model, x, mask=mask))
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(sample(**options), expected), options


@each_cached
def test_prompt_in_chunks(name: str) -> None:
    model, x = mixed(name), tokens(2, 23)
    assert torch.equal(generate(model, x, prefill_chunk_size=5), generate(model, x))


@each_cached
def test_guessed_tokens(name: str) -> None:
    """Prompt lookup, and an assistant that is wrong at times."""
    model, assistant = mixed(name), mixed(name)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    x = tokens(1, 9)
    expected = generate(model, x, 20)
    assert torch.equal(generate(model, x, 20, prompt_lookup_num_tokens=4), expected)
    assert torch.equal(generate(model, x, 20, assistant_model=assistant), expected)


@each_full
@torch.no_grad()
def test_crop(name: str) -> None:
    model, x, y, z = mixed(name), tokens(1, 9), tokens(1, 6, seed=8), tokens(1, 3, seed=9)
    cache = DynamicCache(config=model.config)
    upgrade_cache(cache)
    cache.activate_past_recording()
    model(x, past_key_values=cache)
    model(y, past_key_values=cache)
    cache.crop(-4)
    got = model(z, past_key_values=cache).logits
    close(got, model(torch.cat([x, y[:, :2], z], 1)).logits[:, -3:])
    cache.crop(-3)
    close(model(z, past_key_values=cache).logits, got)


@each_full
@torch.no_grad()
def test_copies(name: str) -> None:
    """Deep copies and pickles of the model, and deep copies of a prompt's cache."""
    model, x = mixed(name, "learnable"), tokens(1, 9)
    expected, other = model(x).logits, copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    close(other(x).logits, expected)
    assert (model(x).logits - expected).abs().max() > 1e-4
    buffer = io.BytesIO()
    torch.save(other, buffer)
    buffer.seek(0)
    close(torch.load(buffer, weights_only=False)(x).logits, expected)
    cache = DynamicCache(config=other.config)
    other(x[:, :5], past_key_values=cache)
    for _ in range(2):
        close(other(x[:, 5:], past_key_values=copy.deepcopy(cache)).logits, expected[:, 5:])


@each_full
@torch.no_grad()
def test_hidden_states_are_mixed(name: str) -> None:
    """Also where they were asked for before mixing was added."""
    model, other, x = mixed(name), stock(name), tokens(1, 9)
    other(x, output_hidden_states=True)
    add_mixing(other, mix_placement=placement(name))
    states = model(x, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    for got, expected in zip(other(x, output_hidden_states=True).hidden_states, states, strict=True):
        close(got, expected)
    owner, layers = _find_layers(model)
    seen: list[torch.Tensor] = []
    getattr(owner, layers)[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    close(seen[0], states[1])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled(name: str) -> None:
    """Forward and backward as one graph."""
    torch._dynamo.reset()
    model, x = mixed(name, "learnable", dtype=torch.float32).train(), tokens(2, 16)

    def gradients(run: Any) -> list[torch.Tensor]:
        model.zero_grad()
        run(input_ids=x, use_cache=False).logits.logsumexp(-1).mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for got, expected in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled_decoding(name: str) -> None:
    """A static cache, the forward pass one graph, rows padded on the left."""
    torch._dynamo.reset()
    model, (x, mask) = mixed(name), padded()
    expected = generate(model, x, mask=mask)
    compiling = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compiling}
    assert torch.equal(generate(model, x, mask=mask, **static), expected)


@pytest.mark.parametrize("mixing", ["learnable", "delta", "gate"])
@torch.no_grad()
def test_offloaded_parameters_are_used(mixing: str) -> None:
    """Accelerate brings in what a module owns only when that module itself is called."""
    model, x = mixed("llama", mixing), tokens(2, 9)
    expected, generated = model(x).logits, generate(model, x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for mixer in mixers(model) for parameter in mixer.parameters())
    close(model(x).logits, expected)
    assert torch.equal(generate(model, x), generated)


@torch.no_grad()
def test_a_mixed_config_makes_a_mixed_model() -> None:
    config = mixed("llama", "learnable").config
    made = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    assert [type(mixer) for mixer in mixers(made)] == [WaveletMixing] * 9  # three sites in three blocks
    assert made.config.wavelet_mixing == config.wavelet_mixing


@each_full
@torch.no_grad()
def test_a_configuration_makes_other_models_without_mixing(name: str) -> None:
    config = stock(name).config
    torch.manual_seed(0)
    first = AutoModelForCausalLM.from_config(config)
    mixed_one = add_mixing(first)
    assert mixed_one.config is not config
    assert {id(module.config) for module in mixed_one.modules() if hasattr(module, "config")} == {id(mixed_one.config)}
    torch.manual_seed(0)
    second = AutoModelForCausalLM.from_config(config)
    assert not mixers(second)
    assert type(second.config) is type(config)
    assert not hasattr(config, "wavelet_mixing")


@torch.no_grad()
def test_models_saved_by_earlier_versions_are_mixed_at_the_block(tmp_path: Path) -> None:
    model, x = add_mixing(stock("llama", dtype=torch.float32)), tokens(2, 9)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key in ("edge", "sites", "start"):
        del config["wavelet_mixing"][key]
    path.write_text(json.dumps(config))
    close(AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, model(x).logits, 1e-6)


def test_taps_that_start_as_haars_at_what_the_branches_read(tmp_path: Path) -> None:
    """As `--mixing learnable --model.mix-start haar --model.mix-placement input` of this package's own models."""
    sites = ["mlp_input", "attention_input"]  # short: "input"
    model = add_mixing(stock("qwen3", dtype=torch.float32), "learnable", mix_placement=sites, mix_start="haar")
    assert model.config.wavelet_mixing["sites"] == sites[::-1]
    assert len(mixers(model)) == 6
    for mixer in mixers(model):
        for taps, (window, n) in zip(mixer.taps() or [], mixer.groups, strict=True):
            assert torch.equal(taps, starting_taps("haar", n, window))
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    x = tokens(2, 9)
    close(other(x).logits, model(x).logits, 1e-6)
    other.train()(x, labels=x).loss.backward()
    assert all(bool((mixer.deviation.grad != 0).any()) for mixer in mixers(other))


def test_a_reader_called_alone_says_so() -> None:
    model = mixed("llama")
    with pytest.raises(RuntimeError, match="LlamaMLP was called outside its layer"):
        model.model.layers[0].mlp(torch.randn(1, 3, 32, dtype=torch.float64))


@each_full
@pytest.mark.parametrize("mixing", ["delta", "gate"])
@torch.no_grad()
def test_some_mixings_start_where_the_model_is(name: str, mixing: str) -> None:
    x = tokens(2, 9)
    assert torch.equal(add_mixing(stock(name), mixing=mixing)(x).logits, stock(name)(x).logits)


@pytest.mark.parametrize("mixing", ["fixed", "learnable"])
@torch.no_grad()
def test_partial_edges(mixing: str, tmp_path: Path) -> None:
    """What a window is divided by counts real tokens of the document: cached, padded, packed, saved and loaded."""
    model, x = mixed("llama", mixing, mix_edge="partial"), tokens(2, 7)
    assert (model(x).logits - mixed("llama", mixing)(x).logits).abs().max() > 1e-3
    assert torch.equal(generate(model, x, num_beams=3), generate(model, x, num_beams=3, use_cache=False))
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}):
        assert torch.equal(generate(model, x, **options), generate(model, x, use_cache=False))
        check_padded(model, **options)
    for got, alone in packed_and_separate(model):
        close(got, alone)
    model.save_pretrained(tmp_path)
    close(AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, model(x).logits)


@torch.no_grad()
def test_some_layers() -> None:
    model = add_mixing(stock("llama"), layers=[1])
    assert [layer.wavelet_mixing is None for layer in model.model.layers] == [True, False, True]
    x = tokens(2, 7)
    assert torch.equal(generate(model, x), generate(model, x, use_cache=False))
    assert model.state_dict().keys() - stock("llama").state_dict().keys() == {"model.layers.1.wavelet_mixing.window"}


# Saving, loading and trained weights.

REMOTE = """
import sys
sys.modules["waveletgpt"] = None  # as if it were not installed
import torch, transformers
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
for options in ({}, {"trust_remote_code": False}):
    try:
        AutoModelForCausalLM.from_pretrained(folder, **options)
        print("loaded")
    except Exception:
        print("refused")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
x, expected = torch.load(folder + "/expected.pt")
with torch.no_grad():
    print((model(x).logits - expected).abs().max().item() < 1e-5)
model.save_pretrained(folder + "/again")
print(type(model).__name__)
"""


@torch.no_grad()
def test_loads_without_the_package_or_not_at_all(tmp_path: Path) -> None:
    """What a program without this package does: it refuses, or runs the code of the checkpoint."""
    model, x = mixed("llama", "learnable", dtype=torch.float32), tokens(2, 9)
    model.save_pretrained(tmp_path)
    torch.save((x, model(x).logits), tmp_path / "expected.pt")
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path)], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.stdout.split() == ["refused", "refused", "True", "WaveletLlamaForCausalLM"], done.stderr[-2000:]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    close(again(x).logits, model(x).logits, 1e-5)


def test_the_checkpoint_s_own_code_beside_the_package(tmp_path: Path) -> None:
    """Its classes are others, but what they make is mixed, and known to be."""
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
import waveletgpt
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model.model.layers[0].wavelet_mixing).__module__.split(".")[0])
x, expected = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    print((model(x).logits - expected).abs().max().item() < 1e-5)
try:
    waveletgpt.add_mixing(model)
except ValueError as error:
    print("refused")
"""
    model, x = mixed("llama", "learnable", dtype=torch.float32), tokens(2, 9)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.save((x, model(x).logits), tmp_path / "expected.pt")
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env)
    module, *rest = done.stdout.split()
    assert module in ("transformers_modules", "waveletgpt"), done.stderr[-2000:]
    assert rest == ["True", "refused"], done.stderr[-2000:]


def test_a_class_named_outright_says_that_keys_are_left_over(tmp_path: Path) -> None:
    mixed("llama", dtype=torch.float32).save_pretrained(tmp_path)
    _, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.rpartition(".")[2] for key in report["unexpected_keys"]} == {"window"}


def test_trained_weights(tmp_path: Path) -> None:
    """`fixed` would ruin them, so it must be said; a config of the same name, with random weights, is no such case."""
    stock("llama", dtype=torch.float32).save_pretrained(tmp_path)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    for mixing in ("fixed", "learnable"):
        with pytest.raises(UserError, match=f'trained weights, which mixing="{mixing}" ruins at first: give'):
            add_mixing(load().train(), mixing=mixing)
        assert mixers(add_mixing(load(), mixing=mixing, pretrained="replace"))
    x = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(add_mixing(load(), mixing="delta")(x).logits, load()(x).logits)
    fresh = AutoModelForCausalLM.from_config(load().config)
    assert fresh.config._name_or_path
    assert mixers(add_mixing(fresh))
    # It is not the model of that name any more.
    assert not fresh.config._name_or_path


def test_stock_weights_into_the_mixed_class(tmp_path: Path) -> None:
    """Mixers that a checkpoint lacks start as they should, not as what was in memory."""
    stock("llama", dtype=torch.float32).save_pretrained(tmp_path)
    made = add_mixing(stock("llama", dtype=torch.float32), mixing="learnable")
    model, report = type(made).from_pretrained(tmp_path, config=made.config, output_loading_info=True)
    assert len(report["missing_keys"]) == 6
    with pytest.raises(UserError, match="WaveletLlamaForCausalLM needs a config with wavelet_mixing"):
        type(made).from_pretrained(tmp_path)
    for mixer in mixers(model):
        assert bool((mixer.deviation == 0).all())
        assert mixer.window.tolist() == [2, 4]
