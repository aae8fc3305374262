"""The commands of data, data list and data prepare, and what DATA is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from waveletgpt.cli import wording
from waveletgpt.cli.arms import Flat
from waveletgpt.cli.printing import say
from waveletgpt.data.settings import DataSettings, ModalityName
from waveletgpt.training import processes
from waveletgpt.training.recipe import Recipe

DEFAULT_DATA = "python-stdlib"


@dataclass(frozen=True)
class DataList:
    """Data sets that are known by name."""

    def run(self) -> None:
        from rich.console import Console
        from rich.table import Table

        from waveletgpt.data.sources.named import NAMED

        table = Table("name", "what", "modality", "bytes", "licence", "address")
        for name, known in NAMED.items():
            size = f"{known.size:,}" if known.size else ""
            table.add_row(
                name,
                wording.as_options(known.description, DataPrepare),
                known.modality,
                size,
                known.licence,
                known.url or ("generated" if known.made else "on every machine"),
            )
        Console(width=None if sys.stdout.isatty() else 200).print(table)


@dataclass(frozen=True)
class DataPrepare:
    """Turn DATA into a token store, as training would, and say where it is."""

    data: Positional[tuple[str, ...]] = (DEFAULT_DATA,)
    """File, folder, archive, address (https://, s3://, gs://, az://, hf://datasets/), data set name, or hf:OWNER/NAME;
    several, each with a weight, are mixed: a/=0.7 b/=0.3."""
    modality: ModalityName | None = None
    """How files become tokens; default: the data set's own, else what the names of the files tell."""
    source: Annotated[DataSettings, Flat] = field(default_factory=DataSettings)

    def run(self) -> None:
        from waveletgpt.data import prepare
        from waveletgpt.data.mixture import parts_of

        mixed = prepare(named(self.data), self.modality, self.source)
        parts = parts_of(mixed)
        for part in parts:
            if len(parts) > 1:
                say(f"{part.name}: {part.weight:.2%} of what is read")
            for split in ("train", "validation", "test"):
                size = part.store.bytes_per_token(split)
                say(
                    f"{split:>10}: {len(part.store.split(split)):>12,} tokens"
                    + (f", {size:.3f} bytes per token" if size else "")
                )
            say(f"token store: {part.store.path}")
        say(f"vocabulary: {mixed.vocab_size} ({mixed.modality})")


def named(data: Sequence[str]) -> str | list[str]:
    """DATA as it is recorded: one name, or the sources of a mixture with their weights."""
    return data[0] if len(data) == 1 and not is_weighted(data[0]) else list(data)


def is_weighted(source: str) -> bool:
    """Whether DATA is one source with a weight, and not a file that is called so."""
    name, equals, weight = source.rpartition("=")
    try:
        float(weight)
    except ValueError:
        return False
    return bool(name and equals and "?" not in name) and not Path(source).exists()  # ?: of an address


def prepare_store(data: Sequence[str], settings: Recipe, out: str) -> Any:
    """The tokens of `data`: those that the runs in `out`, or its sweep's, have begun with, if they are of it."""
    from waveletgpt.data import prepare
    from waveletgpt.report.summary import sweep_folder
    from waveletgpt.runs.folder import find_runs

    recorded = (run.info.get("data") or {} for place in (out, sweep_folder(out)) for run in find_runs(place))
    each = (part for there in recorded for part in [there, *(there.get("mixture") or {}).values()])
    begun = dict.fromkeys(part["store"] for part in each if "store" in part)
    return prepare(named(data), *settings.reading(), progress=processes.first(), begun=begun)
