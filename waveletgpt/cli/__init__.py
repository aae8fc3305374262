"""The command line: `main.py` finds a command, `commands.py` has them all."""
