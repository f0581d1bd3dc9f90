"""The catalog of the seven published data sets, and the search for their images.

The search takes the first of: a directory that tensorflow-datasets prepared, the original files, a
download of the original files. All three give the same images in the same order.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mosaic_jax.data import cache, download
from mosaic_jax.data.formats import cifar, idx, images, svhn, tfds
from mosaic_jax.data.formats.base import FileFormat, Request, Splits, padded, tree_format
from mosaic_jax.types import Dataset, UserError

DATA_VARIABLE = "MOSAIC_DATA"
"""Environment variable that names a folder of data sets."""


@dataclass(frozen=True)
class Published:
    """One published data set.

    Attributes:
      name: the name in this package.
      num_classes: labels lie in [0, num_classes).
      mean: mean per channel of images scaled to [0, 1].
      std: standard deviation per channel of the same.
      sizes: available heights and widths in pixels, the default first.
      formats: formats of the original files.
      downloads: addresses and MD5s of the files in one of the formats.
      hint: a shell command that installs the files.
      system: folders that this command puts them into.
      class_names: in the order of the labels, where the files do not say them.
    """

    name: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: Sequence[int]
    formats: Sequence[FileFormat]
    downloads: Sequence[download.Download]
    hint: str = ""
    system: list[Path] = field(default_factory=list)
    class_names: tuple[str, ...] = ()


class Found(NamedTuple):
    """Images that were found.

    Attributes:
      format: of the files, for messages.
      paths: of the files or folders.
      read: image size -> splits.
    """

    format: str
    paths: list[Path]
    read: Callable[[int], Splits]


def read(published: Published, request: Request) -> Dataset:
    """Read a published set from the first place that has it; its images are decoded only once.

    Raises:
      UserError: the set is neither found nor fetched, or it is damaged; names places and files.
    """
    found = find(published, request.directory)
    if found is None and request.directory is None:
        try:
            download.fetch(cache.root() / "data" / published.name, published.downloads)
        except UserError as error:
            raise UserError(f"{missing(published, None)}; {error}") from None
        found = find(published, None)
    if found is None:
        raise UserError(missing(published, request.directory))
    size = request.image_size
    splits = cache.cached(f"{published.name}-{size}", found.paths, partial(found.read, size))
    named = splits._replace(class_names=splits.class_names or published.class_names)
    return Dataset(
        name=published.name,
        num_classes=published.num_classes,
        mean=published.mean,
        std=published.std,
        **named._asdict(),
    )


def find(published: Published, directory: Path | None) -> Found | None:
    """Find a set's images without reading them; return None if there are none."""
    for place in [*places(published, directory), *_tfds_directories(directory)]:
        folder = tfds.find(place, published.name)
        if folder is not None:
            reader = partial(_read_tfds, published, folder)
            return Found("prepared by tensorflow-datasets", [folder], reader)
    for place in places(published, directory):
        for file_format in published.formats:
            paths = file_format.find(place)
            if paths:
                return Found(file_format.names, paths, partial(file_format.read, paths))
    return None


def places(published: Published, directory: Path | None) -> list[Path]:
    """Return the folders to search for a set's files.

    A folder that the user names is the only one.
    """
    variable = os.environ.get(DATA_VARIABLE)
    top = directory or (Path(variable) if variable else None)
    dashed = published.name.replace("_", "-")
    # `dict.fromkeys` removes the duplicate where the name has no underscore.
    given = [top / part for part in dict.fromkeys(("", published.name, dashed))] if top else []
    return (
        given if directory else [*given, cache.root() / "data" / published.name, *published.system]
    )


def _tfds_directories(directory: Path | None) -> list[Path]:
    """Return tensorflow-datasets' default directory, unless the user names another folder."""
    default = os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
    return [] if directory else [Path(default)]


