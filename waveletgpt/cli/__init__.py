"""The command line: `main.py` finds a command; `commands.py`, `classifiers.py` and `data.py` have them."""

from waveletgpt.cli.main import main

__all__ = ["main"]
