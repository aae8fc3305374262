"""The command line as a user meets it: help at once, one line and exit code 2 for a mistake, real work end to end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers import write_text
from waveletgpt import cli
from waveletgpt.cli.commands import COMMANDS
from waveletgpt.cli.wording import options

SMALL = [
    *("--preset", "tiny", "--max-steps", "6", "--batch-size", "4", "--device", "cpu", "--model.n-positions", "16"),
    *("--model.n-embd", "16", "--model.n-head", "2", "--training.eval-windows", "4", "--training.threads", "1"),
    *("--training.samples", "1", "--training.sample-tokens", "4"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVELETGPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    data = write_text(folder / "words.txt")
    out = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WAVELETGPT_CACHE", str(folder / "cache"))
        cli.main(["compare", str(data), "--modality", "chars", "--out", str(out), *SMALL])
    return out


def run(*words: object) -> int:
    """Exit code of the command line, run in this process."""
    try:
        cli.main([*map(str, words)])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_help_needs_no_heavy_library() -> None:
    """--help must be instant: neither torch nor transformers may be imported for it (a timed test would be noise)."""
    code = (
        "import sys; sys.orig_argv = ['python', '-m', 'waveletgpt']\n"
        "from waveletgpt import cli\n"
        "for words in ('--help', 'train --help', 'compare --help-all', 'ladder --help', 'classify -h', 'data list'):\n"
        "    try: cli.main(words.split())\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'scipy', 'pyarrow', 'datasets', 'pydantic'}\n"
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stderr.strip() == "set()"
    for word in ("train", "compare", "--max-steps", "--model.n-head", "--data-dir", "tiny-shakespeare"):
        assert word in result.stdout


def heads(text: str) -> dict[str, str]:
    """Each option of a help text, as in `-h, --help`, and the box that it is in."""
    found, box = {}, ""
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        if title := re.match(r"\W{1,3}((?:\w+ )?options|positional arguments)\W+$", line):
            box = title[1]
        elif option := re.match(r"[│| ]? ?(--?[a-z].*?)(  | ?[│|]?$)", line):
            found[option[1]] = box
    return found


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_is_documented(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the full help, with its default; the short one has the first ones of these, and says how to see all."""
    monkeypatch.setenv("COLUMNS", "120")
    assert run(*command.split(), "--help-all") == 0
    text = capsys.readouterr().out
    whole = heads(text)
    shown = {word for head in whole for word in re.findall(r"--[\w.-]+", head)}
    known = {word for option in options(COMMANDS[command]).values() for word in option if word}
    assert shown - {"--help", "--base-model"} == known
    defaults = text.count("(default: ") + text.count("(required)") + text.count("(default:\n")
    assert defaults >= len(whole) - 1
    assert run(*command.split(), "--help") == 0
    text = capsys.readouterr().out
    short = heads(text)
    assert len(short) <= 25
    assert set(short.items()) <= set(whole.items())
    long = len(whole) > 25
    assert (f"waveletgpt {command} --help-all" in text.splitlines()[-1]) is long
    if long and command != "data prepare":
        assert {"model options", "training options", "data options"} <= set(whole.values())
        assert "--lr FLOAT" in short


def test_help_shows_the_defaults_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("max_steps: 77\nmodel: {n_layer: 5}\ncompare: {seeds: 3}\n")
    assert run("compare", "--recipe", recipe, "--help") == 0
    text = capsys.readouterr().out
    for option, default in (("--max-steps", "77"), ("--model.n-layer", "5"), ("--seeds", "3")):
        described = re.split(r"\n\W*--", text[text.index(f"{option} ") :])[0]  # up to the next option
        assert f"(default: {default})" in described, option


