"""The library's messages in the words of the command line: `resume=True` is --resume there."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from typing import NamedTuple

from tyro.conf import Positional, Suppress

_SETTING = re.compile(r"(?<![\w`])`([a-z_][a-z0-9_]*(?:\.[a-z0-9_]+)*)(?:=([^`]+))?`(?![\w`])")


class Option(NamedTuple):
    """An option of a command, and for a flag the one that switches it off."""

    name: str
    off: str | None = None

    def given(self, value: object, between: str = " ") -> str:
        """What is typed to give it this value."""
        if self.off is not None and str(value) in ("True", "False"):
            return self.name if str(value) == "True" else self.off
        return f"{self.name}{between}{value}"


def as_options(text: str, command: type) -> str:
    """`text`, with each setting that stands in it between backticks as an option, if the command has such an option.

    `resume=True` becomes --resume, `training.clip=1` --training.clip 1, `out` --out; all else stays as it is.
    """
    known = options(command)

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in known:
            return found[0]
        return known[name].name if value is None else known[name].given(value)

    return _SETTING.sub(option, text)


@functools.cache
def options(command: type) -> dict[str, Option]:
    """The options of a command by the names of the settings in Python, which are dotted in a group."""
    return {name: _option(path, flag) for name, (path, flag) in _fields(command).items()}


def _option(path: tuple[str, ...], flag: bool) -> Option:
    *groups, name = path
    off = f"--{'.'.join([*groups, f'no-{name}'])}" if flag else None
    return Option(f"--{'.'.join(path)}", off)


def _fields(kind: type) -> dict[str, tuple[tuple[str, ...], bool]]:
    """The names of settings, the words of their options, and whether these are flags."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found: dict[str, tuple[tuple[str, ...], bool]] = {}
    for name in (field.name for field in dataclasses.fields(kind)):
        marks = getattr(hints[name], "__metadata__", ())
        if Positional in marks or Suppress in marks:
            continue
        typed = hints[name].__origin__ if marks else hints[name]
        word = next((mark.name for mark in marks if getattr(mark, "name", None) is not None), name.replace("_", "-"))
        if not dataclasses.is_dataclass(typed):
            found[name] = ((word,), typed is bool)
        elif word:
            inner = _fields(typing.cast(type, typed))
            found |= {f"{name}.{key}": ((word, *path), flag) for key, (path, flag) in inner.items()}
        else:
            found |= _fields(typing.cast(type, typed))
    return found
