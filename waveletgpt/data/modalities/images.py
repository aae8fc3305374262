"""Pictures as tokens: the modality `images`, one token per value of a pixel (1 grey or 3 colours), row after row.

Every picture becomes a record of `1 + size * size * channels` tokens: the token `<|image|>`, then 8-bit values. With a
context of one token less than a record, a window is one picture: the inputs are `<|image|>` and all values but the
last, the targets are all values, and loss in nats / ln 2 is the bits per dimension of image models.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from waveletgpt.data.modalities import encoders
from waveletgpt.data.modalities.modality import SampleFile, Unusable, counted, evenly_spaced
from waveletgpt.data.modalities.text import require_splits
from waveletgpt.data.progress import bar
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.files import Document, Source, TooLarge, report_skipped
from waveletgpt.data.splits import Spool, point_of, split_of
from waveletgpt.data.store import SPLITS, StoreWriter
from waveletgpt.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

BEGIN = 256
"""The token before each picture."""
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
"""The formats that are read. Pillow knows more, but runs another program for some of them (EPS)."""
FILE_LIMIT = 256 << 20
"""Larger files, in bytes, are skipped."""
PIXEL_LIMIT = 64_000_000
"""Pictures with more pixels are skipped: a header of a few bytes can claim billions."""
SUFFIXES = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jfif", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
     ".pnm", ".tga", ".jp2", ".j2k", ".avif")
)  # fmt: skip
"""Suffixes of files in these formats."""
READ = {"images_reading": 2}
"""Part of a store's fingerprint. Raise it when the same files give other pictures than before."""
_FILES_AT_ONCE = 256
_BYTES_AT_ONCE = 64 << 20
_CIFAR = re.compile(r"(data_batch_\d+|test_batch)\.bin")
_CIFAR_RECORD = 1 + 3 * 32 * 32


class Shape(NamedTuple):
    """Size (height and width) and values per pixel: 1 (grey) or 3 (red, green, blue)."""

    size: int
    channels: int

    @property
    def values(self) -> int:
        return self.size * self.size * self.channels

    @property
    def record(self) -> int:
        """Number of tokens of one picture."""
        return 1 + self.values

    @property
    def half(self) -> int:
        """Number of values in the upper half."""
        return self.size // 2 * self.size * self.channels


_Found = list[tuple[float, bytes]] | Unusable


def load(data: bytes, shape: Shape) -> bytes:
    """The values of a picture file, (size, size, channels) uint8 in raster order: its centre square, resized.

    The picture is turned as its EXIF says. Transparent pixels are put on white, deep pixels are scaled to 8 bits (see
    `_eight_bits`), and of an animation the first frame is used. A picture of the right size keeps its pixels. Raises
    Unusable if it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        Image.init()
        formats = [kind for kind in FORMATS if kind in Image.OPEN]  # not every build of Pillow has all
        picture: Image.Image = Image.open(io.BytesIO(data), formats=formats)
        if picture.width * picture.height > PIXEL_LIMIT:
            raise Unusable(f"{picture.width} x {picture.height} pixels, the limit is {PIXEL_LIMIT:,}")
        picture.draft(None, (2 * shape.size, 2 * shape.size))  # large JPEGs are decoded at a fraction of their size
        rawmode = _rawmode(picture)
        picture.load()
        return _square(_turned(_deep_colours(picture, data, rawmode)), shape)
    except Unusable:
        raise
    except UnidentifiedImageError:
        raise Unusable("not a picture" + _hint(data)) from None
    # Decoders raise many exceptions for damaged files: OSError, ValueError, SyntaxError, struct.error, MemoryError, ...
    except Exception as error:
        raise Unusable(f"broken ({str(error) or type(error).__name__})") from error


def _hint(data: bytes) -> str:
    return "; CIFAR's Python version is never unpickled, get the binary version" if data[:2] == b"\x80\x02" else ""


def _turned(picture: Image) -> Image:
    """The picture turned as its EXIF orientation says; unchanged if that cannot be read.

    Pillow's `exif_transpose` also rewrites the other entries, and fails if one of them has an invalid number.
    """
    from PIL import Image

    ways = Image.Transpose
    turns = (None, None, ways.FLIP_LEFT_RIGHT, ways.ROTATE_180, ways.FLIP_TOP_BOTTOM,
             ways.TRANSPOSE, ways.ROTATE_270, ways.TRANSVERSE, ways.ROTATE_90)  # fmt: skip
    try:
        orientation = int(picture.getexif().get(0x0112, 1))
        turn = turns[orientation] if 0 < orientation < len(turns) else None
    except Exception:  # damaged entries raise nearly any exception
        return picture
    return picture if turn is None else picture.transpose(turn)


def _eight_bits(deep: np.ndarray) -> np.ndarray:
    """Scales integer pixels of more than 8 bits to uint8, by the range they use: 10, 12, 14, 16, ... bits.

    Cameras and scanners put 10 or 12 bits into files of 16, so that the upper 8 bits alone would be nearly black. If
    the brightest pixel needs b bits, the range is b bits, rounded up to an even number. Negative pixels become 0.
    """
    deep = np.maximum(deep.astype(np.int64), 0)
    bits = max(8, int(deep.max(initial=0)).bit_length())
    return (deep >> (bits + bits % 2 - 8)).astype(np.uint8)


_SECOND_BYTES = {"RGB;16B": "RGB;16L", "RGB;16L": "RGB;16B", "RGBA;16B": "RGBA;16L", "RGBA;16L": "RGBA;16B"}
"""Pillow's raw modes for one byte of each 16-bit colour -> those for the other byte."""


