"""Damaged files of every kind for a second each; benchmarks/fuzz.py does it for as long as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz

pytest.importorskip("soundfile")
pytest.importorskip("symusic")
pytest.importorskip("PIL")


@pytest.mark.parametrize("reader", sorted(fuzz.READERS.keys() - {"checkpoints"}))  # those take half a minute to make
def test_damaged_files_are_read_or_told(reader: str, tmp_path: Path) -> None:
    found = fuzz.fuzz(reader, seconds=1, seed=7, folder=tmp_path)
    assert found["inputs"]
    assert not found["findings"]


def test_what_escapes_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(data: bytes) -> None:
        if b"b" in data:
            raise KeyError("b")
        if b"c" in data:
            raise TimeoutError

    monkeypatch.setitem(fuzz.READERS, "fragile", lambda folder: ([b"a", b"ab", b"ac"], fragile))
    findings = fuzz.fuzz("fragile", 60, 0, tmp_path, inputs=3)["findings"]
    assert sorted(what.split()[0] for what in findings) == ["KeyError", "TimeoutError"]
    assert {data for _, data in findings.values()} == {b"ab", b"ac"}
