"""A folder of pieces becomes three splits, and samples that can be heard; what is no music is skipped and named."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.modalities.scores import midi, note, piece, tempo
from waveletgpt.data import MODALITIES, NAMED, SPLITS, DataSettings, NamedSet, TokenStore, prepare
from waveletgpt.data.modalities.events import END, OFF, SHIFT, VELOCITY, from_tokens, to_tokens
from waveletgpt.data.modalities.midi import Unusable, picture, read_midi
from waveletgpt.data.modalities.music import MUSIC
from waveletgpt.errors import UserError

pytest.importorskip("symusic")


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    folder = tmp_path / "pieces"
    for index in range(40):
        path = folder / "ab"[index % 2] / f"{index}{('.mid', '.midi', '.kar')[index % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(midi(piece(index, 30)))
    return folder


def music(data: Path | str, cache: DataSettings, **changes: Any) -> TokenStore:
    chosen = DataSettings(**{"cache_dir": cache.cache_dir, **changes})
    return prepare(str(data), "music", chosen, progress=False)


def contents(store: TokenStore, split: str) -> list[bytes]:
    tokens = store.split(split)
    parts = np.split(tokens, np.flatnonzero(tokens == END) + 1)[:-1]
    return [part[:-1].tobytes() for part in parts]


def test_a_folder_of_pieces(pieces: Path, settings: DataSettings) -> None:
    for name in ("0.mid", "5.kar"):
        (pieces / f"copy-{name}").write_bytes(next(pieces.rglob(name)).read_bytes())
    store = music(pieces, settings)
    assert (store.vocab_size, store.modality, store.split("train").dtype) == (389, "music", np.uint16)
    found = {split: contents(store, split) for split in SPLITS}
    assert sum(map(len, found.values())) == 42
    assert all(found.values())
    assert not set(found["train"]) & {*found["validation"], *found["test"]}
    assert not set(found["validation"]) & set(found["test"])
    assert {part for parts in found.values() for part in parts} == {
        to_tokens(read_midi(path.read_bytes())).tobytes() for path in pieces.rglob("*.*")
    }
    tokenizer = store.load_tokenizer()
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == END == len(tokenizer) - 1
    assert tokenizer.decode([60, OFF + 60, SHIFT, VELOCITY]) == "on-60 off-60 wait-10ms velocity-1"
    assert tokenizer("on-60 wait-1000ms")["input_ids"] == [60, SHIFT + 99]


def test_copies_of_training_pieces_only(pieces: Path, settings: DataSettings) -> None:
    plain = music(pieces, settings)
    more = music(pieces, settings, transpose="-2,3", tempo_scale="1.05")
    assert plain.fingerprint != more.fingerprint
    assert contents(more, "validation") == contents(plain, "validation")
    assert contents(more, "test") == contents(plain, "test")
    assert len(contents(more, "train")) == 6 * len(contents(plain, "train"))
    assert contents(more, "train")[::6] == contents(plain, "train")
    assert len(set(contents(more, "train"))) == len(contents(more, "train"))


def test_few_pieces_stay_whole(tmp_path: Path, settings: DataSettings) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.mid").write_bytes(midi(piece(index, 20 + 400 * index)))
        if index == 1:
            with pytest.raises(UserError, match="has 2 pieces, too few different ones"):
                music(folder, settings)
    store = music(folder, settings)
    assert store.meta["split"] == "dealt"
    assert [len(contents(store, split)) for split in SPLITS] == [1, 1, 1]


def test_the_start_of_a_file_is_a_prompt(pieces: Path) -> None:
    path = next(pieces.rglob("0.mid"))
    whole = to_tokens(read_midi(path.read_bytes())).tolist()
    assert MUSIC.encode_prompt("", None) == [END]
    for seconds in (0.5, 2.0, 1000.0):
        prompt = MUSIC.encode_prompt(f"{path}@{seconds}", None)
        assert prompt == [END, *whole[: len(prompt) - 1]]
        assert from_tokens(prompt)[0]["start"].max() < seconds
    assert len(MUSIC.encode_prompt(str(path), None)) < len(whole)
    for wrong, message in ((f"{path}@x", "give the seconds after @"), (f"{path}@-1", "give the seconds"),
                           ("nowhere.mid", "no MIDI file"), (__file__, "not a MIDI file")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            MUSIC.encode_prompt(wrong, None)
    late = pieces / "late.mid"
    late.write_bytes(midi(note(96_000, 10, 60)))
    with pytest.raises(UserError, match="no note in its first 5 seconds"):
        MUSIC.encode_prompt(str(late), None)


def test_reports_go_on_from_the_beginnings_of_pieces(pieces: Path, settings: DataSettings) -> None:
    tokens = music(pieces, settings).split("train")
    whole = [np.frombuffer(piece, np.uint16).tolist() for piece in contents(music(pieces, settings), "train")]
    for count in (1, 3, len(whole), 2 * len(whole)):
        found = MUSIC.excerpts(tokens, count, None)
        assert len(found) == count
        chosen = [whole[i * len(whole) // count] for i in range(count)]
        assert [prompt[:60] for prompt in found] == [[END, *piece[:59]] for piece in chosen]
        assert max(map(len, found)) == 129


def test_samples_say_what_was_repaired(tmp_path: Path) -> None:
    sample = MUSIC.write_sample([60, SHIFT + 9, 60], None, tmp_path / "sample")
    assert (sample.kind, sample.path.name) == ("music", "sample.mid")
    assert len(read_midi(sample.path.read_bytes())) == 2
    assert picture(sample.path).startswith(b"\x89PNG")
    assert sample.repaired == "1 keys struck while down, 1 keys left down, 1 notes without length"
    silent = MUSIC.write_sample([END, 999], None, tmp_path / "silent")
    assert silent.repaired == "1 unknown tokens"
    assert picture(silent.path).startswith(b"\x89PNG")


HUGE = 2**28 - 1
BAD = {
    "empty.mid": (b"", "not a MIDI file"),
    "film.mp4": (b"\0\0\0 ftypisom" * 1000, "not a MIDI file"),
    "cut.mid": (midi(piece(1))[:500], "broken"),
    "header.mid": (b"MThd\0\0\0\6\0\1\0\1\1\xe0", "no notes"),
    "silent.mid": (midi([tempo(0, 500_000)]), "no notes"),
    "frames.mid": (midi(note(0, 9, 60), ticks=0xE728), "broken"),
    "noticks.mid": (midi(note(0, 9, 60), ticks=0), "no ticks"),
    "years.mid": (midi([tempo(0, 16_000_000), *note(HUGE, 9, 60)], ticks=1), "longer than 24 hours"),
    "negative.mid": (
        midi([(HUGE * step, [0xB0, 1, step]) for step in range(1, 9)] + note(HUGE * 9, 9, 60)),
        "24 hours",
    ),
}


def test_what_is_no_music_is_skipped_and_named(pieces: Path, settings: DataSettings, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for name, (data, reason) in BAD.items():
        with pytest.raises(Unusable, match=reason):
            read_midi(data)
        (pieces / name).write_bytes(data)
        (bad / name).write_bytes(data)
    store = music(pieces, settings)
    assert store.meta["source"]["documents"] == 40
    assert store.meta["skipped"]["count"] == len(BAD)
    for name, (_, reason) in BAD.items():
        assert any(entry.startswith(f"{name}: ") and reason in entry for entry in store.meta["skipped"]["names"])
    with pytest.raises(UserError, match=r"no MIDI files in .*bad that can be used"):
        music(bad, settings)


def test_the_table_of_splits_in_other_encodings(tmp_path: Path, settings: DataSettings) -> None:
    home = tmp_path / "home"
    home.mkdir()
    rows = ["canonical_title,split,midi_filename"]
    for index in range(6):
        (home / f"{index}.mid").write_bytes(midi(piece(index, 20)))
        rows.append(f"Prélude,{SPLITS[index % 3]},2004/{index}.mid")
    (home / "notes.csv").write_bytes(b"name,about\nx,\xe9\xff\n")  # no table of splits
    table, cache = home / "table.csv", settings.cache_dir
    for encoding, chosen in (("utf-8", None), ("utf-16", None), ("cp1252", "cp1252")):
        table.write_text("\n".join(rows), encoding=encoding)
        store = prepare(home, "music", DataSettings(cache_dir=cache, encoding=chosen), progress=False)
        assert store.meta["split"] == "given"
        assert [store.meta["splits"][split]["documents"] for split in SPLITS] == [2, 2, 2]
    with pytest.raises(
        UserError, match=r"table\.csv has 6 bytes that are not UTF-8: name its encoding with `encoding`"
    ):
        prepare(home, "music", settings, progress=False)
    table.write_text("split,midi_filename\ntest," + "x" * 200_000)
    with pytest.raises(UserError, match=r"table\.csv is broken \(field larger"):
        prepare(home, "music", settings, progress=False)


def test_maestro_by_name(pieces: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table, which stands behind the files, gives the splits."""
    home = pieces.parent / "copies"
    home.mkdir()
    table = io.StringIO()
    table.write("canonical_composer,canonical_title,split,year,midi_filename\n")
    chosen = {f"{index}.midi": SPLITS[index % 3] for index in range(12)}
    with zipfile.ZipFile(home / "maestro-v3.0.0-midi.zip", "w") as archive:
        for index, (name, split) in enumerate(chosen.items()):
            archive.writestr(f"maestro-v3.0.0/2004/{name}", midi(piece(index, 20)))
            table.write(f'"Bach, J.S.",Fugue,{split},2004,2004/{name}\n')
        archive.writestr("maestro-v3.0.0/maestro-v3.0.0.csv", table.getvalue())
        archive.writestr("maestro-v3.0.0/LICENSE", "text")
    real = NAMED["maestro"]
    assert real.sha256 is not None
    file = "maestro-v3.0.0-midi.zip"
    monkeypatch.setitem(
        NAMED, "maestro", NamedSet("maestro", "", "music", "", "http://nowhere", file, include=real.include)
    )
    store = prepare("maestro", None, DataSettings(cache_dir=settings.cache_dir, data_dir=str(home)), progress=False)
    assert (store.modality, store.meta["split"], store.meta["skipped"]["count"]) == ("music", "given", 0)
    for split in SPLITS:
        wanted = [index for index in range(12) if chosen[f"{index}.midi"] == split]
        expected = {to_tokens(read_midi(midi(piece(index, 20)))).tobytes() for index in wanted}
        assert set(contents(store, split)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transpose": "1.5"}, 'transpose is "1.5": give whole numbers from -60 to 60'),
        ({"transpose": "99"}, "give whole numbers from -60 to 60"),
        ({"tempo_scale": "fast"}, "give numbers from 0.25 to 4"),
        ({"tempo_scale": "0"}, "give numbers from 0.25 to 4"),
        ({"tempo_scale": "nan"}, "give numbers from 0.25 to 4"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataSettings(**changes)


def test_without_symusic(pieces: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "symusic", None)
    with pytest.raises(UserError, match=r"pip install 'waveletgpt\[music\]'"):
        music(pieces, settings)
    assert MODALITIES["music"] is MUSIC


def test_pieces_in_riff_are_prepared_as_those_without(pieces: Path, settings: DataSettings, tmp_path: Path) -> None:
    plain = prepare(pieces, "music", settings, progress=False)
    wrapped = tmp_path / "wrapped"
    for path in filter(Path.is_file, pieces.rglob("*")):
        midi = path.read_bytes()
        inside = b"RMIDdata" + len(midi).to_bytes(4, "little") + midi + b"\0" * (len(midi) % 2)
        there = wrapped / path.relative_to(pieces).with_suffix(".rmi")
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(b"RIFF" + len(inside).to_bytes(4, "little") + inside)
    found = prepare(wrapped, None, settings, progress=False)
    assert found.modality == "music"
    for split in SPLITS:
        assert sorted(found.split(split)) == sorted(plain.split(split))
