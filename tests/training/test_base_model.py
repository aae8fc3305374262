"""Models of transformers in training and comparisons: as by hand, with all that a run has, and plain refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from tests.helpers import make_store, tiny_recipe, write_text
from waveletgpt import add_mixing, cli
from waveletgpt.classify.settings import ClassifierRecipe
from waveletgpt.cli.commands import Compare, options, plain
from waveletgpt.cli.main import parse
from waveletgpt.data import DataSettings, TokenStore, prepare
from waveletgpt.data.windows import FixedWindows, RandomWindows
from waveletgpt.errors import UserError
from waveletgpt.integrations.architecture import identity
from waveletgpt.integrations.huggingface import MIXINGS
from waveletgpt.model.cost import describe
from waveletgpt.report.probing import look_inside
from waveletgpt.runs.evaluation import evaluate_run, generate_from_run, print_info
from waveletgpt.runs.folder import RunFolder
from waveletgpt.training.compare import compare, parse_arms
from waveletgpt.training.ladder import plan as plan_ladder
from waveletgpt.training.recipe import Recipe, added_mixing_names
from waveletgpt.training.task import LanguageModeling
from waveletgpt.training.trainer import train

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 32, "initializer_range": 0.2}
KINDS = {"llama": SIZES, "qwen3": SIZES | {"num_key_value_heads": 1, "head_dim": 8}, "gpt_neox": SIZES}
LARGE = {"n_embd": None, "n_head": None}  # what tiny_recipe sets, and a config.json has


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json for each of `KINDS`."""
    folder = tmp_path_factory.mktemp("architectures")
    for kind, sizes in KINDS.items():
        save_config(folder / kind, kind, **sizes)
    return folder


def save_config(folder: Path, kind: str, **sizes: Any) -> Path:
    AutoConfig.for_model(kind, **sizes).save_pretrained(folder)
    return folder


def recipe_of(base: Path, **changes: object) -> Recipe:
    return tiny_recipe(**LARGE, base_model=str(base), **changes)


def built(store: TokenStore, recipe: Recipe) -> Any:
    return LanguageModeling(store).build_model(recipe)


@pytest.mark.parametrize("kind", KINDS)
def test_compare_and_what_follows(kind: str, store: TokenStore, folders: Path, tmp_path: Path, capsys: Any) -> None:
    out, arms = tmp_path / "out", ["none", "fixed:max_window=8" if kind == "llama" else "gate:max_window=8"]
    recipe = recipe_of(folders / kind, max_steps=6)
    summary = compare(recipe, store, out, data="words.txt", arms=arms)
    assert list(summary["arms"]) == arms
    stock, mixed = (arm["parameters"] for arm in summary["arms"].values())
    assert mixed - stock == (0 if kind == "llama" else 2 * 8)  # a gate for each mixed channel of both blocks
    page = (out / "report.html").read_text()
    assert "w=8" in page  # the picture of the hidden states, with their windows
    assert "could not be loaded and drawn" not in page
    for arm in arms:
        run = RunFolder.open(out / f"{arm.replace(':', '_')}-seed0")
        model = AutoModelForCausalLM.from_pretrained(run.path)
        assert model.config.vocab_size == store.vocab_size
        assert type(model).__name__.startswith("Wavelet") == (arm != "none")
        ids = torch.tensor([run.info["probe"]])
        cached = model(ids[:, :9], use_cache=True).past_key_values
        tail = model(ids[:, 9:], past_key_values=cached).logits
        assert torch.allclose(model(ids).logits[:, 9:], tail, atol=1e-4)
        found = evaluate_run(run.path, windows=recipe.eval_windows, device="cpu")
        assert found["nll"] == pytest.approx(run.curve()[-1][2], abs=1e-5)
        assert found["context"] == 16
        assert run.samples()
        assert run.info["result"]["breakdown"]["near_attention"]["share"] > 0
        text = generate_from_run(run.path, "the cat", tokens=20, device="cpu")[0]  # more than the context has room for
        assert text.startswith("the cat")
    print_info(str(run.path), Recipe(), 256, {})
    told = capsys.readouterr().out
    assert f"{kind}, 2 blocks, E=16, 2 heads, context 16, vocabulary {store.vocab_size}" in told
    assert "8 of 16 channels" in told
    assert "windows: 2 x3, 4 x3, 8 x2" in told


