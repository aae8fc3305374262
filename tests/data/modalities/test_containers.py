"""Sound is read to the end of its file: joined streams, and lengths that nobody filled in."""

from __future__ import annotations

import contextlib
import functools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.data.modalities.sounds import RATE, encoded, speech
from waveletgpt.data.modalities.audio import Unusable, recording

FORMS = {"OGG": "VORBIS", "FLAC": "PCM_16", "MP3": "MPEG_LAYER_III"}


def sound(data: bytes, folder: Path, rate: int = RATE) -> np.ndarray:
    (folder / "a").write_bytes(data)
    blocks = list(recording(folder / "a", rate))
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32)


@functools.cache
def part(form: str, seconds: float, rate: int) -> bytes:
    return encoded(speech(seconds, rate, seed=round(100 * seconds)), rate, form, FORMS[form])


DECODED: dict[bytes, np.ndarray] = {}


def decoded(stream: bytes, folder: Path) -> np.ndarray:
    if stream not in DECODED:
        DECODED[stream] = sound(stream, folder)
    return DECODED[stream]


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(list(FORMS)),
    parts=st.lists(
        st.tuples(st.sampled_from([0.2, 0.31, 0.4]), st.sampled_from([16_000, 8_000])), min_size=1, max_size=3
    ),
    between=st.binary(max_size=9),
)
def test_joined_streams_are_one_after_the_other(
    form: str, parts: list[tuple[float, int]], between: bytes, tmp_path: Path
) -> None:
    joined = [part(form, seconds, rate) for seconds, rate in parts]
    alone = [decoded(stream, tmp_path) for stream in joined]
    between = between if form == "OGG" else b""  # pages of Ogg are found behind whatever stands between them
    np.testing.assert_array_equal(sound(between.join(joined), tmp_path), np.concatenate(alone))


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(["WAV", "FLAC", "OGG"]), seconds=st.sampled_from([0.2, 0.31, 0.4]), cut=st.integers(1, 10**6)
)
def test_sound_that_is_cut_off_is_its_beginning_or_named(form: str, seconds: float, cut: int, tmp_path: Path) -> None:
    """A WAV gives what there is of it, for its header often stays as it was; damaged FLAC and Ogg are told."""
    whole = part(form, seconds, RATE) if form in FORMS else encoded(speech(seconds))
    found: np.ndarray | None = None
    with contextlib.suppress(Unusable):
        found = sound(whole[: cut % len(whole)], tmp_path)
    if found is not None:
        np.testing.assert_array_equal(found, decoded(whole, tmp_path)[: len(found)])


@pytest.mark.parametrize("claimed", [0, 0xFFFFFFFF])
def test_a_wav_whose_length_was_never_filled_in(claimed: int, tmp_path: Path) -> None:
    data = bytearray(encoded(speech(0.5)))
    place = data.index(b"data")
    whole = sound(bytes(data), tmp_path)
    data[4:8] = data[place + 4 : place + 8] = struct.pack("<I", claimed)
    np.testing.assert_array_equal(sound(bytes(data), tmp_path), whole)


@pytest.mark.parametrize(
    ("form", "mark", "offset", "size"), [("RF64", b"ds64", 8, 16), ("CAF", b"data", 4, 8), ("AU", b".snd", 8, 4)]
)
@pytest.mark.parametrize("claimed", [b"\0", b"\xff"])
def test_lengths_of_other_forms_that_were_never_filled_in(
    form: str, mark: bytes, offset: int, size: int, claimed: bytes, tmp_path: Path
) -> None:
    data = bytearray(encoded(speech(0.3), RATE, form, "PCM_16"))
    whole = sound(bytes(data), tmp_path)
    place = data.index(mark) + offset
    data[place : place + size] = claimed * size
    np.testing.assert_array_equal(sound(bytes(data), tmp_path), whole)


def test_an_empty_wav_stays_empty(tmp_path: Path) -> None:
    data = encoded(np.zeros(0))
    assert len(sound(data, tmp_path)) == 0
    assert len(sound(data + b"LIST" + struct.pack("<I", 4) + b"abcd", tmp_path)) == 0


@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_a_flac_whose_length_was_never_filled_in(seconds: float, tmp_path: Path) -> None:
    data = bytearray(encoded(speech(seconds), RATE, "FLAC", "PCM_16"))
    whole = sound(bytes(data), tmp_path)
    head = int.from_bytes(data[18:26], "big")
    data[18:26] = (head >> 36 << 36).to_bytes(8, "big")  # the 36 bits that count the samples
    np.testing.assert_array_equal(sound(bytes(data), tmp_path), whole)


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_sound_or_unusable(data: st.DataObject, tmp_path: Path) -> None:
    form = data.draw(st.sampled_from(["WAV", *FORMS]))
    whole = bytearray(encoded(speech(0.1), RATE, form))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        found = sound(cut + data.draw(st.binary(max_size=20)), tmp_path)
    except Unusable:
        return
    assert np.isfinite(found).all()
