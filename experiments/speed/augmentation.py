"""Time a batch's crops and mirror images, in JAX and in PyTorch, each in several forms.

    python -m experiments.speed.augmentation --rounds 7

Every form takes 64 images at random out of 50,000 of 32 x 32 x 3, cuts each out of a frame of four
pixels and mirrors half of them. A form that gives other images than the first ends the command.
The forms run in alternation. The table gives medians and ranges, ms a batch: of the images alone,
and with the gradient for JAX's forms. `compare_pytorch` uses the last of PyTorch's.
"""

import argparse
from collections.abc import Callable
from functools import partial
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from experiments.speed.pytorch_baseline import data
from experiments.speed.timed_units import alternate, median_and_range
from mosaic_jax.data import augmentation
from mosaic_jax.data.batches import to_float
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.text import markdown_table
from mosaic_jax.types import Array

BATCH, IMAGES, SIZE, PADDING, REPEATS = 64, 50_000, 32, 4, 50


def draw(repeat: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw positions [batch], corners [batch, 2] and which images are mirrored [batch]."""
    rng = np.random.default_rng(repeat)
    corners = rng.integers(0, 2 * PADDING + 1, (BATCH, 2))
    return rng.integers(IMAGES, size=BATCH), corners, rng.random(BATCH) < 0.5


def sliced(images: Array, shift: Array, is_mirrored: Array) -> Array:
    """Cut a slice of each framed image, and choose it or its mirror image."""
    frame = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
    framed = jnp.pad(images, frame, constant_values=augmentation.BLACK)
    cut = partial(jax.lax.dynamic_slice, slice_sizes=images.shape[1:])
    cuts = jax.vmap(lambda image, corner: cut(image, (*corner, 0)))(framed, shift + PADDING)
    return jnp.where(is_mirrored[:, None, None, None], cuts[:, :, ::-1], cuts)


def products(images: Array, shift: Array, is_mirrored: Array) -> Array:
    """Move the pixels as products with one-hot matrices, as on a TPU."""
    order = jnp.arange(SIZE)
    rows = shift[:, :1] + order
    columns = shift[:, 1:] + jnp.where(is_mirrored[:, None], order[::-1], order)
    moved = augmentation.by_products(images - augmentation.BLACK, rows, columns)
    return moved + augmentation.BLACK


Move = Callable[[Array, Array, Array], Array]
OURS: dict[str, Move | None] = {
    "no augmentation": None,
    "slices of framed images": sliced,
    "one-hot products": products,
    "one gather of pixels": augmentation.move,
}


def ours(pixels: Array, form: Move | None, gradient: bool) -> Callable[[], np.ndarray]:
    """Return a function that augments `REPEATS` batches in one compiled loop."""
    draws = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(draw, range(REPEATS)))

    def batch(images: Array, corners: Array, is_mirrored: Array) -> Array:
        return images if form is None else form(images, corners - PADDING, is_mirrored)

    def step(last: Array, drawn: tuple[Array, Array, Array]) -> tuple[Array, None]:
        positions, corners, is_mirrored = drawn
        images = to_float(pixels[positions]).reshape(BATCH, SIZE, SIZE, 3)
        if not gradient:
            return batch(images, corners, is_mirrored), None
        moved, pull = jax.vjp(lambda x: batch(x, corners, is_mirrored), images)
        return pull(moved + last)[0], None

    @jax.jit
    def run() -> Array:
        return jax.lax.scan(step, jnp.zeros((BATCH, SIZE, SIZE, 3)), draws)[0]

    return lambda: np.asarray(run())


def loop(images: Tensor, positions: Tensor, corners: Tensor, is_mirrored: Tensor) -> Tensor:
    """Cut image after image out of the framed set, as a loader's transform does."""
    batch = images.new_empty(BATCH, SIZE, SIZE, 3)
    chosen = (positions.tolist(), corners.tolist(), is_mirrored.tolist())
    for to, position, (row, column), mirror in zip(batch, *chosen, strict=True):
        cut = images[position, row : row + SIZE, column : column + SIZE]
        to.copy_(cut.flip(1) if mirror else cut)
    return batch.permute(0, 3, 1, 2)


def indexed(images: Tensor, positions: Tensor, corners: Tensor, is_mirrored: Tensor) -> Tensor:
    """Take the batch out of the framed set with three index tensors."""
    order = torch.arange(SIZE)
    rows = corners[:, :1] + order
    columns = corners[:, 1:] + torch.where(is_mirrored[:, None], order.flip(0), order)
    taken = images[positions[:, None, None], rows[:, :, None], columns[:, None, :]]
    return taken.permute(0, 3, 1, 2)


TORCH: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "slices of framed images": loop,
    "three index tensors": indexed,
    "one gather of pixels": partial(data.cut, padding=PADDING),
}


def theirs(framed: Tensor, form: Callable[..., Tensor]) -> Callable[[], np.ndarray]:
    """Return a function that augments `REPEATS` batches and returns the last."""
    draws = [tuple(map(torch.from_numpy, draw(repeat))) for repeat in range(REPEATS)]

    def run() -> np.ndarray:
        for drawn in draws:
            batch = form(framed, *drawn)
        return batch.permute(0, 2, 3, 1).numpy()

    return run


def seconds(run: Callable[[], np.ndarray]) -> float:
    """Return the seconds of a batch."""
    start = perf_counter()
    run()
    return (perf_counter() - start) / REPEATS


def main(arguments: argparse.Namespace) -> None:
    """Time all forms and print the table."""
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE * SIZE * 3), dtype=np.uint8)
    shaped = pixels.reshape(IMAGES, SIZE, SIZE, 3)
    framed = data.frame(data.to_float(shaped, torch.device("cpu")), PADDING)
    on_device, forms = jnp.asarray(pixels), {}
    for name, move in OURS.items():
        forms[f"JAX, {name}"] = ours(on_device, move, gradient=False)
    for name, form in TORCH.items():
        forms[f"PyTorch, {name}"] = theirs(framed, form)
    expected = forms["JAX, slices of framed images"]()
    for name, run in forms.items():
        if "no augmentation" not in name:
            np.testing.assert_allclose(run(), expected, atol=1e-6, err_msg=name)
    for name, move in OURS.items():
        forms[f"JAX, {name}, with the gradient"] = ours(on_device, move, gradient=True)
    times = alternate(
        {name: partial(seconds, run) for name, run in forms.items()}, arguments.rounds
    )
    rows = [[name, median_and_range([1e3 * second for second in of])] for name, of in times.items()]
    print(markdown_table([["form", "ms a batch"], *rows]))


if __name__ == "__main__":
    parser = launch.command_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="times that every form runs")
    main(parser.parse_args())