def test_filters_at_what_the_branches_read(store: TokenStore, folders: Path, tmp_path: Path) -> None:
    """By the recipe that this package's own models take."""
    out, recipe = tmp_path / "out", recipe_of(folders / "llama", max_steps=6)
    summary = compare(recipe, store, out, data="words.txt", arms=["none", "haar-inputs"])
    extra = summary["arms"]["haar-inputs"]["parameters"] - summary["arms"]["none"]["parameters"]
    assert extra == 2 * 2 * (4 * 2 + 4 * 4)  # two blocks, two sites; 4 channels with 2 taps, 4 with 4
    page = (out / "report.html").read_text()
    assert "block 2, attention_input" in page
    model = AutoModelForCausalLM.from_pretrained(out / "haar-inputs-seed0")
    assert model.config.wavelet_mixing["sites"] == ["attention_input", "mlp_input"]
    with pytest.raises(UserError, match="mix_start=haar has no effect on mixing fixed"):
        compare(recipe, store, tmp_path / "other", data="words.txt", arms=["none", "fixed:mix_start=haar"])


def by_hand(store: TokenStore, recipe: Recipe, base: Path) -> dict[str, torch.Tensor]:
    """Weights after the recipe's steps at a constant rate, with nothing of the package but mixing and batches."""
    config = AutoConfig.from_pretrained(base)
    config.vocab_size = store.vocab_size
    set_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(config)
    if recipe.mixing != "none":
        add_mixing(model, recipe.mixing)
    model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    windows = RandomWindows(store.split("train"), 16, recipe.max_steps * recipe.batch_size, recipe.seed)
    for step in range(recipe.max_steps):
        rows = [windows[step * recipe.batch_size + i] for i in range(recipe.batch_size)]
        inputs, targets = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "shift_labels"))
        loss = F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(("kind", "mixing"), [("llama", "none"), ("qwen3", "learnable"), ("gpt_neox", "fixed")])
