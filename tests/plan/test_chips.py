"""The times of programs and of collectives on a chip's ring, by hand."""

import pytest

from mosaic_jax.plan import chips
from mosaic_jax.plan.compiled import Figures
from mosaic_jax.plan.hlo import Collective

PEAKS = {"bfloat16": 1e12, "float32": 0.5e12}


def test_ring_formula_by_hand():
    chip = chips.Chip("tpu", PEAKS, 1e9, 16e9, 50e9, 2, {})
    summed = Collective("all-reduce", 10**9, 4)
    assert chips.ring_seconds(summed, chip) == pytest.approx(2 * 3 / 4 * 1 / 100)
    gathered = Collective("all-gather", 10**9, 4)
    assert chips.ring_seconds(gathered, chip) == pytest.approx(3 / 4 * 1 / 100)
    shifted = Collective("collective-permute", 10**9, 4)
    assert chips.ring_seconds(shifted, chip) == pytest.approx(1 / 50)
    assert chips.ring_seconds(Collective("all-reduce", 10**9, 1), chip) == 0


@pytest.mark.parametrize(
    ("card", "peaks", "bandwidth", "link"),
    [("a100", (312e12, 156e12), 2.04e12, 300e9), ("h100", (989e12, 495e12), 3.35e12, 450e9)],
)
def test_a_gpus_roofline_by_hand(card, peaks, bandwidth, link):
    chip = chips.CHIPS[card]
    summed = Collective("all-reduce", 8 * 10**9, 8)
    ring = 2 * 7 / 8 * 8e9 / link
    assert chips.ring_seconds(summed, chip) == pytest.approx(ring)
    computing = Figures(1e15, 1e9, {}, True, 1, 1, True, True, [summed], [])
    for dtype, peak in zip(("bfloat16", "float32"), peaks, strict=True):
        expected = 1e15 / peak + ring
        assert chips.seconds(computing, chip, dtype) == pytest.approx(expected, rel=2e-3)
    moving = Figures(1e9, 1e13, {}, True, 1, 1, True, True, [], [])
    assert chips.seconds(moving, chip, "bfloat16") == pytest.approx(1e13 / bandwidth, rel=2e-3)
    assert 0.7 * 80e9 < chip.memory < 80e9
