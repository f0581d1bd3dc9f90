"""Reader of a user's folder of class folders, `train/CLASS/` and `test/CLASS/`."""

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import joblib
import numpy as np
from PIL import Image

from mosaic_jax.data.formats.base import Splits
from mosaic_jax.data.formats.images import decoded
from mosaic_jax.types import UserError

SPLITS = ("train", "test")

NOT_THE_USERS = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found"}
"""Names, in small letters, that systems add to folders; so are all that begin with a dot."""


NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow has an ending for, and no reader without other programs."""


@dataclass
class Listing:
    """What a folder holds.

    Attributes:
      pictures: by split and class, in order of their names.
      left_out: how many files and folders of each kind are not read.
    """

    pictures: dict[str, dict[str, list[Path]]]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the training classes, in the order of their labels: numbers by value."""
        return tuple(sorted(self.pictures["train"], key=natural))

    def files(self) -> list[Path]:
        """Return all pictures."""
        kinds = (kind for split in SPLITS for kind in self.pictures[split].values())
        return [path for paths in kinds for path in paths]

    def said(self) -> str:
        """Return one line on what is left out; empty if nothing is."""
        return ", ".join(f"{count} {what}" for what, count in sorted(self.left_out.items()))


def natural(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Return a key that sorts numbers inside names by their value: 2 before 10."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts], name


def listing(path: Path) -> Listing:
    """List the pictures of `path/train/CLASS/` and `path/test/CLASS/`, subfolders among them.

    Links are followed. Hidden files, what systems add and what is no picture is counted.

    Raises:
      UserError: a split, the pictures of a class or a link's target is missing, a folder cannot be
        read, or `test` has a class that `train` has not; names it.
    """
    found = Listing({split: {} for split in SPLITS})
    tops = {child.name: child for child in _children(path, found)}
    for split in SPLITS:
        if split not in tops or not tops[split].is_dir():
            there = f"; it has {', '.join(sorted(tops)[:5])}" if tops else ""
            raise UserError(
                f"{path} has no folder {split!r}{there}. data.directory names the folder that "
                "holds train/CLASS/ and test/CLASS/"
            )
    found.left_out["beside train and test"] += len(tops) - len(SPLITS)
    for split in SPLITS:
        for child in _children(tops[split], found):
            if not child.is_dir():
                found.left_out["in no class folder"] += 1
                continue
            pictures = list(_pictures(child, found, (tops[split].resolve(),)))
            found.pictures[split][child.name] = pictures
            if not pictures:
                raise UserError(f"{child} has no pictures")
        if not found.pictures[split]:
            raise UserError(f"{path} has no pictures in {split}/CLASS/")
    unknown = sorted(found.pictures["test"].keys() - found.pictures["train"].keys())
    if unknown:
        raise UserError(
            f"{path}/test has classes that {path}/train has not: {', '.join(unknown[:5])}"
        )
    found.left_out += Counter()  # drops the kinds of which there are none
    return found


def _children(folder: Path, found: Listing) -> list[Path]:
    """Return what lies in a folder, sorted by name, without what is nobody's picture."""
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    kept = []
    for child in children:
        if child.name.startswith(".") or child.name.lower() in NOT_THE_USERS:
            found.left_out["hidden or a system's"] += 1
        elif not child.exists():
            raise UserError(f"{child} is a link that points nowhere")
        elif not child.name.isprintable():
            raise UserError(f"{folder} holds {child.name!a}, a name that is no text; rename it")
        else:
            kept.append(child)
    return kept


def _pictures(folder: Path, found: Listing, above: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the pictures of a folder and its subfolders.

    Args:
      folder: the folder.
      found: where what is left out is counted.
      above: the folders it lies in, resolved; a link to one of them would lead round for ever.
    """
    here = folder.resolve()
    if here in above:
        raise UserError(f"{folder} is a link to a folder that it lies in")
    for child in _children(folder, found):
        if child.is_dir():
            yield from _pictures(child, found, (*above, here))
        elif _is_picture(child):
            yield child
        else:
            found.left_out["no picture that Pillow can read"] += 1


def _is_picture(path: Path) -> bool:
    """Return whether a file is a picture by its ending or, where that says nothing, its content.

    A damaged picture is one: reading it will say so.
    """
    form = Image.registered_extensions().get(path.suffix.lower())
    if form is not None:
        return form in Image.OPEN and form not in NO_PICTURES
    try:
        with Image.open(path):
            return True
    except Exception:  # of a text that begins like a picture, a reader may raise any
        return False


def read_folders(found: Listing, size: int) -> Splits:
    """Read the pictures of a listing, RGB of `size` by `size` pixels.

    Labels count the class names in their natural order.

    Raises:
      UserError: a picture is damaged; names it.
    """
    labels = {name: label for label, name in enumerate(found.class_names)}

    def read(path: Path) -> np.ndarray:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        return decoded(str(path), content, size)

    with ThreadPoolExecutor(joblib.cpu_count()) as pool:

        def split(name: str) -> tuple[np.ndarray, np.ndarray]:
            kinds = found.pictures[name]
            chosen = [(path, labels[kind]) for kind in labels for path in kinds.get(kind, ())]
            images = np.stack(list(pool.map(read, (path for path, _ in chosen))))
            return images, np.array([label for _, label in chosen], np.int32)

        return Splits(*split("train"), *split("test"), found.class_names)