def test_the_weights_are_those_of_training_by_hand(
    kind: str, mixing: str, store: TokenStore, folders: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folders / kind, mixing=mixing, max_steps=5, schedule="constant", warmup_steps=0, samples=0)
    run = train(recipe, store, tmp_path / "run", data="words.txt", show_progress=False)
    expected, found = by_hand(store, recipe, folders / kind), load_file(run.path / "model.safetensors")
    # Tied weights are saved once.
    assert set(found) <= set(expected)
    for name, value in found.items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_resuming_changes_no_bit(store: TokenStore, folders: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(folders / "llama", base)
    recipe = recipe_of(base, mixing="learnable", samples=0)
    whole = train(recipe, store, tmp_path / "whole", data="words.txt", show_progress=False)
    half = tmp_path / "half"
    shutil.copytree(whole.path, half)
    for path in half.iterdir():
        if path.name in ("model.safetensors", "checkpoint-12", "samples.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = RunFolder(half)
    run.update_info(status="interrupted")
    train(recipe, store, half, data="words.txt", resume=True, show_progress=False)
    left, right = (load_file(folder / "model.safetensors") for folder in (whole.path, half))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    # An architecture that is no longer what it was is not gone on with, nor compared with what it was.
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    run.update_info(status="interrupted")
    with pytest.raises(UserError, match="has changed since the run began"):
        train(recipe, store, half, data="words.txt", resume=True, show_progress=False)
    shutil.copytree(whole.path, tmp_path / "out" / "learnable-seed0")
    with pytest.raises(UserError, match="has changed since the run began"):
        compare(recipe, store, tmp_path / "out", data="words.txt", arms=["learnable", "none"], resume=True)


def test_all_arms_start_with_the_same_weights(store: TokenStore, folders: Path) -> None:
    models = [built(store, recipe_of(folders / "qwen3", mixing=mixing)) for mixing in added_mixing_names()]
    first = models[0].state_dict()
    for model in models[1:]:
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in first.items())
        assert identity(model.config) == identity(models[0].config)
    other = built(store, recipe_of(folders / "qwen3", mixing="none", seed=1))
    assert not torch.equal(other.state_dict()["lm_head.weight"], first["lm_head.weight"])


def test_the_token_between_documents_is_trained(store: TokenStore, folders: Path) -> None:
    """Llama keeps the embedding of the token that pads at 0, and the data's tokenizer pads with the one that ends."""
    model = built(store, recipe_of(folders / "llama"))
    end = store.load_tokenizer().eos_token_id
    assert model.config.eos_token_id == end
    assert model.model.embed_tokens.weight[end].abs().sum() > 0
    ids = torch.tensor([[end, 1, 2]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[end].abs().sum() > 0


def test_a_llama_costs_what_ours_costs(store: TokenStore, tmp_path: Path) -> None:
    """The package's own Llama blocks, counted by their configuration, are an independent count."""
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_inner": 24}
    base = save_config(tmp_path, "llama", **SIZES, tie_word_embeddings=True)
    for mixing in ("none", "fixed", "learnable"):
        theirs = describe(built(store, recipe_of(base, mixing=mixing)))
        ours = describe(built(store, tiny_recipe(architecture="llama", mixing=mixing, **sizes)))
        state = theirs.pop("state_bytes"), ours.pop("state_bytes")
        assert state[0]["keys_values"] == state[1]["keys_values"]
        for name, value in ours.items():
            assert theirs[name] == value, name


def test_what_a_gate_does_is_shown_as_a_kernel(store: TokenStore, folders: Path, tmp_path: Path) -> None:
    model = built(store, recipe_of(folders / "llama", mixing="gate"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.wavelet_mixing.gate.fill_(0.5)
    model.save_pretrained(tmp_path)
    found = look_inside(tmp_path, [1, 2, 3, 4])
    assert found.mixed is not None
    two = next(kernel for kernel in found.kernels if kernel.window == 2)
    assert two.taps.tolist() == [0.75, 0.25]
    expected = found.mixed.before[:, 0].copy()  # the first channel's window is 2
    expected[1:] = 0.75 * expected[1:] + 0.25 * found.mixed.before[:-1, 0]
    assert found.mixed.after[1:, 0] == pytest.approx(expected[1:], abs=1e-6)


# Trained weights.


@pytest.fixture(scope="module")
def trained(store: TokenStore, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Llama with its tokenizer, trained a little."""
    recipe = recipe_of(folders / "llama", mixing="none", max_steps=60, lr=1e-2, samples=0, eval_every=60, save_every=60)
    return train(recipe, store, tmp_path_factory.mktemp("runs") / "stock", data="words.txt", show_progress=False).path


@pytest.fixture
def read(trained: Path, tmp_path: Path) -> tuple[Recipe, TokenStore]:
    """A recipe that goes on with `trained`, and the data read as it asks."""
    recipe = recipe_of(trained, modality=None, from_pretrained=True, mixing="none", lr=3e-3)
    modality, settings = recipe.reading()
    assert (modality, settings.tokenizer) == ("bpe", str(trained))
    words = write_text(tmp_path / "words.txt")
    return recipe, prepare(words, modality, DataSettings(tokenizer=settings.tokenizer, cache_dir=str(tmp_path)), False)


def test_training_goes_on_where_the_weights_are(trained: Path, read: tuple[Recipe, TokenStore], tmp_path: Path) -> None:
    recipe, store = read
    recipe = recipe.override({"samples": 0}, "test")

    def curve(recipe: Recipe) -> list[tuple[int, float, float]]:
        run = train(recipe, store, tmp_path / recipe.mixing, data="words.txt", show_progress=False)
        return run.curve()

    none, delta, gate = (curve(recipe.override({"mixing": name}, "test")) for name in ("none", "delta", "gate"))
    fixed = curve(recipe.override({"mixing": "fixed", "pretrained": "replace"}, "test"))
    model = AutoModelForCausalLM.from_pretrained(trained)
    windows = FixedWindows(store.split("validation"), 16, recipe.eval_windows)
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(row["input_ids"][None]).logits[0], row["shift_labels"]).item() for row in windows
        ]
    assert none[0][2] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert delta[0][2] == pytest.approx(none[0][2], abs=1e-6)
    assert gate[0][2] == pytest.approx(none[0][2], abs=1e-6)
    assert fixed[0][2] > none[0][2] + 0.05
    for curve in (none, delta, gate, fixed):
        assert curve[-1][2] < curve[0][2]
    # A model that was given mixing goes on with it, and with no other.
    mixed = recipe.override({"base_model": str(tmp_path / "delta"), "mixing": "delta"}, "test")
    again = train(mixed, store, tmp_path / "again", data="words.txt", show_progress=False).curve()
    assert again[0][2] == pytest.approx(delta[-1][2], abs=1e-6)
    for changes, told in (({"mixing": "gate"}, "give mixing=delta"), ({"max_window": 8}, "its own model.max_window")):
        with pytest.raises(UserError, match=told):
            built(store, mixed.override(changes, "test"))
    with pytest.raises(UserError, match="has mixing already: name the model without mixing"):
        built(store, mixed.override({"from_pretrained": False}, "test"))


def test_weights_and_tokens_must_fit(
    trained: Path, read: tuple[Recipe, TokenStore], store: TokenStore, tmp_path: Path
) -> None:
    recipe, _ = read
    other = prepare(
        write_text(tmp_path / "others.txt"), "bpe", DataSettings(vocab_size=260, cache_dir=str(tmp_path)), False
    )
    with pytest.raises(UserError, match="another tokenizer than that of"):
        built(other, recipe)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained / "config.json", bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / name, bare)
    with pytest.raises(UserError, match=r"weights cannot be loaded from \.safetensors"):
        built(store, recipe.override({"base_model": str(bare)}, "test"))
    with pytest.raises(UserError, match="mixing=learnable ruins at first: give mixing=delta or gate"):
        built(store, recipe.override({"mixing": "learnable"}, "test"))


def test_the_command_line_goes_on_with_trained_weights(
    trained: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("WAVELETGPT_CACHE", str(tmp_path / "cache"))
    words = ["train", str(write_text(tmp_path / "words.txt")), "--model", str(trained), "--from-pretrained"]
    more = ["--max-steps", "4", "--batch-size", "4", "--device", "cpu", "--training.eval-windows", "4"]
    small = [*more, "--model.n-positions", "16", "--training.samples", "0", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, *small])
    assert stop.value.code == 2
    assert "has trained weights, which mixing=fixed ruins at first" in capsys.readouterr().err
    cli.main([*words, *small, "--mixing", "delta"])
    assert "validation loss" in capsys.readouterr().out
    # The data is found again, and read anew where its store is gone.
    shutil.rmtree(tmp_path / "cache")
    cli.main(["evaluate", str(tmp_path / "run"), "--windows", "4", "--device", "cpu"])
    assert "nats per token" in capsys.readouterr().out


# Settings.


def test_names_of_added_mixing_are_those_of_add_mixing() -> None:
    assert added_mixing_names() == ("none", *MIXINGS)


def test_printed_commands_give_the_same_recipe(folders: Path) -> None:
    recipe = recipe_of(folders / "llama", mixing="delta", from_pretrained=True, max_window=8)
    assert plain(parse("train", ["words.txt", *options(recipe)]).settings) == recipe
    command = Compare(settings=recipe, arms=("none", "delta"))  # type: ignore[arg-type]
    assert all("--from-pretrained" in line and f"--model={folders / 'llama'}" in line for line in command.commands())


def test_model_and_its_settings_go_side_by_side(folders: Path, capsys: Any) -> None:
    command = parse("compare", ["words.txt", "--model", str(folders / "llama"), "--model.n-positions", "8"])
    assert command.settings.base_model == str(folders / "llama")
    assert command.settings.model.n_positions == 8
    cli.main(["info", "--model", str(folders / "qwen3"), "--mixing", "delta", "--model.max-window", "8"])
    told = capsys.readouterr().out
    assert "qwen3, 2 blocks, E=16, 2 heads, context 32, vocabulary 256" in told
    assert "windows: 2 x3, 4 x3, 8 x2" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mixing": "ema"}, 'mixing: no "ema"; use one of none, fixed, learnable, delta, gate'),
        ({"n_layer": 3}, "model.n_layer=3 has no effect with base_model .*config.json has its sizes"),
        ({"dropout": 0.1}, "model.dropout=0.1 has no effect"),
        ({"mix_placement": "key"}, "mix_placement='key': a model of transformers is mixed at .* attention_input"),
        ({"mix_kernel_size": 3}, "model.mix_kernel_size=3 has no effect"),
        ({"architecture": "llama"}, "architecture=llama has no effect with a base_model"),
        ({"pretrained": "replace"}, "pretrained=replace has no effect on new weights"),
        ({"n_positions": 33}, "n_positions=33 is more than the 32 positions"),
        ({"max_window": 3}, "max_window=3 is not a power of two"),
        ({"mixing": "delta", "mix_edge": "partial"}, "delta"),
        ({"mix_layers": "0,5"}, "numbers of blocks from 0 to 1"),
    ],
)
def test_settings_that_do_not_go(changes: dict[str, Any], told: str, store: TokenStore, folders: Path) -> None:
    with pytest.raises(UserError, match=told):
        built(store, recipe_of(folders / "llama", **changes))


def test_models_that_are_refused(store: TokenStore, tmp_path: Path) -> None:
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    encoder = {name: value for name, value in SIZES.items() if name != "initializer_range"}
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "own-code").mkdir()
    code = {"model_type": "other", "auto_map": {"AutoConfig": "code.OtherConfig"}}
    (tmp_path / "own-code" / "config.json").write_text(json.dumps(code))
    uneven = save_config(tmp_path / "uneven", "llama", **SIZES)
    sizes = json.loads((uneven / "config.json").read_text()) | {"head_dim": 7}
    (uneven / "config.json").write_text(json.dumps(sizes))
    save_config(tmp_path / "bart", "bart", **small)
    save_config(tmp_path / "bert", "bert", **encoder)
    save_config(tmp_path / "vit", "vit", hidden_size=16)
    save_config(tmp_path / "bloom", "bloom", hidden_size=16, n_layer=1, n_head=2)
    save_config(tmp_path / "ours", "waveletgpt", n_embd=16, n_layer=1, n_head=2)
    refusals = {
        "nowhere": "it is neither a folder nor a model that the hub gives",
        "file": "is a file: name a folder with the config.json",
        "empty": "has no config.json: name a folder",
        "broken": "config.json cannot be read",
        "own-code": "needs its own code, which is not run here",
        "uneven": "config.json cannot be read .*even rotary dimension",
        "bart": "is an encoder-decoder",
        "bert": "sees later tokens",
        "vit": "is not a causal language model",
        "bloom": "no keyword arguments",
        "ours": "has mixing already: leave it out",
    }
    for name, told in refusals.items():
        with pytest.raises(UserError, match=told) as error:
            built(store, recipe_of(tmp_path / name, attention="eager"))
        assert "\n" not in str(error.value)
    built(store, recipe_of(tmp_path / "bloom", mixing="none", attention="eager"))
    with pytest.raises(UserError, match=r"cannot be built with training\.attention=sdpa"):
        built(store, recipe_of(tmp_path / "bloom", mixing="none"))


def test_an_arm_can_have_an_architecture_of_its_own(store: TokenStore, folders: Path) -> None:
    llama, qwen = folders / "llama", folders / "qwen3"
    arms = parse_arms(["fixed", f"delta:base_model={qwen}"], recipe_of(llama))
    kinds = [built(store, arm.recipe).config.model_type for arm in arms]
    assert kinds == ["llama", "qwen3"]
    with pytest.raises(UserError, match="use one of none, fixed, learnable, wavelet"):
        parse_arms(["delta"], tiny_recipe())


def test_trained_weights_need_a_model() -> None:
    with pytest.raises(UserError, match="from_pretrained needs a base_model"):
        Recipe(from_pretrained=True)


def test_classifiers_and_ladders_refuse(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="base_model is for language models"):
        ClassifierRecipe(base_model=str(folders / "llama"), mixing="none")
    told: dict[str, Any] = {"sizes": ["0.1M", "0.3M"], "tokens": ["1M"]}
    with pytest.raises(UserError, match="a base_model has its own: use `waveletgpt compare`"):
        plan_ladder(recipe_of(folders / "llama"), tmp_path, arms=["none"], **told)
    with pytest.raises(UserError, match="sets base_model, which a ladder"):
        plan_ladder(tiny_recipe(**LARGE), tmp_path, arms=[f"none:base_model={folders / 'llama'}"], **told)
