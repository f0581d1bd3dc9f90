"""A user's own data set at `data.directory`: a folder of class folders, or an `.npz` file."""

import hashlib
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from mosaic_jax.data import cache
from mosaic_jax.data.formats import folders
from mosaic_jax.data.formats.base import Request, Splits, labelled, reading, statistics
from mosaic_jax.types import Dataset, UserError

log = logging.getLogger(__name__)

DARK = 16
"""Where no pixel is brighter, greys of 8 or 12 bits have been stored as 16 bits, or 0 to 1 as 8."""

ARRAYS = {
    "train_images": "x_train",
    "train_labels": "y_train",
    "test_images": "x_test",
    "test_labels": "y_test",
}
"""The two names that each array of an `.npz` may have."""


def read(request: Request) -> Dataset:
    """Read the set at `data.directory`, its images squeezed to `data.image_size`.

    A folder holds `train/CLASS/picture` and `test/CLASS/picture`, see `folders.listing` and
    `images.decoded`. An `.npz` holds `train_images` uint8 [n, height, width] or [n, height, width,
    channels], `train_labels` [n], and the same of `test` (or `x_train`, `y_train`, `x_test`,
    `y_test`). What a folder leaves out is logged, and what is odd about the images.

    Raises:
      UserError: the file is missing or damaged, or a class has no training images.
    """
    path, size = request.directory, request.image_size
    if path is None:
        raise UserError(
            "data set 'own' needs --config.data.directory=PLACE: a folder with train/CLASS/ and "
            "test/CLASS/, or an .npz"
        )
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        found = folders.listing(path)
        if left_out := found.said():
            log.warning("left out of %s: %s", path, left_out)
        key = f"own-{size}"
        splits = cache.cached(key, found.files(), lambda: folders.read_folders(found, size))
    else:
        splits = cache.cached(f"own-{size}", [path], lambda: _from_npz(path, size))
    classes = int(splits.train_labels.max()) + 1
    counts = np.bincount(splits.train_labels, minlength=classes)
    if (counts == 0).any():
        raise UserError(f"{path} has no training images of class {int(counts.argmin())}")
    mean, std = statistics(splits.train_images)
    _say_odd(path, splits)
    return Dataset(name="own", num_classes=classes, mean=mean, std=std, **splits._asdict())


def _say_odd(path: Path, splits: Splits) -> None:
    """Log test images that are training images, too, classes without a test image, and darkness."""
    brightest = int(splits.train_images.max())
    if brightest < DARK:
        log.warning("%s: no training pixel is brighter than %d of 255", path, brightest)
    known = {_digest(image) for image in splits.train_images}
    repeated = sum(_digest(image) in known for image in splits.test_images)
    if repeated:
        total = len(splits.test_images)
        log.warning("%s: %d of %d test images are training images, too", path, repeated, total)
    untested = sorted(set(splits.train_labels.tolist()) - set(splits.test_labels.tolist()))
    if untested:
        names = ", ".join(splits.class_names[i] if splits.class_names else str(i) for i in untested)
        log.warning("%s has no test images of %d classes: %s", path, len(untested), names)


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()


def _from_npz(path: Path, size: int) -> Splits:
    """Read both splits of an `.npz` file, images squeezed to `size` pixels."""
    with reading(path), np.load(path, allow_pickle=False) as file:
        absent = [name for name, other in ARRAYS.items() if name not in file and other not in file]
        if absent:
            raise UserError(f"{path} has no array {absent[0]!r} (nor {ARRAYS[absent[0]]!r})")
        arrays = {name: file[name if name in file else other] for name, other in ARRAYS.items()}
    classes = _classes(path, arrays["train_labels"])
    train = _split(path, arrays["train_images"], arrays["train_labels"], classes, size)
    test = _split(path, arrays["test_images"], arrays["test_labels"], classes, size)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise UserError(f"{path}: training images {train[0].shape[1:]}, test {test[0].shape[1:]}")
    return Splits(*train, *test)


def _classes(path: Path, labels: np.ndarray) -> int:
    """Return the number of classes: the largest label plus one."""
    if labels.dtype.kind not in "iu" or labels.size == 0:
        raise UserError(f"{path} has labels of {labels.dtype}, not whole numbers")
    return int(labels.max()) + 1


def _split(
    path: Path, images: np.ndarray, labels: np.ndarray, classes: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Check and resize one split's arrays: images uint8 [n, size, size, channels], labels int32."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(f"{path} has images {images.dtype} {images.shape}, not uint8 [n, h, w, c]")
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UserError(f"{path} has images of shape {images.shape[1:]}, not of 1 or 3 channels")
    if images.shape[1:3] != (size, size):
        images = np.stack([_resized(image, size) for image in images])
    return labelled(path, images, labels.reshape(-1), classes)


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    """Squeeze an image [height, width, channels] to [size, size, channels], channel by channel."""
    planes = [Image.fromarray(image[..., c]) for c in range(image.shape[2])]
    resized = [plane.resize((size, size), Image.Resampling.BILINEAR) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized], axis=-1)