def test_compare_then_every_other_command(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one = trained / "fixed-seed0"
    assert run("evaluate", one, "--split", "test", "--json", "--device", "cpu") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["split"] == "test"
    assert value["nll"] > 0
    assert run("generate", one, "--prompt", "the cat", "--samples", "2", "--tokens", "5", "--device", "cpu") == 0
    first = capsys.readouterr().out
    assert first.count("the cat") == 2
    assert run("generate", one, "--prompt", "the cat", "--samples", "2", "--tokens", "5", "--device", "cpu") == 0
    assert capsys.readouterr().out == first  # seeded
    assert run("info", one) == 0
    assert "windows" in capsys.readouterr().out
    summary = json.loads((trained / "summary.json").read_text())
    assert run("report", trained, "--out", tmp_path / "again") == 0
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["arms"] == summary["arms"]
    assert run("report", one, "--out", tmp_path / "one") == 0
    assert (tmp_path / "one" / "report.html").is_file()


def test_a_run_of_another_reading_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", write_text(tmp_path / "words.txt"), "--modality", "chars", "--out", tmp_path / "run", *SMALL]
    assert run(*words) == 0
    monkeypatch.setattr("waveletgpt.data.READING", 99)
    assert run(*words, "--resume") == 0
    assert run("evaluate", tmp_path / "run", "--windows", 2) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_unknown_characters_of_a_prompt_are_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", trained / "none-seed0", "--prompt", "the CAT é", "--tokens", 4, "--device", "cpu") == 0
    told = capsys.readouterr()
    assert "the model does not know 'C', 'A', 'T', 'é': read as end of text" in told.err
    assert run("generate", trained / "none-seed0", "--prompt", "the cat", "--tokens", 4, "--device", "cpu") == 0
    assert "does not know" not in capsys.readouterr().err


def test_recipe_file_gives_defaults_that_options_override(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_text(tmp_path / "words.txt")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"data: {data}\nmodality: chars\npreset: tiny\nmax_steps: 6\nbatch_size: 4\ndevice: cpu\nn_layer: 1\n"
        "model: {n_positions: 16, n_embd: 16, n_head: 2}\ntraining: {eval_windows: 4, samples: 0}\n"
        "compare: {arms: [none, ema], seeds: 1}\n"
    )
    out = tmp_path / "out"
    assert run("compare", "--recipe", recipe, "--out", out, "--max-steps", "4") == 0
    info = json.loads((out / "ema-seed0" / "run.json").read_text())
    assert info["recipe"]["max_steps"] == 4
    assert info["model"]["n_layer"] == 1
    assert info["recipe"]["data"] == str(data)


def mistakes(tmp: Path) -> dict[str, tuple[list[object], str]]:
    """Name -> (words, what the one line must say)."""
    words = write_text(tmp / "words.txt")
    (tmp / "empty.txt").write_text("")
    (tmp / "short.txt").write_text("a short text")
    (tmp / "binary.txt").write_bytes(bytes(range(256)) * 50)
    (tmp / "nothing").mkdir()
    (tmp / "broken.yaml").write_text("max_steps: [")
    (tmp / "other.yaml").write_text("max_stps: 5")
    (tmp / "cut.zip").write_bytes(b"PK\x03\x04 not really")
    with zipfile.ZipFile(tmp / "none.zip", "w"):
        pass
    (tmp / "arms.yaml").write_text("compare: {arms: fixed}")
    (tmp / "task.yaml").write_text("task: 5")
    (tmp / "broken_run").mkdir()
    (tmp / "broken_run" / "run.json").write_text("{")
    (tmp / "taken").mkdir()
    (tmp / "taken" / "letter.txt").write_text("mine")
    train = ["train", words, "--modality", "chars", "--out", tmp / "run", *SMALL]
    return {
        "no such file": (["train", tmp / "nofile.txt"], "nofile.txt"),
        "mistyped data set": (["train", "tiny-shakespear"], 'did you mean "tiny-shakespeare"'),
        "empty file": (["train", tmp / "empty.txt"], "empty"),
        "empty folder": (["train", tmp / "nothing"], "nothing"),
        "too short": (["train", tmp / "short.txt", "--modality", "chars", "--out", tmp / "run", *SMALL], "too short"),
        "binary as text": (["train", tmp / "binary.txt", "--modality", "chars", "--out", tmp / "run"], "binary"),
        "broken archive": (["train", tmp / "cut.zip"], "cut.zip"),
        "empty archive": (["train", tmp / "none.zip"], "none.zip"),
        "modality": ([*train, "--modality", "charz"], 'did you mean "chars"'),
        "preset": ([*train, "--preset", "smal"], 'did you mean "small"'),
        "mixing": ([*train, "--mixing", "fixd"], 'did you mean "fixed"'),
        "device": ([*train, "--device", "gpu"], 'no "gpu"'),
        "option": ([*train, "--max-stps", "3"], 'did you mean "--max-steps"'),
        "number": ([*train, "--max-steps", "many"], "--max-steps"),
        "negative": ([*train, "--lr", "-1"], "lr must be greater than 0"),
        "heads": ([*train, "--model.n-head", "3"], "n_embd=16 is not a multiple of n_head=3"),
        "window": ([*train, "--model.max-window", "3"], "max_window=3 is not a power of two"),
        "command": (["trian"], 'did you mean "train"'),
        "arm": (["compare", words, "--arms", "none", "fixxed"], 'did you mean "fixed"'),
        "missing recipe": ([*train, "--recipe", tmp / "no.yaml"], "no.yaml"),
        "broken recipe": ([*train, "--recipe", tmp / "broken.yaml"], "not valid YAML"),
        "arms in recipe": (["compare", words, "--recipe", tmp / "arms.yaml"], "{arms: [none, fixed], seeds: 3}"),
        "task in recipe": (["lra", "--recipe", tmp / "task.yaml"], "task is 5, not a text"),
        "flex attention": ([*train, "--device", "cpu", "--training.attention", "flex_attention"], "use sdpa or eager"),
        "unknown in recipe": ([*train, "--recipe", tmp / "other.yaml"], 'did you mean "max_steps"'),
        "no run": (["evaluate", tmp / "nothing"], "not a run folder"),
        "no folder": (["generate", tmp / "nowhere"], "no run folder"),
        "broken run": (["report", tmp / "broken_run"], "run.json"),
        "taken folder": ([*train, "--out", tmp / "taken"], "not empty"),
        "taken folder, before the data": (["train", tmp / "missing.txt", "--out", tmp / "taken"], "not empty"),
        "taken by other files": (["compare", tmp / "missing.txt", "--out", tmp / "taken"], "already holds other files"),
        "out is a file": ([*train, "--out", words], "is a file"),
        "out below a file": ([*train, "--out", words / "run"], str(words)),
        "preset or run": (["info", "smal"], 'did you mean "small"'),
        "vocabulary": ([*train, "--modality", "bpe", "--vocab-size", "3"], "vocab"),
    }


NAMES = sorted(
    [
        *("no such file", "mistyped data set", "empty file", "empty folder", "too short", "binary as text"),
        *("broken archive", "empty archive", "modality", "preset", "mixing", "device", "option", "number", "negative"),
        *("heads", "window", "command", "arm", "missing recipe", "broken recipe", "unknown in recipe", "no run"),
        *("no folder", "broken run", "taken folder", "out is a file", "out below a file", "preset or run"),
        *(
            "vocabulary",
            "arms in recipe",
            "task in recipe",
            "flex attention",
            "taken folder, before the data",
            "taken by other files",
        ),
    ]
)


@pytest.mark.parametrize("name", NAMES)
def test_mistakes_are_one_line_and_exit_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = mistakes(tmp_path)[name]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(*words) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("waveletgpt: ")
    assert len([line for line in told if line.startswith("waveletgpt: ")]) == 1
    assert not any("Traceback" in line for line in told)
    assert expected in told[-1]
    for path, content in before.items():
        assert path.read_bytes() == content, f"{path} was changed"


def test_no_mistake_is_left_out() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert sorted(mistakes(Path(folder))) == NAMES


def test_truncated_model_is_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained / "none-seed0", copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for command in ("generate", "evaluate"):
        assert run(command, copy, "--device", "cpu") == 2
        assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "command", "message"),
    [
        ("tokenizer.json", b'{"version": \xff', "generate", "the tokenizer in .* cannot be loaded"),
        ("tokenizer_config.json", b"{", "generate", "the tokenizer in .* cannot be loaded"),
        ("config.json", b"{", "info", "the model in .* cannot be loaded"),
        ("run.json", b"[]", "evaluate", "run.json has schema None"),
        ("run.json", b'{"schema": 1, "data": 3}', "report", "run.json is damaged: data is 3"),
        ("run.json", b'{"schema": 1, "data": {}}', "evaluate", "run.json is damaged: it has no data.fingerprint"),
        ("run.json", b'{"schema": 1, "recipe": {"training": []}}', "info", r"run.json is damaged: training is \[\]"),
        ("run.json", b'{"schema": 1, "arm": "a", "seed": 0, "status": "x"}', "info", "damaged: it has no command"),
    ],
)
def test_damaged_files_of_a_run_are_named(
    file: str, content: bytes, command: str, message: str, trained: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(trained / "none-seed0", tmp_path / "run")
    (tmp_path / "run" / file).write_bytes(content)
    assert run(command, tmp_path / "run") == 2
    assert re.search(message, capsys.readouterr().err)


def test_damaged_figures_of_a_model_are_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "none-seed0", tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    whole = json.loads(file.read_text())
    for name, value, message in (
        ("parameters", None, r"damaged: it has no model\.parameters"),
        ("windows", 3, r"what .*run\.json says of the model cannot be loaded"),
        ("state_bytes", {}, r"what .*run\.json says of the model cannot be loaded"),
    ):
        file.write_text(json.dumps({**whole, "model": {**whole["model"], name: value}}))
        assert run("info", tmp_path / "run") == 2
        assert re.search(message, capsys.readouterr().err)


def test_damaged_weights_and_tokens_are_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained / "none-seed0", copy)
    weights = load_file(copy / "model.safetensors")
    save_file(
        {name: value * float("nan") for name, value in weights.items()}, copy / "model.safetensors", {"format": "pt"}
    )
    assert run("generate", copy, "--tokens", 2, "--device", "cpu") == 2
    assert "the model gives no probabilities" in capsys.readouterr().err
    store = Path(json.loads((copy / "run.json").read_text())["data"]["store"])
    shutil.copytree(store, tmp_path / "store")
    tokens = tmp_path / "store" / "tokens-validation.bin"
    tokens.write_bytes(b"\xff" * tokens.stat().st_size)
    info = json.loads((copy / "run.json").read_text())
    info["data"]["store"] = str(tmp_path / "store")
    (copy / "run.json").write_text(json.dumps(info))
    assert run("evaluate", copy, "--device", "cpu") == 2
    assert "holds tokens that the model does not know" in capsys.readouterr().err


