"""A user's mistake, told in one line: the thing, the value, the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend. The command line prints the message, without traceback, and exits with 2."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """What the user may have meant, to be appended to a message: `; did you mean "bytes"?`, or nothing."""
    known = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f'; did you mean "{known[near[0]]}"?' if near else ""
