"""Estimate the least time of a compiled program on TPU chips or GPUs, from their published facts.

This is the roofline: a chip computes at its peak or moves bytes at full bandwidth, whichever takes
longer. Collectives come on top, by the formula of a ring. No program reaches the roofline.
"""

from dataclasses import dataclass

from mosaic_jax.plan.compiled import Figures
from mosaic_jax.plan.gpus import FACTS
from mosaic_jax.plan.hlo import Collective


@dataclass(frozen=True)
class Chip:
    """One kind of chip; a GPU is one.

    Attributes:
      platform: "tpu" or "gpu".
      peaks: operations a second, by `model.dtype`.
      bandwidth: bytes a second of the HBM.
      memory: bytes of the HBM that programs can use.
      link: bytes a second of one link between chips, one way.
      links: of a chip that a ring uses, side by side.
      topologies: by the number of chips in use, what follows the colon in the topology's name.
    """

    platform: str
    peaks: dict[str, float]
    bandwidth: float
    memory: float
    link: float
    links: int
    topologies: dict[int, str]


FLAT = {1: "2x2", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
DEEP = {1: "2x2x1", 4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"}
NODE = {1: "1", 2: "2", 4: "4", 8: "8"}
"""Sizes of a TPU slice in two and in three dimensions, and of a host with GPUs."""

JAX_SHARE = 0.75
"""Part of a GPU's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


def _tpu(peak: float, bandwidth: float, memory: int, link: float, slices: dict[int, str]) -> Chip:
    """Return a TPU chip.

    Unless a higher precision is asked for, products of float32 matrices run in bfloat16, so one
    peak holds for both. A ring uses one link to each of two neighbours; the others stay idle.
    """
    peaks = {"bfloat16": peak, "float32": peak}
    return Chip("tpu", peaks, bandwidth, memory, link, 2, slices)


def _gpu(card: str, bfloat16: float, tf32: float, link: float) -> Chip:
    """Return a card of `gpus.FACTS`.

    Unless a higher precision is asked for, products of float32 matrices run in TF32. NVSwitch lets
    a ring use the whole NVLink bandwidth of a card towards one neighbour.
    """
    peaks, facts = {"bfloat16": bfloat16, "float32": tf32}, FACTS[card]
    memory = JAX_SHARE * facts["device_memory_size"]
    return Chip("gpu", peaks, facts["memory_bandwidth"], memory, link, 1, NODE)


CHIPS = {
    # docs.cloud.google.com/tpu/docs/v5e, v5p and v6e, read in November 2026. They give the links'
    # bandwidth of a chip, all links and both ways: 400 GB/s of 4 links (1,600 Gbps one way),
    # 1,200 GB/s of 6 (4,800 Gbps) and 800 GB/s of 4.
    "v5e": _tpu(197e12, 819e9, 16 * 2**30, 400e9 / 4 / 2, FLAT),
    "v5p": _tpu(459e12, 2765e9, 95 * 2**30, 1200e9 / 6 / 2, DEEP),
    "v6e": _tpu(918e12, 1638e9, 32 * 2**30, 800e9 / 4 / 2, FLAT),
    # NVIDIA's data sheets of the SXM cards, without sparsity. They give NVLink's bandwidth both
    # ways: 600 GB/s and 900 GB/s.
    "a100": _gpu("a100", 312e12, 156e12, 600e9 / 2),
    "h100": _gpu("h100", 989.4e12, 494.7e12, 900e9 / 2),
}


def ring_seconds(collective: Collective, chip: Chip) -> float:
    """Return the time of one collective over a ring of its devices.

    All-reduce passes every byte around twice, 2 (n - 1) / n. Gathering, scattering and exchanging
    pass it once, (n - 1) / n. A permutation moves its bytes over one link.
    """
    devices, link = collective.devices, chip.link
    if collective.kind == "collective-permute":
        return collective.bytes / link
    rounds = 2 if collective.kind == "all-reduce" else 1
    return rounds * (devices - 1) / devices * collective.bytes / (chip.links * link)


def collective_seconds(figures: Figures, chip: Chip) -> float:
    """Return the time of all collectives of a program, one after the other."""
    return sum(each.times * ring_seconds(each, chip) for each in figures.collectives)


def seconds(figures: Figures, chip: Chip, dtype: str) -> float:
    """Return the roofline's time of one run of a program of a model of that `model.dtype`."""
    alone = max(figures.flops / chip.peaks[dtype], figures.bytes / chip.bandwidth)
    return alone + collective_seconds(figures, chip)
