"""The seven published data sets: their facts, and where their images are found.

In this order: a directory that tensorflow-datasets prepared, the original files, a download of the
original files. Whichever it is, the images come out the same and in the same order.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mosaic_jax.data import cache, download, pictures, prepared
from mosaic_jax.data.forms import Form, cifar_forms, idx_form, padded, svhn_form, tree_form
from mosaic_jax.data.splits import Request, Splits
from mosaic_jax.types import Dataset, UserError

DATA_VARIABLE = "MOSAIC_DATA"
"""Environment variable that names a folder of data sets."""


@dataclass(frozen=True)
class Published:
    """One set.

    Attributes:
      name: ours.
      num_classes: labels lie in [0, num_classes).
      mean: per channel, of images scaled to [0, 1].
      std: the same.
      sizes: heights and widths offered, the default first.
      forms: of the original files.
      downloads: addresses and MD5s of one form.
      hint: another way to get it.
      system: where that way puts it.
    """

    name: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: Sequence[int]
    forms: Sequence[Form]
    downloads: Sequence[download.Download]
    hint: str = ""
    system: list[Path] = field(default_factory=list)


class Found(NamedTuple):
    """Images that are there: in which form, from which files, and what reads them."""

    form: str
    paths: list[Path]
    read: Callable[[int], Splits]


def read(about: Published, request: Request) -> Dataset:
    """A published set, from the first place that has it, decoded once.

    Raises:
      UserError: not found and not fetched, or damaged; names places and files.
    """
    found = find(about, request.directory)
    if found is None and request.directory is None:
        own = cache.root() / "data" / about.name
        try:
            download.fetch(own, about.downloads)
        except UserError as error:
            raise UserError(f"{missing(about, None)}; {error}") from None
        found = find(about, None)
    if found is None:
        raise UserError(missing(about, request.directory))
    size, what = request.image_size, found
    splits = cache.cached(f"{about.name}-{size}", found.paths, lambda: what.read(size))
    return Dataset(about.name, *splits, about.num_classes, about.mean, about.std)


def find(about: Published, directory: Path | None) -> Found | None:
    """Where the images are, without reading them; None where nothing is found."""
    for place in [*places(about, directory), *_prepared_places(directory)]:
        folder = prepared.find(place, about.name)
        if folder is not None:
            reader = partial(_from_prepared, about, folder)
            return Found("prepared by tensorflow-datasets", [folder], reader)
    for place in places(about, directory):
        for form in about.forms:
            paths = form.find(place)
            if paths:
                return Found(form.names, paths, partial(form.read, paths))
    return None


def places(about: Published, directory: Path | None) -> list[Path]:
    """Where a set's files may lie; a folder the user names is the only one."""
    variable = os.environ.get(DATA_VARIABLE)
    top = directory or (Path(variable) if variable else None)
    dashed = about.name.replace("_", "-")
    own = [top / part for part in dict.fromkeys(("", about.name, dashed))] if top else []
    return own if directory else [*own, cache.root() / "data" / about.name, *about.system]


def _prepared_places(directory: Path | None) -> list[Path]:
    """tensorflow-datasets' own directory."""
    own = os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
    return [] if directory else [Path(own)]


def missing(about: Published, directory: Path | None) -> str:
    """The line that says what was looked for, where, and what to do."""
    looked = ", ".join(map(str, places(about, directory)))
    hint = f"get it with `{about.hint}`, or " if about.hint else ""
    return (
        f"data set {about.name!r} not found; looked in {looked} for "
        f"{' or '.join(form.names for form in about.forms)}; {hint}put the files from its public "
        "download page into a folder and name that by --config.data.directory=FOLDER"
    )


def _from_prepared(about: Published, folder: Path, size: int) -> Splits:
    splits = prepared.read(folder, about.num_classes)
    expected = (28, 28, 1) if len(about.mean) == 1 else (32, 32, 3)
    for images in (splits.train_images, splits.test_images):
        if images.shape[1:] != expected:
            raise UserError(f"{folder} holds images of {images.shape[1:]}, not {expected}")
    if expected == (32, 32, 3):
        return splits
    return splits._replace(
        train_images=padded(splits.train_images), test_images=padded(splits.test_images)
    )


def _at(base: str, *files: tuple[str, str]) -> list[download.Download]:
    return [(f"{base}/{name}", md5) for name, md5 in files]


SETS = {
    about.name: about
    for about in (
        Published(
            "mnist",
            10,
            (0.1307,),
            (0.3081,),
            (32,),
            [idx_form()],
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
            [idx_form()],
            _at(
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
                ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
                ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
                ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
            ),
            hint="apt-get install dataset-fashion-mnist",
            system=[Path("/usr/share/datasets/fashion-mnist")],
        ),
        Published(
            "svhn",
            10,
            (0.5, 0.5, 0.5),
            (0.5, 0.5, 0.5),
            (32,),
            [svhn_form()],
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
            cifar_forms("cifar10", 10),
            _at(
                "https://www.cs.toronto.edu/~kriz",
                ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
            ),
        ),
        Published(
            "cifar100",
            100,
            (0.50708, 0.48655, 0.44092),
            (0.26733, 0.25644, 0.27615),
            (32,),
            cifar_forms("cifar100", 100),
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
                tree_form(
                    ("tiny-imagenet-200.zip", "tiny-imagenet-200"), pictures.read_tiny_imagenet
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
            [tree_form(("food-101.tar.gz", "food-101.tar", "food-101"), pictures.read_food101)],
            _at(
                "http://data.vision.ee.ethz.ch/cvl",
                ("food-101.tar.gz", "85eeb15f3717b99a5da872d97d918f87"),
            ),
        ),
    )
}
