"""The command line's entry: finds the command, reads `--recipe`, and tells mistakes in one line. See commands.py."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

from waveletgpt import __version__
from waveletgpt.errors import UserError, reworded, suggest, tell
from waveletgpt.recipes import load_recipe
from waveletgpt.training import processes

HELP: dict[str, str] = {
    "train DATA": "train one model",
    "compare DATA": "train arms side by side and report the speed-up",
    "ladder DATA": "arms at several sizes and lengths of training: does a lead last?",
    "lra TASK": "the same for classifiers, on the Long Range Arena",
    "classify DATA": "the same for classifiers of recordings",
    "predict RUN FILE...": "classes of files",
    "evaluate RUN": "loss, perplexity, bits per byte on held-out data",
    "generate RUN": "continue a prompt",
    "report RUN...": "write report.html from run folders",
    "info PRESET|RUN": "parameters, FLOPs and state that mixing adds",
    "data list": "data sets known by name",
    "data prepare DATA": "turn data into tokens, as training would",
}


# Kept free of tyro, so that it is instant.
USAGE = "\n".join(
    [
        "usage: waveletgpt COMMAND ... [--help]",
        "",
        "Pre-train GPT-style models with multi-scale (wavelet) structure, and measure how much sooner they learn.",
        "",
        *(f"  {name:<20}{what}" for name, what in HELP.items()),
        "",
        "DATA is a file, a folder, an archive, an address (https://, s3://, gs://, az://, hf://datasets/), a name from",
        "`waveletgpt data list`, or hf:OWNER/NAME; or several, each with a weight, to be mixed: a/=0.7 b/=0.3.",
        "Each command explains its options with --help; with --help-all those of special occasions, too.",
    ]
)


def _defaults(kind: type, words: list[str]) -> Any:
    """The command with the settings of its `--recipe` file as defaults, or None without one."""
    path = None
    for i, word in enumerate(words):
        if word == "--recipe" and i + 1 < len(words):
            path = words[i + 1]
        elif word.startswith("--recipe="):
            path = word.removeprefix("--recipe=")
    names = {f.name for f in dataclasses.fields(kind)}
    if path is None or "recipe" not in names:
        return None
    changes = load_recipe(path)
    command: dict[str, Any] = {"recipe": path}
    compare = changes.pop("compare", None) or {}
    if not isinstance(compare, dict) or not set(compare) <= {"arms", "seeds"}:
        raise UserError(f"{path}: compare holds arms and seeds, nothing else")
    if not isinstance(compare.get("arms", []), list) or not isinstance(compare.get("seeds", 1), int):
        raise UserError(f"{path}: compare needs a list and a number, as in {{arms: [none, fixed], seeds: 3}}")
    default = kind()
    for name, value in [(key, changes.pop(key, None)) for key in ("data", "task")] + list(compare.items()):
        several = isinstance(getattr(default, name, None), tuple)
        if name in ("data", "task") and isinstance(value, str) and several:
            value = [value]
        texts = isinstance(value, list) and several and all(isinstance(item, str) for item in value) and value
        if name in ("data", "task") and not (texts or isinstance(value, str | None)):
            raise UserError(f"{path}: {name} is {value!r}, not a text such as `{name}: imdb`")
        if name in names and value is not None:
            command[name] = tuple(map(str, value)) if isinstance(value, list) else value
    return dataclasses.replace(default, settings=default.settings.override(changes, str(path)), **command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits 0, 1 (diverged), 2 (a mistake of the user's), 130 (interrupted)."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        with plain_errors():  # whoever reads may stop early, as `head` does
            print(USAGE, flush=True)
        return
    if words[0] in ("-V", "--version"):
        print(f"waveletgpt {__version__}")
        return
    with plain_errors():
        commands = {" ".join(name.split()[: 2 if name.startswith("data ") else 1]) for name in HELP}
        size = 2 if words[0] == "data" and len(words) > 1 and not words[1].startswith("-") else 1
        name = " ".join(words[:size])
        if name == "data":
            print("usage: waveletgpt data list | waveletgpt data prepare DATA [--help]")
            if len(words) == 1:
                sys.exit(2)
            return
        if name not in commands:
            raise UserError(f'no command "{name}"; there are {", ".join(sorted(commands))}{suggest(name, commands)}')
    with reworded(lambda text: _in_words_of(name, text)), plain_errors():
        with processes.agreed():
            command = parse(name, words[size:])
        command.run()


def _in_words_of(name: str, text: str) -> str:
    """A message of the library in the words of the command `name`; what takes time is imported only to tell it."""
    from waveletgpt.cli.commands import COMMANDS
    from waveletgpt.cli.wording import as_options

    return as_options(text, COMMANDS[name])


def parse(name: str, words: list[str]) -> Any:
    """The command `name` with its options."""
    import tyro

    from waveletgpt.cli.commands import COMMANDS
    from waveletgpt.cli.help import show_help

    kind = COMMANDS[name]
    default = _defaults(kind, words)
    asked = {"-h", "--help", "--help-all"} & set(words)
    if asked and (default is not None or "settings" in {field.name for field in dataclasses.fields(kind)}):
        show_help(name, kind() if default is None else default, "--help-all" in asked)
    words = ["--help" if word == "--help-all" else word for word in words]
    options: dict[str, Any] = {} if default is None else {"default": default}
    with one_line_usage_errors(name):
        return tyro.cli(kind, prog=f"waveletgpt {name}", args=words, **options)


def _unstyled(told: io.StringIO) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", told.getvalue()).splitlines()


@contextlib.contextmanager
def one_line_usage_errors(name: str) -> Iterator[None]:
    """tyro tells a mistyped option in a box of many lines; keep what it says, in one."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        box = "│╭╰╮╯─-|+ \t"
        lines = [line.strip(box) if line.strip(box) == "" else line.strip("│╭╰╮╯─| \t") for line in _unstyled(told)]
        first = [line for line in lines if line][1:] or ["bad options"]
        ends = ("Perhaps", "For full", "Argument helptext")
        message = " ".join(itertools.takewhile(lambda line: not line.startswith(ends), first))
        choice = re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", message)
        if choice is not None:
            value, option, rest = choice.groups()
            choices = sorted({*re.findall(r"'([^']*)'", rest)} - {"None"})  # tyro has them in any order
            raise UserError(
                f'{option}: no "{value}"; use one of {", ".join(choices)}{suggest(value, choices)}'
            ) from None
        wrong = re.match(r"Error parsing (\S+): (.*)", message)
        if wrong is not None:
            option, reason = wrong.groups()
            number = re.match(r"(could not convert string to float|invalid literal for int\(\)).*: ('.*')", reason)
            if number is not None:
                kind = "a number" if "float" in number[1] else "an integer"
                raise UserError(f"{option} must be {kind}, got {number[2]}") from None
            if not option.startswith("-"):  # the settings' own message, which names the setting
                raise UserError(reason) from None
        options = (line for line in lines[lines.index(first[0]) :] if line.startswith("--"))
        near = next((line.split()[0].rstrip(",") for line in options), None)
        hint = f'; did you mean "{near}"?' if near and "Unrecognized" in message else f"; see waveletgpt {name} --help"
        raise UserError(message.rstrip(".") + hint) from None


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """A user's mistake is one line and exit code 2; so is a full disk or a missing permission.

    Of several processes the first tells what all of them know, and each what it alone knows.
    """
    try:
        yield
    except processes.Told:
        _stop(None, 2)
    except UserError as error:
        _stop(str(error), 2)
    except KeyboardInterrupt:
        _stop("stopped", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _stop(f"{error.filename or 'file'}: {error.strerror or error}", 2)
    except Exception as error:
        kind = type(error).__name__
        told = processes.first()
        if kind == "Diverged":
            _stop(str(error) if told else None, 1)
        if kind == "Interrupted":
            _stop(f"{error}; go on with the same command and --resume" if told else None, 130)
        if processes.lost(error):
            _stop("another process of this run has ended; go on with the same command and --resume", 1)
        raise


def _stop(message: str | None, code: int) -> None:
    """Print the message, if there is one to tell, and exit."""
    if message is not None:
        number = "" if processes.first() else f"process {processes.rank()} of {processes.count()}: "
        tell(f"waveletgpt: {number}{' '.join(message.split())}")
    if processes.count() > 1:
        # torchrun ends the others as soon as one has ended; they are about to end by themselves, with this code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)
