"""The library speaks of settings, the command line of its options: one is made of the other, nothing else changes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waveletgpt.cli import main
from waveletgpt.cli.commands import COMMANDS
from waveletgpt.cli.wording import as_options, options
from waveletgpt.errors import reworded, tell

SETTINGS = [(command, name) for command, kind in COMMANDS.items() for name in options(kind)]
NEVER = {
    "data",
    "run_folder",
    "files",
    "runs",
    "what",
    "task",
    "foo",
    "model",
    "training",
    "model.foo",
    "source.column",
}
# Prose, paths, values: anything but a setting between backticks.
PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="`", exclude_categories=["C"]), max_size=40)


@pytest.mark.parametrize(
    ("command", "library", "line"),
    [
        ("train", "`out=runs/x` is a file; name a folder", "--out runs/x is a file; name a folder"),
        ("compare", "add `resume=True` to go on with it", "add --resume to go on with it"),
        ("ladder", "`out=a b/c`: another process is training there", "--out a b/c: another process is training there"),
        ("train", "`resume=True` with other data: use another `out`", "--resume with other data: use another --out"),
        ("train", "with 3: give `batch_size=8`", "with 3: give --batch-size 8"),
        (
            "compare",
            "`arms=none:lr=a`: lr must be a valid number, got 'a'",
            "--arms none:lr=a: lr must be a valid number, got 'a'",
        ),
        ("compare", '`arms`: no "fixd"; use one of', '--arms: no "fixd"; use one of'),
        ("lra", "`arms` names none twice", "--arms names none twice"),
        ("compare", "`seeds` must be at least 1, got 0", "--seeds must be at least 1, got 0"),
        ("compare", "`engine=ray` decides; leave `workers` out", "--engine ray decides; leave --workers out"),
        ("train", "a shorter `model.n_positions`", "a shorter --model.n-positions"),
        (
            "train",
            "lower `lr` than 1, longer `training.warmup_steps`",
            "lower --lr than 1, longer --training.warmup-steps",
        ),
        ("train", "`device=cuda`: this torch finds none", "--device cuda: this torch finds none"),
        ("train", "one process: `training.fsdp` has", "one process: --training.fsdp has"),
        ("classify", "`preset=clips` does not fit this data", "--preset clips does not fit this data"),
        ("lra", "or cut them with `length`", "or cut them with --length"),
        ("evaluate", '`split`: no "tset"; use', '--split: no "tset"; use'),
        ("evaluate", "`batch_size=0` must be at least 1", "--batch-size 0 must be at least 1"),
        ("evaluate", "`context` is 17: give 1 ... 16", "--context is 17: give 1 ... 16"),
        ("predict", "`top=0` must be at least 1", "--top 0 must be at least 1"),
        ("report", '`baseline`: no arm "x" in y', '--baseline: no arm "x" in y'),
        ("data prepare", "for all, `modality=chars`", "for all, --modality chars"),
        ("train", "as chars; `modality` changes that: bpe", "as chars; --modality changes that: bpe"),
        ("train", "with `modality=bpe`, `include='*.py'` or so", "with --modality bpe, --include '*.py' or so"),
        ("train", "leave `data_dir` out", "leave --data-dir out"),
        (
            "train",
            "try `encoding=cp1252`, leave it out with `exclude`",
            "try --encoding cp1252, leave it out with --exclude",
        ),
        ("train", "by position, `column=0 ... 3`, or", "by position, --column 0 ... 3, or"),
        ("data prepare", "free some space or set `cache_dir`", "free some space or set --cache-dir"),
        ("data prepare", "`listops_count`, `listops_seed`", "--listops-count, --listops-seed"),
        ("train", "`base_model=gpt2`", "--model gpt2"),
        ("train", "`training.packing=False`", "--training.no-packing"),
        ("train", "`model.mix_residual=True`", "--model.mix-residual True"),  # no flag: it takes True, False or None
        # Not options of that command, or no settings between backticks.
        ("evaluate", "go on with `resume=True`", "go on with `resume=True`"),
        ("lra", "`base_model=gpt2`", "`base_model=gpt2`"),
        ("train", "r.yaml: lr must be a valid number, got 'a'", "r.yaml: lr must be a valid number, got 'a'"),
        ("train", "ask it with `waveletgpt predict`", "ask it with `waveletgpt predict`"),
        ("train", "runs/`out`x and x`out` stay", "runs/`out`x and x`out` stay"),
    ],
)
def test_messages_name_the_options_that_they_named_before(command: str, library: str, line: str) -> None:
    assert as_options(library, COMMANDS[command]) == line


@given(st.sampled_from(SETTINGS), PLAIN, PLAIN, PLAIN)
def test_only_settings_change(setting: tuple[str, str], before: str, value: str, after: str) -> None:
    command, name = setting
    kind = COMMANDS[command]
    option = options(kind)[name]
    assert as_options(f"{before}{name}={value} {name}{after}", kind) == f"{before}{name}={value} {name}{after}"
    for written, typed in [(f"{name}={value}", option.given(value)), (name, option.name)] if value else []:
        told = as_options(f"{before} `{written}` {after}", kind)
        assert told == f"{before} {typed} {after}"
        assert as_options(told, kind) == told
        assert typed.split(" ")[0] in (option.name, option.off)


@given(st.sampled_from(sorted(COMMANDS)), st.text("`=.x out_resume/ ", max_size=40))
def test_twice_is_once(command: str, text: str) -> None:
    once = as_options(text, COMMANDS[command])
    assert as_options(once, COMMANDS[command]) == once


@given(st.sampled_from(sorted(COMMANDS)), st.sampled_from(sorted(NEVER)), PLAIN.filter(bool))
def test_no_option_is_invented(command: str, name: str, value: str) -> None:
    kind = COMMANDS[command]
    for text in (f"give `{name}={value}`", f"give `{name}`"):
        if name not in options(kind):
            assert as_options(text, kind) == text


def test_notes_are_reworded_within_the_block_only(capsys: pytest.CaptureFixture[str]) -> None:
    with reworded(str.upper):
        tell("loud")
    tell("quiet")
    assert capsys.readouterr().err == "LOUD\nquiet\n"


def test_the_command_line_prints_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake, and a note on the way, as a user sees them."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "report.html").touch()
    (tmp_path / "short.txt").write_text("a short text")
    for words, expected in (
        (["compare", "--out", tmp_path / "taken"], "add --resume to go on with it"),
        (["data", "prepare", tmp_path / "short.txt", "--cache-dir", tmp_path / "c"], "; --modality changes"),
    ):
        with contextlib.suppress(SystemExit):
            main([*map(str, words)])
        told = capsys.readouterr().err
        assert expected in told
        assert "`" not in told
