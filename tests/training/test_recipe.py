"""Recipes: precedence, types, suggestions, and the round trip through run.json."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waveletgpt.classify.settings import CLASSIFIER_PRESETS, ClassifierRecipe, ClassifierSettings
from waveletgpt.data import MODALITIES
from waveletgpt.errors import UserError
from waveletgpt.model.configuration import POOLINGS, STARTS, WAVELETS
from waveletgpt.recipes import HERE, find, load_recipe
from waveletgpt.training.compare import parse_arms
from waveletgpt.training.recipe import (
    PRESETS,
    Recipe,
    TrainingSettings,
    check_settings_are_read,
)


@given(
    st.fixed_dictionaries(
        {
            "preset": st.sampled_from(sorted(PRESETS)),
            "mixing": st.sampled_from(["none", "fixed", "ema"]),
            "max_steps": st.integers(1, 10**6),
            "lr": st.floats(1e-6, 1.0),
            "model": st.fixed_dictionaries({"n_layer": st.integers(1, 50), "dropout": st.none() | st.floats(0, 0.5)}),
            "training": st.fixed_dictionaries({"compile": st.booleans(), "threads": st.none() | st.integers(1, 9)}),
        }
    )
)
def test_round_trip_through_run_json(changes: dict) -> None:
    recipe = Recipe().override(changes, "test")
    assert Recipe.from_dict(recipe.as_dict()) == recipe


def test_preset_fills_what_is_not_set() -> None:
    settings = Recipe().override({"preset": "paper", "n_layer": 6, "dropout": 0.1}, "test").model_settings()
    assert (settings["n_layer"], settings["n_embd"], settings["n_positions"]) == (6, 128, 512)
    assert settings["embd_pdrop"] == settings["attn_pdrop"] == settings["resid_pdrop"] == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_stps": 3}, 'no setting "max_stps"; did you mean "max_steps"'),
        ({"model": {"n_layers": 3}}, 'no setting "model.n_layers"; did you mean "model.n_layer"'),
        ({"max_steps": "many"}, "recipe.yaml: max_steps must be a valid integer, got 'many'"),
        ({"max_steps": 1.5}, "max_steps must be a valid integer, got 1.5"),
        ({"max_steps": None}, "max_steps must be a valid integer, got None"),
        ({"training.compile": "maybe"}, "training.compile must be a valid boolean, got 'maybe'"),
        ({"max_steps": 0}, "max_steps must be greater than 0, got 0"),
        ({"lr": "inf"}, "lr must be less than inf, got 'inf'"),
        ({"lr": float("nan")}, "lr must be less than inf, got nan"),
        ({"seed": -1}, "seed must be greater than or equal to 0, got -1"),
        ({"workers": -1}, "training.workers must be greater than or equal to 0, got -1"),
        ({"warmup_steps": -5}, "training.warmup_steps must be greater than or equal to 0, got -5"),
        ({"weight_decay": float("nan")}, "training.weight_decay must be less than inf, got nan"),
        ({"dropout": float("nan")}, "model.dropout must be less than or equal to 1, got nan"),
        ({"beta2": 1}, "training.beta2 must be less than or equal to 0.999999, got 1"),
        ({"preset": "smal"}, 'preset: no "smal"; use one of tiny, small, paper, gpt2; did you mean "small"'),
        ({"mixing": "fixd"}, 'did you mean "fixed"'),
        ({"device": "gpu"}, 'device: no "gpu"'),
        ({"max_steps": datetime.date(2024, 1, 1)}, "max_steps must be a valid integer"),  # as YAML reads 2024-01-01
        ({"model": 5}, "recipe.yaml: model holds settings, one a line below it, not 5"),
        ({"precision": "fp16"}, 'training.precision: no "fp16"'),
        ({"modality": "byte"}, 'did you mean "bytes"'),
        ({"model": {1: 2}}, 'no setting "model.1"'),
        ({"batch_size": True}, "batch_size must be a valid integer, got True"),
        ({"lr": True}, "lr must be a valid number, got True"),
        ({"n_layer": "2.5"}, "model.n_layer must be a valid integer, got '2.5'"),
        ({"sample_rate": 0}, "recipe.yaml: sample_rate must be greater than or equal to 1000, got 0"),
    ],
)
def test_mistakes_name_the_setting_the_value_and_the_mend(changes: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        Recipe().override(changes, "recipe.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        *(("max_steps", value, 2) for value in (2, 2.0, "2", "2.0", "2e0")),
        *(("lr", value, 0.001) for value in (0.001, "0.001", "1e-3")),
        *(("training.compile", value, True) for value in (True, "true", "True", "yes")),
        *(("training.threads", value, None) for value in (None, "none", "None", "null")),
        ("model.position_embedding", "none", "none"),
        ("source.tokenizer", "none", "none"),
        *(("source.include", value, "*.md,*.rst") for value in ("*.md,*.rst", ["*.md", "*.rst"])),
        ("source.column", 1, "1"),
    ],
)
def test_values_are_read_in_their_type(name: str, given: object, read: object) -> None:
    """As Python, YAML and arms give them."""
    group, _, setting = name.rpartition(".")
    for recipe in (Recipe(), Recipe(max_steps=7, lr=1.0, training=TrainingSettings(threads=3))):
        changed = recipe.override({name: given}, "test")
        found = getattr(getattr(changed, group) if group else changed, setting)
        assert (found, type(found)) == (read, type(read))
    built = type(getattr(Recipe(), group) if group else Recipe())(**{setting: given})
    assert getattr(built, setting) == read


def test_choices_are_those_of_the_tables() -> None:
    """They are written twice, as types and as tables, for the tables may need libraries that help must not load."""

    def choices(kind: type, name: str) -> set[str]:
        hint = get_type_hints(kind)[name]
        return {choice for option in (hint, *get_args(hint)) for choice in get_args(option) if isinstance(choice, str)}

    assert choices(Recipe, "preset") == set(PRESETS)
    assert choices(ClassifierRecipe, "preset") == set(CLASSIFIER_PRESETS)
    assert choices(Recipe, "modality") == set(MODALITIES)
    assert choices(ClassifierSettings, "mix_wavelet") == set(WAVELETS)
    assert choices(ClassifierSettings, "mix_start") == set(STARTS)
    assert choices(ClassifierSettings, "pooling") == set(POOLINGS)


@given(st.sampled_from([Recipe, ClassifierRecipe]), st.integers(100, 10**6), st.integers(4, 512), st.integers(1, 8))
def test_evaluations_cost_under_five_percent(kind: type[Recipe], steps: int, batch: int, accumulation: int) -> None:
    """A held-out sequence is read forwards only: a third of what one that is trained on costs."""
    recipe = kind().override({"max_steps": steps, "batch_size": batch, "accumulation": accumulation}, "test")
    evaluations = 1 + -(-steps // recipe.eval_every)
    assert evaluations * recipe.eval_windows / 3 < 0.05 * steps * batch * accumulation
    assert 3 <= evaluations <= 41
    settled = recipe.with_evaluations()
    assert (settled.training.eval_every, settled.training.eval_windows) == (recipe.eval_every, recipe.eval_windows)


def test_long_runs_are_evaluated_as_ever() -> None:
    assert (Recipe(max_steps=25_000).eval_every, Recipe(max_steps=25_000).eval_windows) == (625, 128)


def test_what_is_set_wins_over_what_a_run_has_recorded_and_that_over_the_default() -> None:
    recorded = {"training": {"eval_every": 7, "eval_windows": 128}}
    found = Recipe().override({"eval_every": 3}, "test").with_evaluations(recorded)
    assert (found.training.eval_every, found.training.eval_windows) == (3, 128)
    assert Recipe().with_evaluations(recorded).training.eval_every == 7


def test_mix_layers_takes_indices() -> None:
    assert Recipe().override({"mix_layers": "0,2"}, "t").model_settings()["mix_layers"] == [0, 2]
    assert Recipe().override({"mix_layers": [0, 2]}, "t").model_settings()["mix_layers"] == [0, 2]
    with pytest.raises(UserError, match="mix_layers"):
        Recipe().override({"mix_layers": "first"}, "t").model_settings()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"max_steps: [", "is not valid YAML"),
        (b"- a\n- b\n", "name: value"),
        (b"\xff\xfe\x00binary", "it is no text file"),
    ],
)
def test_broken_recipe_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_missing_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the recipe .*No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_recipes_of_the_package_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder; a file of one's own goes before one of the package."""
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo") == load_recipe("recipes/demo.yaml") == load_recipe(HERE / "demo.yaml")
    assert find("recipes/architectures/llama") == HERE / "architectures" / "llama"
    (tmp_path / "demo").write_text("max_steps: 7")
    assert load_recipe("demo") == {"max_steps": 7}
    with pytest.raises(UserError, match=r"cannot read the recipe demos: No such file or directory; did you mean .demo"):
        load_recipe("demos")
    (tmp_path / "paper").mkdir()
    assert load_recipe("paper") == load_recipe(HERE / "paper.yaml")
    assert find("paper") == Path("paper")  # a base model's name is not a recipe's
    arms = parse_arms(["none", "haar-inputs:max_window=8", "smear"], Recipe())
    assert [arm.name for arm in arms] == ["none", "haar-inputs:max_window=8", "smear"]
    assert arms[1].recipe.mixing == "learnable"
    assert arms[1].recipe.model.max_window == 8
    assert arms[2].recipe.model.mix_placement is None  # the mixing of that name, not the recipe
    with pytest.raises(UserError, match=r'no "haar-input".*did you mean "haar-inputs"'):
        parse_arms(["none", "haar-input"], Recipe())


