"""What the user is told: a mistake, in one line (the thing, the value, the mend), and notes on the way.

A setting stands in a message between backticks, as Python writes it: `resume=True`, `out=runs/x`, `training.clip`. The
command line tells its options by that.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator

_rewordings: list[Callable[[str], str]] = []


class UserError(ValueError):
    """A mistake the user can mend. The command line prints the message, without traceback, and exits with 2."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """What the user may have meant, to be appended to a message: `; did you mean "bytes"?`, or nothing."""
    known = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f'; did you mean "{known[near[0]]}"?' if near else ""


def tell(text: str) -> None:
    """Print a line on standard error, reworded where `reworded` says so."""
    for reword in _rewordings:
        text = reword(text)
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def reworded(by: Callable[[str], str]) -> Iterator[None]:
    """Within this block `by` is applied to all that `tell` prints."""
    _rewordings.append(by)
    try:
        yield
    finally:
        _rewordings.remove(by)
