"""Partition of a data set among clients: labels in, one list of indices per client out.

All is pure NumPy and runs on the host, once per run. The kinds are those of the Mosaic reference
(arXiv 2505.19699): label-skewed Dirichlet with free client sizes, Dirichlet with equal sizes, and
IID. Class counts, validation splits and local test sets are derived from a partition.
"""

from collections.abc import Sequence

import numpy as np

from mosaic_jax import rng
from mosaic_jax.types import UserError, unknown_name

KINDS = ("dirichlet", "dirichlet_balanced", "iid")
MAX_TRIES, MAX_WORK, MAX_DRAWS = 10_000, 200_000_000, 1000
"""Most draws of a partition before giving up; most work in all of them, in shuffled images (a share
of a class costs as much as `SHARE` of them), which takes about ten seconds; most draws of one
class's proportions."""

SHARE = 5

Indices = list[np.ndarray]


def partition(
    kind: str,
    labels: np.ndarray,
    num_classes: int,
    *,
    clients: int,
    alpha: float,
    seed: int,
    minimum: int = 10,
) -> Indices:
    """Divide a data set among clients.

    The reference's seeds are its runs' seeds plus 5363. Here a seed is used as it is.

    Args:
      kind: one of `KINDS`.
      labels: int [images].
      num_classes: labels lie in [0, num_classes).
      clients: number of clients.
      alpha: concentration of the Dirichlet distribution, smaller is more skewed; unused by "iid".
      seed: chooses the partition.
      minimum: smallest number of images of a client, for "dirichlet" only.

    Returns:
      For every client an int64 array of indices into `labels`, no index twice.

    Raises:
      UserError: an argument is out of range, or no such partition was found.
    """
    if kind not in KINDS:
        raise UserError(unknown_name("partition", kind, list(KINDS)))
    if not 1 <= clients <= len(labels):
        raise UserError(f"{len(labels)} images cannot be divided among {clients} clients")
    if kind == "iid":
        return iid(labels, num_classes, clients, seed)
    if not 0 < alpha < np.inf:
        raise UserError(f"the partition's alpha must be positive and finite, not {alpha}")
    if kind == "dirichlet_balanced":
        return dirichlet_balanced(labels, num_classes, clients, alpha, seed)
    return dirichlet_unbalanced(labels, num_classes, clients, alpha, seed, minimum=minimum)


