"""Data sets of the Hugging Face hub: `hf:owner/name`, `hf:owner/name:config`, with `@revision` to pin a version."""

from __future__ import annotations

import os
import socket
import urllib.parse
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources import tables
from waveletgpt.data.sources.files import Document, Files
from waveletgpt.data.store import SPLITS
from waveletgpt.errors import UserError

PREFIX = "hf:"


def fail_soon() -> None:
    """Without a connection, make the hub's libraries use their caches at once instead of trying for a minute."""
    proxied = any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"))
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    if proxied or host is None or os.environ.get("HF_HUB_OFFLINE"):
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        import huggingface_hub.constants

        os.environ["HF_HUB_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True


class Hub:
    """A data set of the hub, streamed. If it has all three splits they are kept; else its `train` is divided."""

    size = 0

    def __init__(self, name: str, settings: DataSettings) -> None:
        self.name = name
        self.settings = settings
        self.done = 0
        self.skipped: list[str] = []
        rest, _, revision = name.removeprefix(PREFIX).partition("@")
        self._path, _, config = rest.partition(":")
        self._config, self._revision = config or None, revision or None
        self._opened: dict[str, Any] | None = None
        if not self._path:
            raise UserError(f'"{name}" names no data set: write hf:owner/name or hf:owner/name:config')

    @property
    def own_splits(self) -> Set[str]:
        """All three, or none."""
        return set(SPLITS) if set(SPLITS) <= set(self._sets()) else set()

    def key(self, cache: Path) -> str:
        """The name itself. The content at the first preparation is kept, also offline; change it with `@revision`."""
        if Path(self._path).is_dir():
            # Not the key of the folder by itself, which is divided in another way.
            return PREFIX + Files(Path(self._path), DataSettings()).key(cache)
        return self.name

    def files(self) -> Iterator[Document]:
        """Not offered: the hub's data sets are tables."""
        raise UserError(f"{self.name} is a table of text: use a text modality")

    def documents(self, *, binary: bool) -> Iterator[Document]:
        """Each row's text.

        Raises UserError if the data set cannot be reached or has no such column.
        """
        sets = self._sets()
        splits = list(SPLITS) if self.own_splits else ["train"] if "train" in sets else list(sets)
        for split in splits:
            chosen = ""
            for number, row in enumerate(self._rows(sets[split]), 1):
                name = f"{self.name} {split} row {number}"
                chosen = chosen or tables.choose(self.name, self.settings.column, list(row))
                if text := tables.text_of(row[chosen], name, chosen):
                    yield Document(name, [text.encode("utf-8", "replace")], split if self.own_splits else None)

    def _sets(self) -> dict[str, Any]:
        if self._opened is None:
            fail_soon()  # before datasets, which asks once, when imported
            try:
                import datasets
            except ImportError:
                raise UserError(f"{self.name} needs the library datasets: pip install 'waveletgpt[hub]'") from None
            try:
                self._opened = dict(
                    datasets.load_dataset(self._path, self._config, revision=self._revision, streaming=True)
                )
            except Exception as error:  # the library raises nearly any exception
                raise self._unreachable(error) from error
        return self._opened

    def _rows(self, rows: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from rows
        except UserError:
            raise
        except Exception as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> UserError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return UserError(f"{self.name} cannot be loaded from the hub ({reason}): check the name and the connection")
