"""Random keys, folded in from their purpose: seed, stage, round, client, step.

Nothing holds random state. A key depends on names and numbers alone, so a resumed run draws what
the undisturbed one drew, and a client's stream depends neither on the other clients nor on how
many run side by side.
"""

import zlib

import jax
import numpy as np

from mosaic_jax.types import Array


def key(seed: int, stage: str, round_index: int = 0, client: int = 0) -> Array:
    """Return the key of one stage, round and client; `stage` is any name, hashed by CRC-32."""
    stage_key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))
    return fold(stage_key, round_index, client)


def fold(key: Array, *integers: int | Array) -> Array:
    """Fold non-negative integers into a key, one after the other."""
    for integer in integers:
        key = jax.random.fold_in(key, integer)
    return key


def numpy_generator(
    seed: int, stage: str, round_index: int = 0, client: int = 0
) -> np.random.Generator:
    """Return the NumPy twin of `key`, for random choices about data on the host."""
    return np.random.default_rng([seed, zlib.crc32(stage.encode()), round_index, client])
