"""Decoding of pictures, and readers of Tiny-ImageNet and FOOD101."""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import joblib
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mosaic_jax.data.formats.archives import Members
from mosaic_jax.data.formats.base import Splits, reading
from mosaic_jax.types import UserError

READ_AHEAD = 256
"""Number of pictures that are read before all cores decode them."""

BACKGROUND = (255, 255, 255)
"""The colour behind what is transparent."""

GREYS_OF_16_BITS = 65535 // 255
"""Steps of a 16-bit grey in one of 8 bits."""


def decoded(name: str, content: bytes, size: int) -> np.ndarray:
    """Decode a picture to RGB uint8 [size, size, 3], squeezed to a square by bilinear resampling.

    It is turned as its EXIF orientation says, and what is transparent becomes white. Of several
    frames the first counts.

    Raises:
      UserError: the bytes are damaged or no picture, or pixels are of no known range; names it.
    """
    with reading(name), _opened(content) as picture:
        colours = _in_rgb(name, ImageOps.exif_transpose(picture))
        if colours.size != (size, size):
            colours = colours.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(colours, np.uint8)


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # its text would name a buffer
        raise ValueError("no picture that Pillow knows") from None


def _in_rgb(name: str, picture: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB."""
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) // GREYS_OF_16_BITS).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise UserError(f"{name} has pixels of 32 bits, of no known range; convert it to 8 or 16")
    if picture.has_transparency_data:
        behind = Image.new("RGBA", picture.size, BACKGROUND)
        picture = Image.alpha_composite(behind, picture.convert("RGBA"))
    return picture.convert("RGB")


def _decode_all(
    path: Path, size: int, key_of: Callable[[str], str | None]
) -> tuple[dict[str, np.ndarray], dict[str, bytes]]:
    """Decode all pictures of a folder or archive, and read its text files.

    Args:
      path: of the folder or archive.
      size: height and width in pixels.
      key_of: file name -> key of a picture; None for another file.

    Returns:
      The pictures by key, and the contents of the ".txt" files by name without folders.
    """
    pictures: dict[str, np.ndarray] = {}
    texts: dict[str, bytes] = {}

    def wanted(members: Iterable[tuple[str, Callable[[], bytes]]]) -> Iterator[tuple[str, bytes]]:
        for name, content in members:
            key = key_of(name)
            if key is not None:
                yield key, content()
            elif name.endswith(".txt"):
                texts[name.rpartition("/")[2]] = content()

    def decode(entry: tuple[str, bytes]) -> np.ndarray:
        return decoded(f"{path}/{entry[0]}", entry[1], size)

    with Members(path) as members, ThreadPoolExecutor(joblib.cpu_count()) as pool:
        # An archive can only be read in order, so one thread reads and all cores decode.
        found = wanted(members)
        while chunk := list(islice(found, READ_AHEAD)):
            pictures.update(zip((key for key, _ in chunk), pool.map(decode, chunk), strict=True))
    return pictures, texts


def _stacked(
    path: Path, pictures: dict[str, np.ndarray], chosen: list[tuple[str, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Stack pictures, given as (key, label), in this order: images and labels of a split.

    Raises:
      UserError: there are none, or a picture is missing; names it.
    """
    if not chosen:
        raise UserError(f"{path} is incomplete: a split has no pictures")
    missing = [key for key, _ in chosen if key not in pictures]
    if missing:
        raise UserError(f"{path} is incomplete: no picture {missing[0]!r}")
    images = np.stack([pictures[key] for key, _ in chosen])
    return images, np.array([label for _, label in chosen], np.int32)


def _lines(path: Path, texts: dict[str, bytes], name: str) -> list[str]:
    """Return the lines of one of the set's text files, without empty ones."""
    if name not in texts:
        raise UserError(f"{path} is incomplete: no {name}")
    with reading(f"{path}/{name}"):
        return [line for line in texts[name].decode().splitlines() if line.strip()]


def read_tiny_imagenet(path: Path, size: int) -> Splits:
    """Read Tiny-ImageNet's zip or folder, at `size` pixels.

    Training images are sorted by class and number. The published validation set is the test set.
    Labels count the class names of `wnids.txt` in alphabetical order.

    Raises:
      UserError: the set is incomplete or damaged; names what is wrong.
    """
    training = re.compile(r"train/(n\d+)/images/n\d+_(\d+)\.JPEG$")
    validation = re.compile(r"val/images/(val_\d+\.JPEG)$")

    def key_of(name: str) -> str | None:
        match = training.search(name) or validation.search(name)
        return match.group(0) if match else None

    pictures, texts = _decode_all(path, size, key_of)
    names = sorted(line.strip() for line in _lines(path, texts, "wnids.txt"))
    labels = {name: label for label, name in enumerate(names)}
    train = []
    for key in pictures:
        if match := training.search(key):
            if match[1] not in labels:
                raise UserError(f"{path} has a class that wnids.txt does not name: {match[1]}")
            train.append((key, labels[match[1]], int(match[2])))
    test = []
    for line in _lines(path, texts, "val_annotations.txt"):
        file, name, *_ = [*line.split("\t"), ""]
        if name not in labels:
            raise UserError(f"{path}/val_annotations.txt names an unknown class: {line!r}")
        test.append((f"val/images/{file}", labels[name]))
    chosen = [entry[:2] for entry in sorted(train, key=lambda entry: entry[1:])]
    words = texts.get("words.txt", b"").decode(errors="replace").splitlines()
    said = {line.partition("\t")[0]: line.partition("\t")[2].split(",")[0] for line in words}
    return Splits(
        *_stacked(path, pictures, chosen),
        *_stacked(path, pictures, test),
        tuple(said.get(name) or name for name in names),
    )


def read_food101(path: Path, size: int) -> Splits:
    """Read FOOD101's tar or folder, at `size` pixels.

    Images are in the order of `meta/train.txt` and `meta/test.txt`. Labels count the lines of
    `meta/classes.txt`.

    Raises:
      UserError: the set is incomplete or damaged; names what is wrong.
    """
    pattern = re.compile(r"images/([^/]+/[^/]+)\.jpg$")

    def key_of(name: str) -> str | None:
        match = pattern.search(name)
        return match.group(1) if match else None

    pictures, texts = _decode_all(path, size, key_of)
    labels = {name: label for label, name in enumerate(_lines(path, texts, "classes.txt"))}

    def split(name: str) -> tuple[np.ndarray, np.ndarray]:
        chosen = []
        for key in _lines(path, texts, name):
            kind = key.partition("/")[0]
            if kind not in labels:
                raise UserError(f"{path}/meta/{name} names an unknown class: {key!r}")
            chosen.append((key, labels[kind]))
        return _stacked(path, pictures, chosen)

    return Splits(*split("train.txt"), *split("test.txt"), tuple(labels))