def test_evaluates_at_other_contexts(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Shorter ones with any model, longer ones where positions are not a table of weights."""
    words = ["--device", "cpu", "--json", "--context"]
    assert run("evaluate", trained / "fixed-seed0", *words, "8") == 0
    assert json.loads(capsys.readouterr().out)["context"] == 8
    assert run("evaluate", trained / "fixed-seed0", *words, "17") == 2
    assert "--context is 17: give 1 ... 16" in capsys.readouterr().err
    rotary = tmp_path / "rotary"
    data = write_text(tmp_path / "words.txt")
    assert run("train", data, "--modality", "chars", "--architecture", "llama", "--out", rotary, *SMALL) == 0
    capsys.readouterr()
    assert run("evaluate", rotary, *words, "100", "--windows", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["windows"], found["tokens"]) == (3, 300)
    # The same by hand.
    import numpy as np
    import torch

    from waveletgpt import WaveletGPTForCausalLM
    from waveletgpt.data import TokenStore
    from waveletgpt.runs.folder import RunFolder

    model = WaveletGPTForCausalLM.from_pretrained(rotary).eval()
    tokens = TokenStore.open(RunFolder.open(rotary).info["data"]["store"]).split("validation")
    whole = (len(tokens) - 1) // 100
    starts = [i * whole // 3 * 100 for i in range(3)]
    ids = torch.from_numpy(np.stack([tokens[start : start + 101] for start in starts]).astype(np.int64))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert found["nll"] == pytest.approx(float(nll), rel=1e-5)


def test_generates_past_the_learned_positions(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The context is 16 tokens: prompt and continuation are longer, and go on from its last half."""
    words = ["--prompt", "the cat sat on a mat", "--tokens", "40", "--temperature", "0", "--device", "cpu"]
    assert run("generate", trained / "none-seed0", *words) == 0
    assert len(capsys.readouterr().out) >= len("the cat sat on a mat") + 40


@pytest.mark.parametrize(
    "words",
    [
        ["--temperature", "-1"],
        ["--top-p", "0"],
        ["--samples", "0"],
        ["--tokens", "0"],
        ["--temperature", "nan"],
        ["--seed", str(1 << 70)],
    ],
)
def test_sampling_settings_out_of_range(trained: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", trained / "none-seed0", "--device", "cpu", *words) == 2
    assert words[0].strip("-") in capsys.readouterr().err


def test_module_and_version() -> None:
    version, mistake = (
        subprocess.run([sys.executable, "-m", "waveletgpt", *words], capture_output=True, text=True, timeout=120)
        for words in (["--version"], ["evaluate", "nowhere"])
    )
    assert (version.returncode, version.stdout.split()[0]) == (0, "waveletgpt")
    result = mistake
    assert result.returncode == 2
    assert result.stderr.startswith("waveletgpt: no run folder")
