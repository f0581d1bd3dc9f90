"""Types and checks that all readers of data sets share.

Readers raise a `UserError` of one line that names the file.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mosaic_jax.types import UserError


@dataclass(frozen=True)
class Request:
    """Arguments of `load`, with `image_size` filled in.

    Attributes:
      name: of the data set.
      directory: folder or file that the user named, or None.
      image_size: height and width in pixels.
      train_images: size of the random training subset; None keeps all images.
      test_images: the same for the test images.
      seed: chooses the subsets, and the images of "synthetic".
    """

    name: str
    directory: Path | None
    image_size: int
    train_images: int | None
    test_images: int | None
    seed: int


class Splits(NamedTuple):
    """Images uint8 [n, height, width, channels] and labels int32 [n] of both splits.

    Names of the classes follow, in the order of the labels, if the files say them.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...] = ()

    def arrays(self) -> dict[str, np.ndarray]:
        """Return images and labels by their names."""
        return {name: each for name, each in self._asdict().items() if name != "class_names"}


class FileFormat(NamedTuple):
    """One format of a set's original files.

    Attributes:
      names: of the expected files, for messages.
      find: `folder -> paths`, empty if the folder holds no such file.
      read: `(paths, image size) -> splits`.
    """

    names: str
    find: Callable[[Path], list[Path]]
    read: Callable[[list[Path], int], Splits]


def tree_format(names: Sequence[str], read: Callable[[Path, int], Splits]) -> FileFormat:
    """Return the format of one archive or folder with one of these names.

    The searched folder itself counts if it has one of the names.
    """

    def find(folder: Path) -> list[Path]:
        candidates = [folder / name for name in names]
        candidates += [folder] if folder.name in names else []
        return [path for path in candidates if path.exists()][:1]

    return FileFormat(" or ".join(names), find, lambda paths, size: read(paths[0], size))


def all_or_none(folder: Path, names: Sequence[str], found: Sequence[Path | None]) -> list[Path]:
    """Return the paths of all files, or an empty list if none was found.

    Raises:
      UserError: some files are missing; another place might hold another version of them.
    """
    paths = [path for path in found if path]
    if paths and len(paths) < len(names):
        absent = [name for name, path in zip(names, found, strict=True) if not path]
        raise UserError(f"{folder} is incomplete: no {' and no '.join(absent)}")
    return paths


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn every exception of a parsing library into a `UserError` that names the file.

    Raises:
      UserError: for any exception inside the block.
    """
    try:
        yield
    except UserError:
        raise
    # A damaged file makes a parser raise almost any exception, so only here all are caught.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is damaged or not what its name says: {reason}") from error


def labelled(
    path: Path | str, images: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Check images and labels of one split and return them, the labels as int32.

    Raises:
      UserError: no images, not as many labels as images, or a label out of range; names `path`.
    """
    if len(images) == 0:
        raise UserError(f"{path} holds no images")
    if labels.shape != (len(images),):
        raise UserError(f"{path} holds {len(images)} images but {labels.size} labels")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"{path} holds label {int(wrong[0])}; labels must lie in 0..{num_classes - 1}"
        )
    return images, labels.astype(np.int32)


def padded(images: np.ndarray) -> np.ndarray:
    """Pad images [n, 28, 28, channels] with black to 32x32, without resampling their pixels."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))


def statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation per channel of uint8 images scaled to [0, 1]."""
    scaled = images.astype(np.float64) / 255
    axes = (0, 1, 2)
    return tuple(scaled.mean(axes).tolist()), tuple(scaled.std(axes).tolist())