def _rawmode(picture: Image) -> str:
    """Pillow's raw mode of a picture that is not loaded yet: the layout of its pixels in the file; "" if unknown."""
    tiles = getattr(picture, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    if isinstance(arguments, tuple) and 65535 in arguments:  # a 16-bit PPM: Pillow gives no raw mode
        return "PPM;16"
    rawmode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return rawmode if isinstance(rawmode, str) else ""


def _deep_colours(picture: Image, data: bytes, rawmode: str) -> Image:
    """Scales 16-bit colours by the range that they use, because Pillow keeps only the upper 8 bits of each.

    Raises Unusable if Pillow cannot read the lower bits.
    """
    from PIL import Image

    if ";16" not in rawmode or picture.mode not in ("RGB", "RGBA", "LA"):
        return picture
    upper = np.asarray(picture)
    if int(upper.max(initial=0)) >= 128:
        return picture
    if rawmode not in _SECOND_BYTES:
        raise Unusable("16 bits per colour, of which only the lower ones are used: save it with 8")
    again: Any = Image.open(io.BytesIO(data), formats=[str(picture.format)])
    other = _SECOND_BYTES[rawmode]
    again.tile = [(*tile[:3], (other, *tile[3][1:]) if isinstance(tile[3], tuple) else other) for tile in again.tile]
    again.load()
    scaled = Image.fromarray(_eight_bits(upper.astype(np.int64) << 8 | np.asarray(again)))
    scaled.getexif().update(picture.getexif())
    return scaled


def _square(picture: Image, shape: Shape) -> bytes:
    from PIL import Image, ImageOps

    if picture.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        picture = Image.fromarray(_eight_bits(np.asarray(picture)))
    if picture.mode == "F":
        values = np.asarray(picture)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise Unusable("floating-point pixels outside 0 ... 1 have no known range")
        picture = Image.fromarray(np.rint(255 * values).astype(np.uint8))
    if picture.has_transparency_data:
        colours = picture.convert("RGBA")
        picture = Image.new("RGBA", picture.size, "white")
        picture.alpha_composite(colours)
    picture = picture.convert("L" if shape.channels == 1 else "RGB")
    return ImageOps.fit(picture, (shape.size, shape.size), Image.Resampling.BICUBIC).tobytes()


def load_cifar(data: bytes, shape: Shape) -> list[tuple[float, bytes]]:
    """The pictures of a batch of CIFAR-10's binary version, which has a label and 3 planes of 32 x 32 per picture.

    Each is (`point_of` its content, values as `load` gives them). Raises Unusable for another size.
    """
    from PIL import Image

    if not data or len(data) % _CIFAR_RECORD:
        raise Unusable(f"{len(data):,} bytes are no whole number of CIFAR-10's records")
    planes = np.frombuffer(data, np.uint8).reshape(-1, _CIFAR_RECORD)[:, 1:].reshape(-1, 3, 32, 32)
    pictures = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return [(point_of(pixels.data), _square(Image.fromarray(pixels), shape)) for pixels in pictures]


class ImagesModality:
    """Pictures: from files to tokens and back."""

    name = "images"
    description = "pixels, 8 bits, grey or RGB, row after row, of pictures made square (256 + 1)"
    suffixes = SUFFIXES
    suppress_tokens = (BEGIN,)  # never inside a picture, which generation completes

    def identity(self, settings: DataSettings) -> dict[str, Any]:
        """Size and mode; raises UserError for the tokenizer of another modality."""
        chosen = {"image_size": settings.image_size, "image_mode": settings.image_mode}
        return encoders.no_settings(settings) | chosen | READ

    def prepare(self, source: Source, settings: DataSettings, writer: StoreWriter, progress: bool) -> None:
        """Write the pixels of pictures and of CIFAR-10's batches. Other files are skipped, and named and counted.

        Raises UserError if Pillow is missing, no file can be read, or there are too few pictures for the splits.
        """
        need_pillow()
        shape = Shape(settings.image_size, 3 if settings.image_mode == "rgb" else 1)
        with Spool(writer.scratch) as spool:
            with bar(f"reading {source.name}", source.size, progress) as advance:
                for name, split, found in _read(source.files(), shape):
                    if isinstance(found, Unusable):
                        source.skipped.append(f"{name}: {found}")
                        continue
                    for point, pixels in found:
                        chosen = split_of(split, point, settings, source.own_splits)
                        spool.end_document(chosen, spool.write(pixels), point)
                    advance(source.done)
            report_skipped(source, "pictures", spool.documents)
            spool.divide(settings, source.own_splits, whole=True)
            pictures = {split: size // shape.values for split, size in spool.sizes.items()}
            require_splits(source.name, pictures, settings, "pictures", least=1)
            writer.begin(BEGIN + 1)
            with bar(f"writing {source.name}", spool.size, progress) as advance:
                _write(spool, shape, writer, advance)
        tokenizer = encoders.words(
            [str(value) for value in range(256)], "<|image|>", image_size=shape.size, image_mode=settings.image_mode
        )
        tokenizer.save_pretrained(writer.tokenizer_folder)
        writer.finish(
            source={"name": source.name, "documents": spool.documents},
            split=spool.method,
            record=shape.record,
            skipped={"count": len(source.skipped), "names": source.skipped[:100]},
        )

    def encode_prompt(self, prompt: str, tokenizer: Any) -> list[int]:
        """The upper half of the picture in the file `prompt`, to be completed; for "", the token before pictures.

        Raises UserError if the file does not exist or is not a picture.
        """
        if not prompt:
            return [BEGIN]
        need_pillow()
        shape = _shape(tokenizer)
        path = Path(prompt).expanduser()
        if not path.is_file():
            raise UserError(f'no picture "{prompt}": give the path of a picture file')
        try:
            pixels = load(path.read_bytes(), shape)
        except Unusable as error:
            raise UserError(f"{prompt} cannot be used: {error}; give another picture") from error
        return [BEGIN, *pixels[: shape.half]]

    def excerpts(self, tokens: np.ndarray, count: int, tokenizer: Any) -> list[list[int]]:
        """Upper halves of pictures."""
        shape = _shape(tokenizer)
        return evenly_spaced(tokens, count, 1 + shape.half, shape.record)

    def new_tokens(self, prompt: Sequence[int], tokenizer: Any) -> int:
        """The number of tokens that completes the picture."""
        record = _shape(tokenizer).record
        return record - len(prompt) % record

    def write_sample(self, tokens: Sequence[int], tokenizer: Any, stem: Path) -> SampleFile:
        """Write the picture of `tokens` as `stem`.png; small ones are enlarged by a whole factor to about 256 pixels.

        Tokens that are not pixels are skipped, missing pixels are black, and pixels beyond one picture are left out.
        """
        path = stem.with_name(stem.name + ".png")
        save_grid([tokens], tokenizer, path)
        shape = _shape(tokenizer)
        pixels = sum(0 <= token < BEGIN for token in tokens)
        repairs = Counter(
            {
                "tokens that are no pixels passed over": len(tokens) - pixels - (tokens[:1] == [BEGIN]),
                "missing pixels black": max(0, shape.values - pixels),
                "pixels beyond the picture left out": max(0, pixels - shape.values),
            }
        )
        return SampleFile("image", path, repaired=counted(repairs))


def save_grid(samples: Sequence[Sequence[int]], tokenizer: Any, path: Path, columns: int = 8) -> Path:
    """Write the pictures of several samples as one PNG, `columns` per row, with thin grey lines between them."""
    need_pillow()
    from PIL import Image

    shape = _shape(tokenizer)
    scale = max(1, 256 // shape.size)
    step = shape.size * scale + 2
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    mode = "L" if shape.channels == 1 else "RGB"
    sheet = Image.new(mode, (columns * step - 2, rows * step - 2), "grey")
    for index, tokens in enumerate(samples):
        picture = Image.frombytes(mode, (shape.size, shape.size), pixels_of(tokens, shape))
        large = picture.resize((step - 2, step - 2), Image.Resampling.NEAREST)
        sheet.paste(large, (index % columns * step, index // columns * step))
    sheet.save(path)
    return path


def pixels_of(tokens: Sequence[int], shape: Shape) -> bytes:
    """The values of the first picture in any tokens; missing values are 0."""
    return bytes([token for token in tokens if 0 <= token < BEGIN][: shape.values]).ljust(shape.values, b"\0")


def _shape(tokenizer: Any) -> Shape:
    settings = tokenizer.init_kwargs
    return Shape(int(settings["image_size"]), 3 if settings["image_mode"] == "rgb" else 1)


def _read(documents: Iterable[Document], shape: Shape) -> Iterator[tuple[str, str | None, _Found]]:
    """(name, split, its pictures or the reason why there are none) for each file, decoded by several threads."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for batch in _batches(documents):
            names, splits, contents = zip(*batch, strict=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about oddities inside files; real faults raise
                found = list(pool.map(_decode, names, contents, [shape] * len(batch)))
            yield from zip(names, splits, found, strict=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[str, str | None, bytes | Unusable]]]:
    batch: list[tuple[str, str | None, bytes | Unusable]] = []
    gathered = 0
    for document in documents:
        content: bytes | Unusable
        try:
            content = document.read(FILE_LIMIT)
            gathered += len(content)
        except TooLarge as error:
            content = Unusable(str(error))
        batch.append((document.name, document.split, content))
        if len(batch) == _FILES_AT_ONCE or gathered >= _BYTES_AT_ONCE:
            yield batch
            batch, gathered = [], 0
    if batch:
        yield batch


def _decode(name: str, content: bytes | Unusable, shape: Shape) -> _Found:
    if isinstance(content, Unusable):
        return content
    try:
        if _CIFAR.fullmatch(name.rpartition("/")[2]):
            return load_cifar(content, shape)
        return [(point_of(content), load(content, shape))]
    except Unusable as error:
        return error


def _write(spool: Spool, shape: Shape, writer: StoreWriter, advance: Callable[[int], None]) -> None:
    done = 0
    for batch in spool.batches(lambda block: 0, _BYTES_AT_ONCE // 8):
        for split in SPLITS:
            mine = [piece.data for piece in batch if piece.split == split]
            if mine:
                records = np.full((len(mine), shape.record), BEGIN, np.uint16)
                records[:, 1:] = np.frombuffer(b"".join(mine), np.uint8).reshape(len(mine), shape.values)
                writer.append(split, records.reshape(-1), documents=len(mine))
        done += sum(len(piece.data) for piece in batch)
        advance(done)


def need_pillow() -> None:
    """Raises UserError if Pillow is missing."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise UserError("pictures need Pillow, which is not installed: pip install 'waveletgpt[images]'") from None


IMAGES = ImagesModality()
