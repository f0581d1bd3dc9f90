"""A division that cannot be had is refused within seconds, and the refusal says what can."""

import numpy as np
import pytest

from mosaic_jax.data import partition as partitions
from mosaic_jax.types import UserError

CLASSES = 10


def test_a_refusal_says_what_would_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "MAX_WORK", 1)  # a hundred tries
    labels = np.arange(100) % CLASSES
    with pytest.raises(UserError, match=r"partition\.minimum=") as found:
        partitions.dirichlet_unbalanced(labels, CLASSES, 5, 0.05, seed=0, minimum=20)
    minimum = int(str(found.value).partition("partition.minimum=")[2].partition(" ")[0])
    assert 0 < minimum < 20
    parts = partitions.dirichlet_unbalanced(labels, CLASSES, 5, 0.05, seed=0, minimum=minimum)
    assert min(map(len, parts)) == minimum


@pytest.mark.parametrize(
    ("images", "classes", "clients", "tries"), [(500, 10, 100, 10_000), (50_000, 100, 500, 666)]
)
def test_draws_of_a_division_are_bounded_by_their_work(
    monkeypatch: pytest.MonkeyPatch, images: int, classes: int, clients: int, tries: int
) -> None:
    """The larger case takes seconds, and took nine minutes when every division had 10,000."""
    drawn = []
    nothing = np.zeros(clients, int), []
    monkeypatch.setattr(partitions, "_divide_classes", lambda *_: drawn.append(1) or nothing)
    labels = np.arange(images) % classes
    with pytest.raises(UserError, match=f"in {tries} tries; lower the minimum"):
        partitions.dirichlet_unbalanced(labels, classes, clients, 1e-4, seed=0, minimum=1)
    assert len(drawn) == tries
