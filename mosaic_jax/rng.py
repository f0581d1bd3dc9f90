"""All randomness, folded in from what it is for: seed, stage, round, client, step.

Nothing holds random state. A key depends on names and numbers alone, so a resumed run draws what
the undisturbed one drew, and a client's stream depends neither on the other clients nor on how
many run side by side.
"""

import zlib

import jax
import numpy as np

from mosaic_jax.types import Array


def key(seed: int, stage: str, round: int = 0, client: int = 0) -> Array:
    """Key of one stage, round and client; `stage` is any name, hashed by CRC-32."""
    stage_key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))
    return fold(stage_key, round, client)


def fold(key: Array, *numbers: int | Array) -> Array:
    """Fold non-negative integers into a key, one after the other."""
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def numpy_generator(seed: int, stage: str, round: int = 0, client: int = 0) -> np.random.Generator:
    """NumPy twin of `key`, for what happens to the data on the host."""
    return np.random.default_rng([seed, zlib.crc32(stage.encode()), round, client])
