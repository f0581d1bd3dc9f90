"""The time of a collective on a chip's ring, by hand."""

import pytest

from mosaic_jax.plan import chips
from mosaic_jax.plan.hlo import Collective


def test_ring_formula_by_hand():
    chip = chips.Chip(1e12, 1e9, 16e9, 50e9, {})
    summed = Collective("all-reduce", 10**9, 4)
    assert chips.ring_seconds(summed, chip) == pytest.approx(2 * 3 / 4 * 1 / 100)
    gathered = Collective("all-gather", 10**9, 4)
    assert chips.ring_seconds(gathered, chip) == pytest.approx(3 / 4 * 1 / 100)
    shifted = Collective("collective-permute", 10**9, 4)
    assert chips.ring_seconds(shifted, chip) == pytest.approx(1 / 50)
    assert chips.ring_seconds(Collective("all-reduce", 10**9, 1), chip) == 0
