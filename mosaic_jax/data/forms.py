"""The forms in which original files come: what is looked for in a folder, and what reads it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mosaic_jax.data import cifar, idx, svhn
from mosaic_jax.data.splits import Splits
from mosaic_jax.types import UserError

IDX_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class Form(NamedTuple):
    """One form of the original files.

    Attributes:
      names: of what is looked for, for messages.
      find: `folder -> paths`, empty where the folder has none of it.
      read: `(paths, image size) -> splits`.
    """

    names: str
    find: Callable[[Path], list[Path]]
    read: Callable[[list[Path], int], Splits]


def padded(images: np.ndarray) -> np.ndarray:
    """28x28 with a black frame, never resized: the pixels stay what they were."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))


def idx_form() -> Form:
    """MNIST's layout: four IDX files of 28x28 images, ten classes."""

    def find(folder: Path) -> list[Path]:
        found = [idx.find(folder, stem) for stem in IDX_STEMS]
        return _whole(folder, list(IDX_STEMS), found)

    def split(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
        images, labels = idx.read_pair(images_path, labels_path, num_classes=10)
        if images.shape[1:] != (28, 28):
            raise UserError(f"{images_path} holds images of {images.shape[1:]}, not (28, 28)")
        return padded(images[..., None]), labels

    return Form(
        f"{', '.join(IDX_STEMS)} (plain or .gz)",
        find,
        lambda paths, size: Splits(*split(*paths[:2]), *split(*paths[2:])),
    )


def _whole(folder: Path, names: list[str], found: list[Path | None]) -> list[Path]:
    """All files or none; some of them are an error, as another place might hold another version."""
    paths = [path for path in found if path]
    if paths and len(paths) < len(names):
        absent = [name for name, path in zip(names, found, strict=True) if not path]
        raise UserError(f"{folder} is incomplete: no {' and no '.join(absent)}")
    return paths


def svhn_form() -> Form:
    """SVHN's two MATLAB files."""

    def find(folder: Path) -> list[Path]:
        files = [folder / name for name in svhn.FILES]
        return _whole(
            folder, list(svhn.FILES), [file if file.is_file() else None for file in files]
        )

    return Form(", ".join(svhn.FILES), find, lambda paths, size: svhn.read(paths[0].parent))


def tree_form(names: Sequence[str], read: Callable[[Path, int], Splits]) -> Form:
    """One archive or folder of one of these names, or the folder itself."""

    def find(folder: Path) -> list[Path]:
        candidates = [folder / name for name in names]
        candidates += [folder] if folder.name in names else []
        return [path for path in candidates if path.exists()][:1]

    return Form(" or ".join(names), find, lambda paths, size: read(paths[0], size))


def cifar_forms(name: str, num_classes: int) -> list[Form]:
    """CIFAR as Python pickles or as binary records."""
    return [
        tree_form(form.places, partial(_cifar, form, num_classes)) for form in cifar.FORMS[name]
    ]


def _cifar(form: cifar.Form, num_classes: int, path: Path, size: int) -> Splits:
    return cifar.read(path, form, num_classes)