def test_every_recipe_of_the_project_loads() -> None:
    recipes = sorted(HERE.glob("*.yaml"))
    assert recipes
    for path in recipes:
        changes = load_recipe(path)
        for extra in ("data", "task"):
            changes.pop(extra, None)
        arms = (changes.pop("compare", None) or {}).get("arms", [changes.get("mixing", "none")])
        kind = ClassifierRecipe if changes.get("preset") in CLASSIFIER_PRESETS else Recipe
        recipe = kind().override(changes, str(path))
        check_settings_are_read(recipe, [recipe.mixing, *(arm.partition(":")[0] for arm in arms)])
        for arm in parse_arms(arms, recipe):
            arm.recipe.model_settings()


def test_narrow_models_start_with_weights_that_keep_a_signal_as_it_is() -> None:
    narrow = ClassifierRecipe().override({"n_embd": 16}, "test")
    assert narrow.model_settings()["initializer_range"] == 0.25
    assert narrow.override({"initializer_range": 0.02}, "test").model_settings()["initializer_range"] == 0.02
    assert Recipe().override({"n_embd": 64}, "test").model_settings()["initializer_range"] == 0.125
    assert "initializer_range" not in Recipe().override({"preset": "gpt2"}, "test").model_settings()


def test_arms_override_settings() -> None:
    arms = parse_arms(["none", "none:n_layer=12,lr=1e-3", "fixed:max_window=4"], Recipe())
    assert [arm.recipe.mixing for arm in arms] == ["none", "none", "fixed"]
    assert (arms[1].recipe.model.n_layer, arms[1].recipe.lr) == (12, 1e-3)
    assert arms[2].recipe.model.max_window == 4
    assert len({arm.folder(0) for arm in arms}) == 3
    assert all("/" not in arm.folder(0) and ":" not in arm.folder(0) for arm in arms)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([], "at least one arm"),
        (["none", "none"], "names none twice"),
        (["none", "wavelets"], '`arms`: no "wavelets"'),
        (["none:n_layer"], '"n_layer" is not name=value'),
        (["none:layers=3"], 'no setting "layers"'),
        (["none", "fixed: lr=1e-3", "fixed:lr=1e-3"], "twice, once as fixed: lr=1e-3"),
        (["none", "none:seed=3"], "`arms=none:seed=3`: all arms share the data and the seeds"),
        (["none", "none:modality=bytes"], "all arms share the data and the seeds"),
    ],
)
def test_bad_arms(arms: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arms(arms, Recipe())
