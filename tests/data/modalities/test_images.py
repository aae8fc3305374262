"""Pictures come back pixel by pixel, whatever they were, and what is no picture is skipped and named."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin

from waveletgpt.data import MODALITIES, NAMED, SPLITS, DataSettings, NamedSet, TokenStore, prepare
from waveletgpt.data.modalities.images import BEGIN, IMAGES, PIXEL_LIMIT, Shape, Unusable, load, save_grid
from waveletgpt.data.windows import FixedWindows, RandomWindows
from waveletgpt.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged files

SMALL = Shape(8, 1)
COLOUR = Shape(8, 3)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def file(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    picture = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def values(data: bytes, shape: Shape = SMALL) -> np.ndarray:
    return np.frombuffer(load(data, shape), np.uint8).reshape(shape.size, shape.size, shape.channels).squeeze()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """120 pictures of 8 x 8 in two class folders."""
    for index in range(120):
        path = tmp_path / "pictures" / ("cat", "dog")[index % 2] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file(noise(index, 8, 8, 3)))
    return tmp_path / "pictures"


def store_of(data: Path | str, cache: DataSettings, **changes: Any) -> TokenStore:
    chosen = DataSettings(**{"cache_dir": cache.cache_dir, "image_size": 8, **changes})
    return prepare(str(data), "images", chosen, progress=False)


def records(store: TokenStore, split: str) -> np.ndarray:
    return store.split(split).reshape(-1, store.meta["record"])


@pytest.mark.parametrize("mode", ["grey", "rgb"])
def test_pixels_come_back_exactly(mode: str, pictures: Path, settings: DataSettings, tmp_path: Path) -> None:
    store = store_of(pictures, settings, image_mode=mode)
    assert store.vocab_size == 257
    assert store.meta["record"] == 1 + 64 * (3 if mode == "rgb" else 1)
    assert store.bytes_per_token("train") is None
    found = {row[1:].astype(np.uint8).tobytes() for split in SPLITS for row in records(store, split)}
    opened = (Image.open(path).convert("RGB" if mode == "rgb" else "L") for path in pictures.rglob("*.png"))
    assert found == {picture.tobytes() for picture in opened}
    assert all((records(store, split)[:, 0] == BEGIN).all() for split in SPLITS)
    tokenizer = store.load_tokenizer()
    row = records(store, "validation")[0]
    sample = MODALITIES["images"].write_sample(row.tolist(), tokenizer, tmp_path / "sample")
    assert (sample.kind, sample.path.name) == ("image", "sample.png")
    enlarged = np.asarray(Image.open(sample.path))
    assert enlarged.shape[:2] == (256, 256)
    assert np.array_equal(enlarged[::32, ::32].reshape(-1), row[1:])


def test_tokens_that_are_no_picture(pictures: Path, settings: DataSettings, tmp_path: Path) -> None:
    tokenizer = store_of(pictures, settings).load_tokenizer()

    @hypothesis_settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(-1, 300), max_size=100))
    def check(tokens: list[int]) -> None:
        every = [token for token in tokens if 0 <= token < 256]
        pixels = every[:64]
        sample = IMAGES.write_sample(tokens, tokenizer, tmp_path / "sample")
        shown = np.asarray(Image.open(sample.path))
        assert shown[::32, ::32].reshape(-1).tolist() == pixels + [0] * (64 - len(pixels))
        wrong = len(tokens) - len(every) - (tokens[:1] == [BEGIN])
        told = ((wrong, "tokens that are no pixels passed over"), (64 - len(pixels), "missing pixels black"),
                (len(every) - len(pixels), "pixels beyond the picture left out"))  # fmt: skip
        assert sample.repaired == ", ".join(f"{count} {what}" for count, what in told if count)

    check()


def test_the_upper_half_is_a_prompt(pictures: Path, settings: DataSettings) -> None:
    tokenizer = store_of(pictures, settings).load_tokenizer()
    path = sorted(pictures.rglob("*.png"))[0]
    upper = np.asarray(Image.open(path).convert("L"))[:4]
    assert IMAGES.encode_prompt(str(path), tokenizer) == [BEGIN, *upper.reshape(-1).tolist()]
    assert IMAGES.encode_prompt("", tokenizer) == [BEGIN]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == BEGIN
    with pytest.raises(UserError, match=r'no picture "nowhere\.png"'):
        IMAGES.encode_prompt("nowhere.png", tokenizer)
    with pytest.raises(UserError, match="cannot be used: not a picture"):
        IMAGES.encode_prompt(__file__, tokenizer)


@pytest.mark.parametrize(("mode", "size"), [("grey", 8), ("rgb", 8), ("grey", 7), ("rgb", 1)])
def test_what_completes_a_picture(mode: str, size: int, pictures: Path, settings: DataSettings) -> None:
    """Whatever size and mode: of a prompt, of none, of what a report shows; the rows of an odd size are not cut."""
    store = store_of(pictures, settings, image_mode=mode, image_size=size)
    tokenizer, record = store.load_tokenizer(), store.meta["record"]
    held_out = records(store, "validation")
    prompts = IMAGES.excerpts(store.split("validation"), 2, tokenizer)
    assert len(prompts) == 2
    for prompt in (*prompts, IMAGES.encode_prompt(str(next(pictures.rglob("*.png"))), tokenizer), [BEGIN]):
        assert len(prompt) + IMAGES.new_tokens(prompt, tokenizer) == record
    for prompt in prompts:
        assert len(prompt) == 1 + size // 2 * size * (3 if mode == "rgb" else 1)
        assert prompt in held_out[:, : len(prompt)].tolist()


def test_a_window_is_a_picture(pictures: Path, settings: DataSettings) -> None:
    store = store_of(pictures, settings)
    tokens = store.split("train")
    for data in (RandomWindows(tokens, 64, 20, 0, store.meta["record"]), FixedWindows(tokens, 64, 20, 65)):
        for index in range(20):
            window = data[index]
            assert window["input_ids"][0] == BEGIN
            assert BEGIN not in window["shift_labels"]


def test_grid(pictures: Path, settings: DataSettings, tmp_path: Path) -> None:
    store = store_of(pictures, settings, image_mode="rgb")
    rows = [row.tolist() for row in records(store, "train")[:5]]
    sheet = np.asarray(Image.open(save_grid(rows, store.load_tokenizer(), tmp_path / "grid.png", columns=3)))
    assert sheet.shape == (2 * 258 - 2, 3 * 258 - 2, 3)
    last = sheet[258 : 258 + 256 : 32, 258 : 258 + 256 : 32]
    assert last.reshape(-1).tolist() == rows[4][1:]


def exif(turn: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = turn
    return found


def test_kinds_of_pictures() -> None:
    grey = noise(0, 8, 8)
    colour = noise(1, 8, 8, 3)
    assert np.array_equal(values(file(grey)), grey)
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        assert np.array_equal(values(file(colour, kind), COLOUR), colour)
    assert np.array_equal(values(file(colour, "WEBP", lossless=True), COLOUR), colour)
    assert np.array_equal(values(file(colour)), np.asarray(Image.fromarray(colour).convert("L")))
    assert np.array_equal(values(file(grey), COLOUR), np.repeat(grey[..., None], 3, 2))
    deep = np.random.default_rng(2).integers(0, 1 << 16, (8, 8), np.uint16)
    assert np.array_equal(values(file(deep)), deep >> 8)
    palette = Image.fromarray(colour).quantize(16)
    assert np.array_equal(values(file(palette), COLOUR), np.asarray(palette.convert("RGB")))
    assert np.array_equal(values(file(Image.fromarray(grey > 127))), np.where(grey > 127, 255, 0))
    clear = np.dstack([colour, np.where(grey > 127, 255, 0).astype(np.uint8)])
    assert np.array_equal(values(file(clear), COLOUR), np.where((grey > 127)[..., None], colour, 255))
    assert np.array_equal(values(file(colour, exif=exif(6)), COLOUR), np.rot90(colour, -1))
    frames = [Image.fromarray(noise(seed, 8, 8)) for seed in range(3)]
    moving = file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(values(moving), np.asarray(frames[0]))
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[:, :, 3] = 255
    assert values(file(Image.frombytes("CMYK", (8, 8), inks.tobytes()), "JPEG"), COLOUR).max() <= 2


def test_other_sizes_are_cut_to_the_middle_square() -> None:
    assert values(file(np.full((1, 1), 77, np.uint8))).tolist() == [[77] * 8] * 8
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = noise(3, 8, 8)
    assert np.array_equal(values(file(wide)), wide[:, 8:16])
    assert values(file(np.full((1, 3000), 9, np.uint8))).tolist() == [[9] * 8] * 8
    blocks = np.repeat(np.repeat(noise(4, 8, 8), 200, 0), 200, 1)
    difference = values(file(blocks, "JPEG", quality=95)).astype(int) - values(file(blocks))
    assert np.abs(difference).max() <= 12  # decoded at a fraction of its size, then resized


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


BAD = {
    "empty.png": (b"", "not a picture"),
    "text.png": (b"no picture at all", "not a picture"),
    "cut.png": (file(noise(5, 64, 64))[:2000], "broken"),
    "cut.jpg": (file(noise(5, 64, 64), "JPEG")[:1500], "broken"),
    "bomb.png": (bomb(8000, PIXEL_LIMIT // 8000 + 1), "pixels, the limit is"),
    "bomb2.png": (bomb(100_000, 100_000), "broken"),
    "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a picture"),
    "data_batch_1": (b"\x80\x02}q\x00.", "get the binary version"),
    "data_batch_1.bin": (bytes(3072), "no whole number"),
    "real.tif": (file(Image.new("F", (8, 8), 300.0), "TIFF"), "floating-point"),
}


def test_what_is_no_picture_is_skipped_and_named(
    pictures: Path, settings: DataSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for name, (data, reason) in BAD.items():
        (pictures / name).write_bytes(data)
        (bad / name).write_bytes(data)
        if not name.endswith(".bin"):
            with pytest.raises(Unusable, match=reason):
                load(data, SMALL)
    store = store_of(pictures, settings)
    skipped = store.meta["skipped"]
    assert skipped["count"] == len(BAD)
    for name, (_, reason) in BAD.items():
        assert any(entry.startswith(f"{name}: ") and reason in entry for entry in skipped["names"])
    assert "skipped 10 files" in caplog.text
    assert store.meta["source"]["documents"] == 120
    with pytest.raises(UserError, match=r"no pictures in .*bad that can be used \(bomb"):
        store_of(bad, settings)


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_files(data: st.DataObject) -> None:
    """Whatever a file holds, there are pixels or a reason."""
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "TGA"]))
    content = bytearray(file(noise(6, 16, 16, 3), kind))
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    with contextlib.suppress(Unusable):
        assert len(load(bytes(content), COLOUR)) == COLOUR.values


def test_splits_go_by_content(pictures: Path, settings: DataSettings) -> None:
    grey, colour = store_of(pictures, settings), store_of(pictures, settings, image_mode="rgb", image_size=4)
    for split in SPLITS:
        assert grey.meta["splits"][split]["documents"] == colour.meta["splits"][split]["documents"] > 0
    for path in sorted(pictures.rglob("*.png"))[:60]:
        path.with_name(f"copy-{path.name}").write_bytes(path.read_bytes())
    found = [{row.tobytes() for row in records(store_of(pictures, settings), split)} for split in SPLITS]
    assert sum(map(len, found)) == 120
    assert len(found[0] | found[1] | found[2]) == 120


def test_few_pictures(tmp_path: Path, settings: DataSettings) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for index in range(2):
        (folder / f"{index}.png").write_bytes(file(noise(index, 8, 8)))
    with pytest.raises(UserError, match="too short: 2 pictures"):
        store_of(folder, settings)
    (folder / "2.png").write_bytes(file(noise(2, 8, 8)))
    assert [store_of(folder, settings).meta["splits"][split]["documents"] for split in SPLITS] == [1, 1, 1]


def test_cifar_by_name(tmp_path: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The binary version: a label and three planes a picture; the official test batch stays what it is."""
    path = tmp_path / "cifar-10-binary.tar.gz"
    planes = {f"data_batch_{i}.bin": noise(i, 30, 3, 32, 32) for i in range(1, 6)} | {
        "test_batch.bin": noise(9, 20, 3, 32, 32)
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, pixels in [*planes.items(), ("batches.meta.txt", None)]:
            data = b"cat\n" if pixels is None else b"".join(bytes([3]) + picture.tobytes() for picture in pixels)
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    real = NAMED["cifar10"]
    fake = NamedSet("cifar10", "", "images", "", "http://nowhere", path.name, include=real.include, splits=real.splits)
    monkeypatch.setitem(NAMED, "cifar10", fake)
    chosen = DataSettings(cache_dir=settings.cache_dir, data_dir=str(tmp_path), image_mode="rgb")
    store = prepare("cifar10", None, chosen, progress=False)
    assert (store.modality, store.meta["split"]) == ("images", "given")
    counts = [store.meta["splits"][split]["documents"] for split in SPLITS]
    assert counts[2] == 20
    assert sum(counts) == 170
    assert counts[1] > 0
    assert store.meta["skipped"]["count"] == 0
    test = records(store, "test")[:, 1:].reshape(20, 32, 32, 3)
    assert np.array_equal(test, planes["test_batch.bin"].transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size must be greater than 0, got 0"),
        ({"image_mode": "cmyk"}, 'image_mode: no "cmyk"; use one of grey, rgb'),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataSettings(**changes)


def test_without_pillow(pictures: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"pip install 'waveletgpt\[images\]'"):
        store_of(pictures, settings)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_deep_pictures_are_scaled_by_the_bits_they_use(bits: int, tmp_path: Path) -> None:
    ramp = np.linspace(0, 2**bits - 1, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        found = np.frombuffer(load((tmp_path / name).read_bytes(), Shape(16, 1)), np.uint8)
        assert abs(found.astype(int) - np.arange(256)).max() <= 1


def test_floating_point_pixels_from_0_to_1(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    for scale, usable in ((1.0, True), (300.0, False)):
        Image.fromarray(ramp * np.float32(scale)).save(tmp_path / "a.tif")
        if usable:
            found = np.frombuffer(load((tmp_path / "a.tif").read_bytes(), Shape(16, 1)), np.uint8)
            np.testing.assert_array_equal(found, np.arange(256))
        else:
            with pytest.raises(Unusable, match="no known range"):
                load((tmp_path / "a.tif").read_bytes(), Shape(16, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_one_bad_number_in_exif_costs_no_picture(orientation: int) -> None:
    """A resolution of 1 / 0 beside the orientation: the picture is turned as Pillow turns it without the bad entry."""
    picture = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    good, bad = io.BytesIO(), io.BytesIO()
    picture.save(good, "png", exif=exif)
    exif[0x011A] = TiffImagePlugin.IFDRational(12345, 77)
    raw = exif.tobytes()
    number = next(struct.pack(order, 12345, 77) for order in ("<II", ">II") if struct.pack(order, 12345, 77) in raw)
    picture.save(bad, "png", exif=raw.replace(number, number[:4] + bytes(4)))
    assert load(bad.getvalue(), Shape(4, 1)) == load(good.getvalue(), Shape(4, 1))
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(good.getvalue())))
    assert load(good.getvalue(), Shape(4, 1)) == turned.tobytes()


def png16(colours: np.ndarray) -> bytes:
    """A PNG of (H, W, 3 or 4) 16-bit values, which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    height, width, channels = colours.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@given(
    levels=st.lists(st.integers(0, 255), min_size=16, max_size=16).filter(lambda levels: max(levels) >= 128),
    bits=st.sampled_from([8, 10, 12, 14, 16]),
    alpha=st.booleans(),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_colours_of_few_bits_in_16_are_scaled(levels: list[int], bits: int, alpha: bool) -> None:
    grey = np.array(levels, np.uint16).reshape(4, 4, 1) << (bits - 8)
    colours = np.concatenate([grey, grey, grey] + [np.full_like(grey, (1 << bits) - 1)] * alpha, -1)
    assert list(load(png16(colours), Shape(4, 1))) == levels


def test_colours_whose_lower_bits_are_out_of_reach_are_named() -> None:
    levels = np.full((4, 4, 1), 1000, np.uint16)
    ppm = b"P6 4 4 65535\n" + np.repeat(levels, 3, -1).astype(">u2").tobytes()
    for data in (ppm, png16(np.repeat(levels, 2, -1))):
        with pytest.raises(Unusable, match="only the lower ones are used"):
            load(data, Shape(4, 1))
    assert set(load(ppm.replace(b"65535", b"1023"), Shape(4, 1))) == {249}
