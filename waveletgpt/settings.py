"""Dataclasses of settings: each value becomes what its field's type says, or is refused.

pydantic does that, in the same way for Python, the YAML of a recipe, an arm such as `none:lr=1e-3`, and run.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import typing
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Interval

from waveletgpt.errors import UserError, suggest

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Positive = Annotated[int, Gt(0)]
NotNegative = Annotated[int, Ge(0)]
Seed = Annotated[int, Interval(ge=0, le=2**31)]  # NumPy takes up to 2^32, and every further seed is one more
PositiveNumber = Annotated[float, Interval(gt=0, lt=math.inf)]
NotNegativeNumber = Annotated[float, Interval(ge=0, lt=math.inf)]
Share = Annotated[float, Interval(ge=0, le=1)]
SampleRate = Annotated[int, Interval(ge=1000, le=192_000)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base class of settings.

    Raises:
        UserError: a value that the type of its field does not allow.
    """

    prefix: ClassVar[str] = ""
    """What messages put before the names of these settings, as in `training.clip`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # Defaults are right. As help has nothing but defaults, it does not wait for pydantic to be imported.
            if value is not field.default and not isinstance(value, Settings):
                read = _read(type(self), field.name, value, self.prefix + field.name)
                object.__setattr__(self, field.name, read)


def _read(kind: type, name: str, value: Any, called: str) -> Any:
    """`value` as the type of the field `name` of `kind` has it; messages call the setting `called`."""
    from pydantic import ValidationError

    mistakes: list[Any] = []
    for reading in _readings(value):
        try:
            return _reader(kind, name).validate_python(reading)
        except ValidationError as error:
            mistakes += error.errors()
    first = mistakes[0]
    if first["type"] == "literal_error":
        check_choice(called, str(value), re.findall(r"'(.*?)'", first["ctx"]["expected"]))
    raise UserError(f"{called} {first['msg'].replace('Input should be', 'must be').partition(',')[0]}, got {value!r}")


def _readings(value: Any) -> list[Any]:
    """What to try `value` as: first its text, as if it stood in an arm, so that True is no number.

    A list is its items with commas between them. "none" may mean None, and "1e3" the integer 1000.
    """
    if value is None:
        return [None]
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    readings: list[Any] = [text]
    if text.lower() in ("none", "null"):
        readings.append(None)
    with contextlib.suppress(ValueError):
        readings.append(float(text))
    return readings


@functools.cache
def _reader(kind: type, name: str) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(typing.get_type_hints(kind, include_extras=True)[name])


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises UserError, with a suggestion, unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f'{name}: no "{value}"; use one of {", ".join(choices)}{suggest(value, choices)}')
