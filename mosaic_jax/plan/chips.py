"""Estimate the least time of a compiled program on TPU chips, from their published facts.

This is the roofline: a chip computes at its peak or moves bytes at full bandwidth, whichever takes
longer. Collectives come on top, by the formula of a ring. No program reaches the roofline.
"""

from dataclasses import dataclass

from mosaic_jax.plan.compiled import Figures
from mosaic_jax.plan.hlo import Collective

LINKS = 2
"""Links of a chip that a ring uses, one to each neighbour. A torus has more, which stay idle."""


@dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      peak: operations a second in bfloat16. Products of float32 matrices run in bfloat16 as well
        unless a higher precision is asked for, so the peak holds for both.
      bandwidth: bytes a second of the HBM.
      memory: bytes of the HBM.
      link: bytes a second of one link between chips, one way.
      slices: the compiler's names of slices, by the number of chips in use.
    """

    peak: float
    bandwidth: float
    memory: float
    link: float
    slices: dict[int, str]


FLAT = {1: "2x2", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
DEEP = {1: "2x2x1", 4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"}

CHIPS = {
    # docs.cloud.google.com/tpu/docs/v5e, v5p and v6e, read in November 2026. They give the links'
    # bandwidth of a chip, all links and both ways: 400 GB/s of 4 links (1,600 Gbps one way),
    # 1,200 GB/s of 6 (4,800 Gbps) and 800 GB/s of 4.
    "v5e": Chip(197e12, 819e9, 16 * 2**30, 400e9 / 4 / 2, FLAT),
    "v5p": Chip(459e12, 2765e9, 95 * 2**30, 1200e9 / 6 / 2, DEEP),
    "v6e": Chip(918e12, 1638e9, 32 * 2**30, 800e9 / 4 / 2, FLAT),
}


def ring_seconds(collective: Collective, chip: Chip) -> float:
    """Return the time of one collective over a ring of its devices, both ways round.

    All-reduce passes every byte around twice, 2 (n - 1) / n. Gathering, scattering and exchanging
    pass it once, (n - 1) / n. A permutation moves its bytes over one link.
    """
    devices, link = collective.devices, chip.link
    if collective.kind == "collective-permute":
        return collective.bytes / link
    rounds = 2 if collective.kind == "all-reduce" else 1
    return rounds * (devices - 1) / devices * collective.bytes / (LINKS * link)


def collective_seconds(figures: Figures, chip: Chip) -> float:
    """Return the time of all collectives of a program, one after the other."""
    return sum(each.times * ring_seconds(each, chip) for each in figures.collectives)


def seconds(figures: Figures, chip: Chip) -> float:
    """Return the roofline's time of one run of a program."""
    alone = max(figures.flops / chip.peak, figures.bytes / chip.bandwidth)
    return alone + collective_seconds(figures, chip)
