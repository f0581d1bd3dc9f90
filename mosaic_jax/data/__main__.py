"""Inspect and prepare data sets: `python -m mosaic_jax.data check|prepare|describe NAME`.

`check` prints where a set is found, without reading it; without a name it lists all sets. `prepare`
reads a set once, downloading it if necessary, so that runs start from decoded images. `describe`
draws a sheet of its images and its class histogram.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.table import Table

from mosaic_jax import compat
from mosaic_jax.data import catalog, sources
from mosaic_jax.types import Dataset, UserError, unknown_name

COLUMNS = 20
"""Largest number of images in a row of the sheet."""


def main(argv: list[str]) -> int:
    """Run one command; return the exit code, 2 for an error that the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m mosaic_jax.data", description=__doc__)
    parser.add_argument("command", choices=["check", "prepare", "describe"])
    parser.add_argument("name", nargs="?", help=", ".join(sources.names()))
    parser.add_argument("--directory", type=Path, help="search for the files only here")
    parser.add_argument("--size", type=int, help="height and width in pixels")
    parser.add_argument("--out", type=Path, help="file of the sheet; default: NAME.png")
    arguments = parser.parse_args(argv[1:])
    console = compat.console()
    try:
        if arguments.name is not None and arguments.name not in sources.SOURCES:
            raise UserError(unknown_name("data set", arguments.name, sources.names()))
        if arguments.command == "check":
            return _check(arguments)
        if arguments.name is None:
            raise UserError(f"{arguments.command} needs the name of a data set")
        dataset = sources.load(
            arguments.name, directory=arguments.directory, image_size=arguments.size
        )
        console.print(_facts(dataset))
        if arguments.command == "describe":
            out = arguments.out or Path(f"{arguments.name}.png")
            _draw(dataset, out)
            print(f"wrote {out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Print one line per set; return 2 if the set that was asked for is not found."""
    if arguments.name is not None and arguments.name not in catalog.SETS:
        if arguments.directory is not None and not arguments.directory.exists():
            raise UserError(f"{arguments.directory} does not exist")
        print(f"{arguments.name}: needs no files but what data.directory names")
        return 0
    absent = 0
    for name in [arguments.name] if arguments.name else list(catalog.SETS):
        published = catalog.SETS[name]
        found = catalog.find(published, arguments.directory)
        if found is None:
            absent = 2
            line = catalog.missing(published, arguments.directory)
        else:
            line = f"{name}: {found.format}, in {found.paths[0].parent}"
        print(line)
    return absent if arguments.name else 0


def _facts(dataset: Dataset) -> Table:
    """Return a table of image counts: per class and in all, training and test."""
    table = Table(title=f"{dataset.name}, images {dataset.image_shape}")
    table.add_column("class", justify="right")
    table.add_column("training images", justify="right")
    table.add_column("test images", justify="right")
    counts = [
        np.bincount(labels, minlength=dataset.num_classes)
        for labels in (dataset.train_labels, dataset.test_labels)
    ]
    for label, (train, test) in enumerate(zip(*counts, strict=True)):
        table.add_row(_named(dataset, label), str(train), str(test))
    table.add_section()
    table.add_row("all", str(len(dataset.train_labels)), str(len(dataset.test_labels)))
    return table


def _named(dataset: Dataset, label: int) -> str:
    """Return a class's label, with its name where it has another one."""
    name = dataset.class_names[label]
    return name if name == str(label) else f"{label} {name}"


def _draw(dataset: Dataset, path: Path) -> None:
    """Draw a row of training images for each of up to twenty classes, and the class histogram.

    Raises:
      UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    classes = np.unique(np.linspace(0, dataset.num_classes - 1, 20).round().astype(int))
    size = dataset.train_images.shape[1]
    sheet = np.zeros((len(classes) * size, COLUMNS * size, dataset.train_images.shape[3]), np.uint8)
    for row, label in enumerate(classes):
        for column, index in enumerate(np.flatnonzero(dataset.train_labels == label)[:COLUMNS]):
            down, right = row * size, column * size
            sheet[down : down + size, right : right + size] = dataset.train_images[index]
    drawing = Figure(figsize=(14, 1 + 0.5 * len(classes)), layout="constrained")
    images, bars = drawing.subplots(1, 2, width_ratios=[2, 1])
    images.imshow(sheet.squeeze(), cmap="gray" if sheet.shape[2] == 1 else None)
    names = [_named(dataset, label).replace("$", r"\$") for label in classes]
    images.set_yticks((np.arange(len(classes)) + 0.5) * size, names)
    images.set(xticks=[], ylabel="class", title=f"{dataset.name}, training images")
    for labels, name in ((dataset.train_labels, "training"), (dataset.test_labels, "test")):
        heights = np.bincount(labels, minlength=dataset.num_classes)
        bars.bar(np.arange(dataset.num_classes), heights, label=name, alpha=0.7)
    bars.set(xlabel="class", ylabel="images")
    bars.legend()
    try:
        drawing.savefig(path, dpi=100)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv))
