"""The recipes of this package, one YAML file each, and how a recipe is found and read.

A recipe holds the settings that differ from the defaults. Some are whole experiments (`demo`, `reviews-llama`), some
a filter at its sites (`haar-inputs`, `canon-a`), for an arm of a comparison.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from waveletgpt.errors import UserError, suggest

HERE = Path(__file__).parent


@cache
def recipe_names() -> tuple[str, ...]:
    """Names of the recipes in this package."""
    return tuple(sorted(path.stem for path in HERE.glob("*.yaml")))


@cache
def filter_names() -> tuple[str, ...]:
    """Names of the recipes in this package that set the mixing, so that they can be an arm of a comparison."""
    return tuple(name for name in recipe_names() if "mixing" in load_recipe(name))


def find(name: str | Path) -> Path:
    """Where `name` is: as a path, or else in this package (`demo`, `recipes/demo.yaml`, `recipes/architectures/llama`).

    A name that is in neither place is given back as a path.
    """
    path = Path(name)
    if path.exists():
        return path
    if str(name) in recipe_names():
        return HERE / f"{name}.yaml"
    inside = HERE.parent / path
    return inside if path.parts[:1] == ("recipes",) and inside.exists() else path


def load_recipe(name: str | Path) -> dict[str, Any]:
    """The settings of a recipe, by its path or by its name in this package.

    `data` and `compare` (arms, seeds) stand beside the settings of a run.

    Raises:
        UserError: there is no such recipe; it is unreadable, no YAML, or no mapping of settings.
    """
    import yaml

    path = find(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text file"
        meant = suggest(Path(name).stem, recipe_names()) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read the recipe {name}: {reason}{meant}") from None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{name} must hold settings as `name: value` lines, such as `max_steps: 1200`")
    return value
