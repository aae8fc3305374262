"""The command line: `main.py` finds a command, `commands.py` has them all."""

from waveletgpt.cli.main import main

__all__ = ["main"]
