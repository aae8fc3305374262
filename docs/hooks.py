"""What the site adds to pages while it is built: the commands' real help; links that only a clone can follow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_HELP = re.compile(r"^<!-- help: (.*) -->$", re.MULTILINE)
_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./[^)]*\)")


def help_of(command: str) -> str:
    """What `waveletgpt COMMAND --help-all` prints, at 100 columns."""
    words = [sys.executable, "-m", "waveletgpt", *command.split(), "--help-all"]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).rstrip()


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put help texts in the place of their marks; links to files outside of docs/ become plain text."""
    commands = _HELP.findall(markdown)
    with ThreadPoolExecutor(2) as pool:
        texts = dict(zip(commands, pool.map(help_of, commands), strict=True))
    markdown = _HELP.sub(lambda mark: f"```text\n{texts[mark[1]]}\n```", markdown)
    return _OUTSIDE.sub(r"\1", markdown)
