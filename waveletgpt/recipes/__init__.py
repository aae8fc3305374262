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
    """Where the file or folder `name` is. What is not there, but is below `recipes/` in this package, is found there.

    `recipes/architectures/llama` is found from any folder, then. Any other name is given back as a path.
    """
    path = Path(name)
    inside = HERE.parent / path
    return inside if path.parts[:1] == ("recipes",) and not path.exists() and inside.exists() else path


def load_recipe(name: str | Path) -> dict[str, Any]:
    """The settings of a recipe, by its path or by its name in this package.

    `data` and `compare` (arms, seeds) stand beside the settings of a run.

    Raises:
        UserError: there is no such recipe; it is unreadable, no YAML, or no mapping of settings.
    """
    import yaml

    # A file of one's own goes first, a folder that happens to have the name does not.
    named = str(name) in recipe_names() and not Path(name).is_file()
    path = HERE / f"{name}.yaml" if named else find(name)
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