def dirichlet_unbalanced(
    labels: np.ndarray,
    num_classes: int,
    clients: int,
    alpha: float,
    seed: int,
    *,
    minimum: int = 10,
) -> Indices:
    """Divide every class among the clients by proportions drawn from Dirichlet(alpha).

    This is the reference's default, reproduced draw by draw on NumPy's legacy generator. The whole
    partition is drawn again until every client holds at least `minimum` images. Unlike in the
    reference, the number of tries is bounded.

    Raises:
      UserError: there are too few images, or no try gave every client its minimum.
    """
    if clients * minimum > len(labels):
        raise UserError(
            f"{len(labels)} images cannot give {clients} clients {minimum} each; "
            "lower the minimum or the number of clients"
        )
    generator, best = np.random.RandomState(seed), 0
    work = len(labels) + SHARE * clients * num_classes
    tries = max(100, min(MAX_TRIES, MAX_WORK // work))
    for _ in range(tries):
        sizes, divided = _divide_classes(labels, num_classes, clients, alpha, generator)
        best = max(best, int(sizes.min()))
        if sizes.min() >= minimum:
            pieces = [np.split(members, cuts) for members, cuts in divided]
            parts = [np.concatenate(piece) for piece in zip(*pieces, strict=True)]
            for part in parts:
                generator.shuffle(part)
            return parts
    remedy = f"partition.minimum={best} works with this seed" if best else "lower the minimum"
    raise UserError(
        f"no division of {len(labels)} images among {clients} clients with alpha={alpha} gave "
        f"every client {minimum} images in {tries} tries; {remedy}, or raise partition.alpha, or "
        "take fewer clients"
    )


def _divide_classes(
    labels: np.ndarray,
    num_classes: int,
    clients: int,
    alpha: float,
    generator: np.random.RandomState,
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Draw one partition, class after class.

    A client that already holds its fair share of images gets none of the next class.

    Returns:
      The images of each client [clients], and of each class its shuffled indices with the positions
      that cut them into one piece per client.
    """
    divided, sizes = [], np.zeros(clients, int)
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        generator.shuffle(members)
        is_open = sizes < len(labels) / clients
        cuts = _cuts(len(members), is_open, alpha, generator)
        divided.append((members, cuts))
        sizes += np.diff(cuts, prepend=0, append=len(members))
    return sizes, divided


def _cuts(
    count: int, is_open: np.ndarray, alpha: float, generator: np.random.RandomState
) -> np.ndarray:
    """Draw the positions [clients - 1] that cut `count` images into one piece per client.

    Only clients where `is_open` [clients] get images. For small alpha the proportions of all open
    clients can underflow to zero. The reference then divides by zero; here they are drawn again.

    Raises:
      UserError: the proportions underflow in every try.
    """
    clients = len(is_open)
    for _ in range(MAX_DRAWS):
        # If the draws of all clients underflow, NumPy gives NaN or infinity, and the comparison
        # below is false.
        proportions = np.where(is_open, generator.dirichlet(np.full(clients, alpha)), 0.0)
        total = proportions.sum()
        if 0 < total < np.inf:
            return (np.cumsum(proportions / total) * count).astype(int)[:-1]
        if count == 0:
            return np.zeros(clients - 1, int)
    raise UserError(
        f"alpha={alpha} is too small: the proportions of {clients} clients underflow to zero"
    )


def dirichlet_balanced(
    labels: np.ndarray, num_classes: int, clients: int, alpha: float, seed: int
) -> Indices:
    """Give every client floor(images / clients) images by Dirichlet(alpha) class preferences.

    One client after another draws without replacement from the remaining images. The weight of an
    image is the client's preference for its class. If the preferred classes run out, the rest is
    drawn uniformly. The reference instead gives all remaining images to one client, and later
    clients get nothing.
    """
    generator = rng.numpy_generator(seed, "partition")
    size = len(labels) // clients
    remaining = np.arange(len(labels))
    parts = []
    for _ in range(clients):
        preferences = generator.dirichlet(np.full(num_classes, alpha))
        # Sorting log-weights plus Gumbel noise is weighted sampling without replacement. Images of
        # weight zero come last. The shuffle puts them into random order.
        remaining = generator.permutation(remaining)
        with np.errstate(divide="ignore"):
            scores = np.log(preferences)[labels[remaining]] + generator.gumbel(size=len(remaining))
        order = np.argsort(-scores, kind="stable")
        parts.append(remaining[order[:size]])
        remaining = remaining[order[size:]]
    return parts


def iid(labels: np.ndarray, num_classes: int, clients: int, seed: int) -> Indices:
    """Deal every class out evenly at random.

    Clients differ by at most one image, in total and per class. The reference leaves the remainder
    of every class over. Here each class is dealt on from where the class before ended, so that the
    same clients do not always get one image more.
    """
    generator = rng.numpy_generator(seed, "partition")
    by_class = [np.flatnonzero(labels == label) for label in range(num_classes)]
    dealt = np.concatenate([generator.permutation(members) for members in by_class])
    return [generator.permutation(dealt[client::clients]) for client in range(clients)]


def class_counts(indices: Sequence[np.ndarray], labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count every client's images of each class: int64 [clients, classes]."""
    counts = [np.bincount(labels[part], minlength=num_classes) for part in indices]
    return np.stack(counts).astype(np.int64)


def split_validation(
    indices: Sequence[np.ndarray], labels: np.ndarray, fraction: float, seed: int
) -> tuple[Indices, Indices]:
    """Hold out a fraction of every client's images, stratified by class as far as possible.

    Every client keeps at least one training image of each of its classes, so small clients may give
    less than the fraction. A client's split depends on its own images only.

    Returns:
      Training and validation indices per client; the order of the training indices is kept.

    Raises:
      UserError: the fraction does not lie in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the validation fraction must lie in [0, 1), not {fraction}")
    train, validation = [], []
    for client, part in enumerate(indices):
        generator = rng.numpy_generator(seed, "validation", client=client)
        is_held_out = _held_out(labels[part], fraction, generator)
        train.append(part[~is_held_out])
        validation.append(part[is_held_out])
    return train, validation


def _held_out(labels: np.ndarray, fraction: float, generator: np.random.Generator) -> np.ndarray:
    """Draw the mask [images] of one client's validation images.

    Class counts are rounded by largest remainder and leave one training image of each class.
    """
    classes, counts = np.unique(labels, return_counts=True)
    exact = fraction * counts
    taken = np.minimum(np.floor(exact).astype(int), counts - 1)
    missing = int(fraction * len(labels) + 0.5) - taken.sum()
    # Many classes of equal size have equal remainders; such ties are broken at random.
    order = np.lexsort((generator.random(len(classes)), taken - exact))
    order = order[(taken < counts - 1)[order]]
    taken[order[: max(missing, 0)]] += 1
    mask = np.zeros(len(labels), bool)
    for label, count in zip(classes, taken, strict=True):
        mask[generator.permutation(np.flatnonzero(labels == label))[:count]] = True
    return mask


def local_test_shards(test_labels: np.ndarray, class_counts: np.ndarray, seed: int) -> Indices:
    """Draw for every client a test shard with the class proportions of its training data.

    The reference gives clients IID shards, which do not measure performance on a client's own
    distribution. A shard is as large as possible without repeating an image. Shards of different
    clients overlap: clients with a common class would otherwise have to divide its few test images,
    and every client's score is an estimate by itself. Classes without test images are left out.

    Args:
      test_labels: int [images].
      class_counts: [clients, classes], numbers of the clients' training images.
      seed: chooses the images.

    Returns:
      For every client an int64 array of sorted indices into `test_labels`.
    """
    num_classes = class_counts.shape[1]
    members = [np.flatnonzero(test_labels == label) for label in range(num_classes)]
    available = np.array([len(member) for member in members])
    shards = []
    for client, counts in enumerate(class_counts):
        generator = rng.numpy_generator(seed, "local test", client=client)
        wanted = _largest_multiple(np.asarray(counts), available)
        chosen = [
            generator.choice(member, count, replace=False)
            for member, count in zip(members, wanted, strict=True)
        ]
        shards.append(np.sort(np.concatenate(chosen)))
    return shards


def _largest_multiple(counts: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Scale `counts` [classes] to the largest integers that `available` [classes] allows."""
    held = (counts > 0) & (available > 0)
    if not held.any():
        return np.zeros(len(counts), int)
    factor = np.min(available[held] / counts[held])
    return np.where(held, np.rint(factor * counts), 0).astype(int)
