"""Readers of sets of image files: Tiny-ImageNet, FOOD101, and a user's folder of class folders."""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import joblib
import numpy as np
from PIL import Image

from mosaic_jax.data.formats.archives import Members
from mosaic_jax.data.formats.base import Splits, reading
from mosaic_jax.types import UserError

READ_AHEAD = 256
"""Number of pictures that are read before all cores decode them."""

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
"""File name endings of the pictures in a user's folder."""


def decoded(name: str, content: bytes, size: int) -> np.ndarray:
    """Decode a picture to RGB uint8 [size, size, 3], squeezed to a square by bilinear resampling.

    Raises:
      UserError: the bytes are damaged or no picture; names it.
    """
    with reading(name), Image.open(io.BytesIO(content)) as picture:
        colours = picture.convert("RGB")
        if colours.size != (size, size):
            colours = colours.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(colours, np.uint8)


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
    return Splits(*_stacked(path, pictures, chosen), *_stacked(path, pictures, test))


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

    return Splits(*split("train.txt"), *split("test.txt"))


def read_folders(path: Path, size: int) -> Splits:
    """Read a user's folder, `train/CLASS/picture` and `test/CLASS/picture`, at `size` pixels.

    Labels count the class folders of `train` in alphabetical order.

    Raises:
      UserError: a split has no pictures, or `test` has a class that `train` has not.
    """
    pattern = re.compile(r"(?:^|/)((train|test)/([^/]+)/[^/]+)$")

    def key_of(name: str) -> str | None:
        match = pattern.search(name)
        return match.group(1) if match and name.lower().endswith(ENDINGS) else None

    pictures, _ = _decode_all(path, size, key_of)
    keys = [(key, *key.split("/")[:2]) for key in sorted(pictures)]
    names = sorted({name for _, split, name in keys if split == "train"})
    labels = {name: label for label, name in enumerate(names)}
    unknown = [name for _, _, name in keys if name not in labels]
    if unknown:
        raise UserError(f"{path}/test has a class that {path}/train has not: {unknown[0]!r}")

    def split(wanted: str) -> tuple[np.ndarray, np.ndarray]:
        chosen = [(key, labels[name]) for key, part, name in keys if part == wanted]
        if not chosen:
            raise UserError(f"{path} has no pictures in {wanted}/CLASS/")
        return _stacked(path, pictures, chosen)

    return Splits(*split("train"), *split("test"))
