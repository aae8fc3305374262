"""A run folder: everything about one trained model, on disk. Training writes it; `compare` and `report` read only it.

    run.json          resolved recipe, arm, seed, data, model size, environment, command, result (see `RunFolder.info`)
    metrics.jsonl     one line per logging or evaluation: {"step", "tokens", "seconds", "loss" | "nll", ...}
    samples.json      what the trained model generated: [{"prompt", "text"}, ...]
    checkpoint-STEP/  Hugging Face format with tokenizer, plus what resuming needs
    model.safetensors, config.json, tokenizer files    the final model, so that the folder itself loads as a checkpoint

`seconds` is training time only: evaluation, saving and sampling are excluded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack, cast

from waveletgpt.errors import UserError
from waveletgpt.runs.records import RunRecord

SCHEMA = 1
# Checkpoints are written here, inside the run folder, and moved to their place when whole.
STAGING = ".saving"
_KINDS = {"recipe": dict, "data": dict, "model": dict, "environment": dict, "result": dict, "arm": str, "seed": int}
"""What entries of run.json are."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


COPY = ".copy"
"""How the name of a run folder ends while it is copied."""


def is_unfinished(name: str) -> bool:
    """Whether a file or folder is what a process leaves behind that was killed while it wrote one."""
    return name.startswith(".") and name.endswith((".tmp", COPY))


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`; a reader or a crash sees the old file or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


class RunFolder:
    """One run folder. `RunFolder(path)` never touches the disk; `RunFolder.open(path)` checks that it is one.

    Raises:
        UserError: from `open`, where the folder is missing, is not a run folder, or its run.json is broken.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        run = cls(path)
        if not run.path.is_dir():
            raise UserError(f"no run folder at {run.path}; name one that an earlier `waveletgpt train` wrote")
        if not run.exists():
            runs = list(find_runs(run.path))
            inside = f" (it holds {len(runs)}: {runs[0].path}, ...)" if runs else ""
            raise UserError(f"{run.path} is not a run folder: it has no run.json{inside}")
        _ = run.info
        return run

    def exists(self) -> bool:
        return (self.path / "run.json").is_file()

    @property
    def info(self) -> RunRecord:
        """run.json. Raises UserError where it cannot be read, or an entry is of the wrong kind."""
        try:
            value = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / 'run.json'} cannot be read ({error}); the run cannot be used") from None
        schema = value.get("schema") if isinstance(value, dict) else None
        if schema != SCHEMA:
            raise UserError(f"{self.path / 'run.json'} has schema {schema!r}; this version reads {SCHEMA}")
        recipe = value.get("recipe") or {}
        kinds = {(name,): kind for name, kind in _KINDS.items()} | {("recipe", "training"): dict}
        for (*above, name), kind in kinds.items():
            found = (value if not above else recipe if isinstance(recipe, dict) else {}).get(name)
            if found is not None and not isinstance(found, kind):
                raise UserError(f"{self.path / 'run.json'} is damaged: {name} is {found!r}; the run cannot be used")
        training = recipe.get("training") or {}
        if "eval_every" in training and training["eval_every"] is None:
            # Earlier versions recorded what was set only, and evaluated at every 40th of the run where nothing was.
            training["eval_every"] = max(1, int(recipe.get("max_steps") or 40) // 40)
        return cast(RunRecord, value)

    def entry(self, *names: str) -> Any:
        """What run.json has under these names, one inside the other. Raises UserError where there is nothing."""
        value: Any = self.info
        for name in names:
            if not isinstance(value, dict) or value.get(name) is None:
                raise UserError(f"{self.path / 'run.json'} is damaged: it has no {'.'.join(names)}")
            value = value[name]
        return value

    def write_info(self, info: RunRecord) -> None:
        write_json(self.path / "run.json", {"schema": SCHEMA, **info})

    def update_info(self, **changes: Unpack[RunRecord]) -> None:
        self.write_info({**self.info, **changes})

    @property
    def finished(self) -> bool:
        return self.exists() and self.info.get("status") == "finished"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl; what a crash cut short, or a damaged disk changed, is left out."""
        rows = []
        if self.metrics_path.is_file():
            for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
        return [
            row
            for row in rows
            if isinstance(row, dict) and all(type(row.get(name)) in (int, float) for name in ("step", "seconds"))
        ]

    def append_metrics(self, row: dict[str, Any]) -> None:
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run logs it again."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        write_atomically(self.metrics_path, "".join(json.dumps(row) + "\n" for row in rows))

    def curve(self) -> list[tuple[int, float, float]]:
        """(step, training seconds, held-out nll in nats per token) for every evaluation, in order."""
        return [(row["step"], row["seconds"], row["nll"]) for row in self.metrics() if "nll" in row]

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every whole checkpoint, oldest first."""
        found = []
        if self.path.is_dir():
            for folder in self.path.iterdir():
                match = _CHECKPOINT.fullmatch(folder.name)  # not a copy such as best-checkpoint-5
                if match and folder.is_dir():
                    found.append((int(match[1]), folder))
        return sorted(found)

    def model_path(self) -> Path:
        """The folder to load the model from: the run folder itself once finished, else its newest checkpoint."""
        if (self.path / "model.safetensors").is_file():
            return self.path
        checkpoints = self.checkpoints()
        if not checkpoints:
            raise UserError(f"{self.path} holds no checkpoint yet; resume its training first, with `waveletgpt train`")
        return checkpoints[-1][1]

    def samples(self) -> list[dict[str, Any]]:
        path = self.path / "samples.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def find_runs(folder: str | Path) -> Iterator[RunFolder]:
    """Every run folder at or below `folder`, in name order; checkpoints inside runs are not searched."""
    folder = Path(folder)
    if (folder / "run.json").is_file():
        yield RunFolder(folder)
    elif folder.is_dir():
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from find_runs(child)


def publish(folder: Path, place: Path) -> None:
    """Move a finished folder to its place, through to the disk; whatever was there goes after it is replaced."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    old = place.with_name(f".{place.name}.old")
    if place.exists():
        os.replace(place, old)
    os.replace(folder, place)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write, which libraries report in several ways, into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        text = str(error)
        full = getattr(error, "errno", None) in (28, 122) or any(
            word in text for word in ("No space left", "os error 28", "file write failed", "unexpected pos")
        )
        if full:
            raise UserError(
                f"no room left to write in {path}; free some space and go on with `resume=True`: "
                "the checkpoints before are whole"
            ) from None
        if (
            isinstance(error, PermissionError | NotADirectoryError | FileNotFoundError | IsADirectoryError)
            and str(path) in text
        ):
            raise UserError(f"cannot write in {path}: {error.strerror}; name another `out`") from None
        raise


def broken_checkpoint(folder: Path, problem: str) -> UserError:
    """The error for a checkpoint that cannot be resumed from."""
    return UserError(
        f"checkpoint {folder} is broken ({problem}); delete it, and `resume=True` goes on from the one before"
    )
