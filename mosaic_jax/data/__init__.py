"""Data sets by name, their partition among clients, and batches inside compiled steps."""

from mosaic_jax.data.sources import load, names

__all__ = ["load", "names"]
