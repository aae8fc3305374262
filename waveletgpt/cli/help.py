"""The help of commands with many options: first the ones that people use first, with --help-all the rest, by group."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Suppress, arg

# Settings that --help shows, besides the command's own options.
FIRST = frozenset(
    [
        *(
            "modality",
            "preset",
            "architecture",
            "base_model",
            "mixing",
            "max_steps",
            "batch_size",
            "lr",
            "seed",
            "device",
        ),
        *("model.n_layer", "model.n_embd", "model.n_positions", "training.precision"),
        *("column", "length", "train_examples", "clip_seconds", "fold"),
    ]
)
# Of the command's own options, those for special occasions.
LATER = frozenset({"engine", "print_runs", "sweep_steps"})


def show_help(name: str, command: Any, everything: bool) -> typing.NoReturn:
    """Print what `command`, an instance with the defaults to show, can be given, and exit.

    Args:
        everything: all options; otherwise, of a command with `settings`, the first ones and how to see all.
    """
    kind: type = type(command)
    if hasattr(command, "settings"):
        own = {field.name for field in dataclasses.fields(command)}
        first = (own - LATER) | FIRST
        if "arms" in own:
            first -= {"mixing"}  # the arms say it
        if "sizes" in own:
            first -= {"max_steps", "model.n_layer", "model.n_embd"}  # the rungs say them
        kind = _for_help(command, lambda option: everything or option in first)
    try:
        tyro.cli(kind, prog=f"waveletgpt {name}", args=["--help"])
    finally:
        if hasattr(command, "settings") and not everything:
            print(f"The options that are used most; all of them: waveletgpt {name} --help-all", flush=True)
    raise AssertionError("tyro exits after help")


def _for_help(default: Any, shown: Callable[[str], bool], prefix: str = "", omit: bool = False) -> type:
    """A subclass of a command's class, or of a group's in it, that looks like it but for the options that are hidden.

    Its defaults are those of the instance. With `omit`, its options stand without its name in front.
    """
    kind = type(default)
    hints = typing.get_type_hints(kind, include_extras=True)
    types: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(kind)):
        hint, value = hints[name], getattr(default, name)
        if dataclasses.is_dataclass(value):
            marks, data = getattr(hint, "__metadata__", ()), name == "source"
            below = prefix if marks else f"{prefix}{name}."  # a mark says that the group's name is left out
            part = _for_help(value, shown, below, omit=data)
            types[name] = Annotated[part, arg(name="data")] if data else Annotated[part, *marks] if marks else part
            value = part()
        elif not shown(prefix + name):
            types[name] = Annotated[hint, Suppress]
        else:
            types[name] = Annotated[hint, OmitArgPrefixes] if omit else hint
        values[name] = dataclasses.field(default=value)
    members = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__annotations__": types, **values}
    return dataclasses.dataclass(frozen=True)(type(kind.__name__, (kind,), members))