def missing(published: Published, directory: Path | None) -> str:
    """Return the error message for a set that was not found: files, places and what to do."""
    looked = ", ".join(map(str, places(published, directory)))
    hint = f"get it with `{published.hint}`, or " if published.hint else ""
    files = " or ".join(file_format.names for file_format in published.formats)
    return (
        f"data set {published.name!r} not found; looked in {looked} for {files}; {hint}put the "
        "files from its public download page into a folder and name that by "
        "--config.data.directory=FOLDER"
    )


def _read_tfds(published: Published, folder: Path, size: int) -> Splits:
    """Read a directory of tensorflow-datasets; 28x28 images are padded to 32x32.

    Raises:
      UserError: its images are of another shape.
    """
    splits = tfds.read(folder, published.num_classes)
    expected = (28, 28, 1) if len(published.mean) == 1 else (32, 32, 3)
    for array in (splits.train_images, splits.test_images):
        if array.shape[1:] != expected:
            raise UserError(f"{folder} holds images of {array.shape[1:]}, not {expected}")
    if expected == (32, 32, 3):
        return splits
    return splits._replace(
        train_images=padded(splits.train_images), test_images=padded(splits.test_images)
    )


def _at(base: str, *files: tuple[str, str]) -> list[download.Download]:
    """Return the downloads of files under one address, each given as (name, MD5)."""
    return [(f"{base}/{name}", md5) for name, md5 in files]


SETS = {
    published.name: published
    for published in (
        Published(
            "mnist",
            10,
            (0.1307,),
            (0.3081,),
            (32,),
            [idx.file_format()],
            _at(
                "https://ossci-datasets.s3.amazonaws.com/mnist",
                ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
                ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
                ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
            ),
        ),
        Published(
            "fashion_mnist",
            10,
            # The set's own statistics of the unpadded images; the reference uses MNIST's here.
            (0.2860,),
            (0.3530,),
            (32,),
            [idx.file_format()],
            _at(
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
                ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
                ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
                ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
            ),
            hint="apt-get install dataset-fashion-mnist",
            system=[Path("/usr/share/datasets/fashion-mnist")],
            class_names=(
                *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
                *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
            ),
        ),
        Published(
            "svhn",
            10,
            (0.5, 0.5, 0.5),
            (0.5, 0.5, 0.5),
            (32,),
            [svhn.file_format()],
            _at(
                "http://ufldl.stanford.edu/housenumbers",
                ("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
                ("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
            ),
        ),
        Published(
            "cifar10",
            10,
            (0.4914, 0.4822, 0.4465),
            (0.2023, 0.1994, 0.2010),
            (32,),
            cifar.file_formats("cifar10", 10),
            _at(
                "https://www.cs.toronto.edu/~kriz",
                ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
            ),
            class_names=(
                *("airplane", "automobile", "bird", "cat", "deer"),
                *("dog", "frog", "horse", "ship", "truck"),
            ),
        ),
        Published(
            "cifar100",
            100,
            (0.50708, 0.48655, 0.44092),
            (0.26733, 0.25644, 0.27615),
            (32,),
            cifar.file_formats("cifar100", 100),
            _at(
                "https://www.cs.toronto.edu/~kriz",
                ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
            ),
        ),
        Published(
            "tiny_imagenet",
            200,
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
            (32, 64),
            [
                tree_format(
                    ("tiny-imagenet-200.zip", "tiny-imagenet-200"), images.read_tiny_imagenet
                )
            ],
            _at(
                "http://cs231n.stanford.edu",
                ("tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
            ),
        ),
        Published(
            "food101",
            101,
            (0.50708, 0.48655, 0.44092),
            (0.26733, 0.25644, 0.27615),
            (32, 64),
            [tree_format(("food-101.tar.gz", "food-101.tar", "food-101"), images.read_food101)],
            _at(
                "http://data.vision.ee.ethz.ch/cvl",
                ("food-101.tar.gz", "85eeb15f3717b99a5da872d97d918f87"),
            ),
        ),
    )
}
