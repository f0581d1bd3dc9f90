"""Sets of picture files: Tiny-ImageNet, FOOD101, and a user's folder of class folders."""

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from mosaic_jax.data.archives import Members
from mosaic_jax.data.splits import Splits, reading
from mosaic_jax.types import UserError

TOGETHER = 256
"""Pictures read before they are decoded, by all cores."""

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def decoded(name: str, content: bytes, size: int) -> np.ndarray:
    """A picture in colour, uint8 [size, size, 3], squeezed to a square by bilinear resampling.

    Raises:
      UserError: it is none, or damaged.
    """
    with reading(name), Image.open(io.BytesIO(content)) as picture:
        colours = picture.convert("RGB")
        if colours.size != (size, size):
            colours = colours.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(colours, np.uint8)


def _decode_all(
    path: Path, size: int, place_of: Callable[[str], str | None]
) -> tuple[dict[str, np.ndarray], dict[str, bytes]]:
    """All pictures of a tree by the place `place_of` gives their name, and its small text files."""
    pictures: dict[str, np.ndarray] = {}
    texts: dict[str, bytes] = {}

    def wanted(members: Iterable[tuple[str, Callable[[], bytes]]]) -> Iterator[tuple[str, bytes]]:
        for name, content in members:
            place = place_of(name)
            if place is not None:
                yield place, content()
            elif name.endswith(".txt"):
                texts[name.rpartition("/")[2]] = content()

    def decode(entry: tuple[str, bytes]) -> np.ndarray:
        return decoded(f"{path}/{entry[0]}", entry[1], size)

    with Members(path) as members, ThreadPoolExecutor(os.cpu_count()) as pool:
        found = wanted(members)
        while chunk := list(islice(found, TOGETHER)):
            pictures.update(
                zip((place for place, _ in chunk), pool.map(decode, chunk), strict=True)
            )
    return pictures, texts


def _stacked(
    path: Path, pictures: dict[str, np.ndarray], chosen: list[tuple[str, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of some places in this order, and their labels."""
    if not chosen:
        raise UserError(f"{path} is incomplete: a split has no pictures")
    missing = [place for place, _ in chosen if place not in pictures]
    if missing:
        raise UserError(f"{path} is incomplete: no picture {missing[0]!r}")
    images = np.stack([pictures[place] for place, _ in chosen])
    return images, np.array([label for _, label in chosen], np.int32)


def _lines(path: Path, texts: dict[str, bytes], name: str) -> list[str]:
    """A text file of the set, without empty lines."""
    if name not in texts:
        raise UserError(f"{path} is incomplete: no {name}")
    with reading(f"{path}/{name}"):
        return [line for line in texts[name].decode().splitlines() if line.strip()]


def read_tiny_imagenet(path: Path, size: int) -> Splits:
    """Tiny-ImageNet's zip or folder: training by class and number; its validation set is the test.

    Labels count the class names of `wnids.txt` in alphabetical order.
    """
    training = re.compile(r"train/(n\d+)/images/n\d+_(\d+)\.JPEG$")
    validation = re.compile(r"val/images/(val_\d+\.JPEG)$")

    def place_of(name: str) -> str | None:
        match = training.search(name) or validation.search(name)
        return match.group(0) if match else None

    pictures, texts = _decode_all(path, size, place_of)
    names = sorted(line.strip() for line in _lines(path, texts, "wnids.txt"))
    labels = {name: label for label, name in enumerate(names)}
    train = []
    for place in pictures:
        if match := training.search(place):
            if match[1] not in labels:
                raise UserError(f"{path} has a class that wnids.txt does not name: {match[1]}")
            train.append((place, labels[match[1]], int(match[2])))
    test = []
    for line in _lines(path, texts, "val_annotations.txt"):
        file, name, *_ = [*line.split("\t"), ""]
        if name not in labels:
            raise UserError(f"{path}/val_annotations.txt names an unknown class: {line!r}")
        test.append((f"val/images/{file}", labels[name]))
    chosen = [entry[:2] for entry in sorted(train, key=lambda entry: entry[1:])]
    return Splits(*_stacked(path, pictures, chosen), *_stacked(path, pictures, test))


def read_food101(path: Path, size: int) -> Splits:
    """FOOD101's tar or folder, in the order of its `meta/train.txt` and `meta/test.txt`."""
    pattern = re.compile(r"images/([^/]+/[^/]+)\.jpg$")

    def place_of(name: str) -> str | None:
        match = pattern.search(name)
        return match.group(1) if match else None

    pictures, texts = _decode_all(path, size, place_of)
    labels = {name: label for label, name in enumerate(_lines(path, texts, "classes.txt"))}

    def split(name: str) -> tuple[np.ndarray, np.ndarray]:
        chosen = []
        for place in _lines(path, texts, name):
            kind = place.partition("/")[0]
            if kind not in labels:
                raise UserError(f"{path}/meta/{name} names an unknown class: {place!r}")
            chosen.append((place, labels[kind]))
        return _stacked(path, pictures, chosen)

    return Splits(*split("train.txt"), *split("test.txt"))


def read_folders(path: Path, size: int) -> Splits:
    """A user's set: `train/CLASS/picture` and `test/CLASS/picture`.

    Labels count the class folders of `train` in alphabetical order.
    """
    pattern = re.compile(r"(?:^|/)((train|test)/([^/]+)/[^/]+)$")

    def place_of(name: str) -> str | None:
        match = pattern.search(name)
        return match.group(1) if match and name.lower().endswith(ENDINGS) else None

    pictures, _ = _decode_all(path, size, place_of)
    places = [(place, *place.split("/")[:2]) for place in sorted(pictures)]
    names = sorted({name for _, split, name in places if split == "train"})
    labels = {name: label for label, name in enumerate(names)}
    unknown = [name for _, _, name in places if name not in labels]
    if unknown:
        raise UserError(f"{path}/test has a class that {path}/train has not: {unknown[0]!r}")

    def split(wanted: str) -> tuple[np.ndarray, np.ndarray]:
        chosen = [(place, labels[name]) for place, part, name in places if part == wanted]
        if not chosen:
            raise UserError(f"{path} has no pictures in {wanted}/CLASS/")
        return _stacked(path, pictures, chosen)

    return Splits(*split("train"), *split("test"))
