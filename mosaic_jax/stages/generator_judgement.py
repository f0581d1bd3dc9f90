"""Which generators are good enough to teach by, judged by their own clients (not in the paper).

A client compares images of its generator with its own, in the features of its frozen model f0, and
sends one number. Beyond `generator_optimization.max_distance` a generator is unusable, and the
others draw its images. Without any usable generator there is no distillation.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.config import GeneratorOptimization
from mosaic_jax.stages.generator_state import GeneratorState
from mosaic_jax.stages.stage import Metrics
from mosaic_jax.types import Array, UserError

log = logging.getLogger(__name__)

JUDGED = 128
"""Number of images, generated and real, that a client compares."""

FAR = 1e9
"""The largest distance."""

TINY = 1e-9
"""Added to the variance of real images, which may all be equal."""

NAMED = 5
"""Clients that a message names."""


def relative_distance(fake: Array, real: Array) -> Array:
    """Return the distance of two sets of features [n, d], over the variance of the real ones.

    It is |mean difference|^2 + |difference of standard deviations|^2, the Frechet distance of
    normal distributions with diagonal covariances.
    """
    means, deviations = ([of(each, axis=0) for each in (fake, real)] for of in (jnp.mean, jnp.std))
    apart = jnp.square(means[0] - means[1]).sum() + jnp.square(deviations[0] - deviations[1]).sum()
    distance = apart / (jnp.square(deviations[1]).sum() + TINY)
    return jnp.where(jnp.isfinite(distance), jnp.minimum(distance, FAR), FAR)


def unless_diverged(
    before: GeneratorState, after: GeneratorState, diagnostics: dict[str, Array]
) -> tuple[GeneratorState, dict[str, Array]]:
    """Return what steps leave or, if they ended in NaN, what they began with and zeros.

    The diagnostics get "taken_back", which is 1 if the steps ended in NaN.
    """
    leaves = jax.tree.leaves((after, diagnostics))
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
    nothing = jax.tree.map(jnp.zeros_like, diagnostics)
    carry, diagnostics = jax.lax.cond(
        finite, lambda: (after, diagnostics), lambda: (before, nothing)
    )
    return carry, diagnostics | {"taken_back": 1.0 - finite}


def inspect(metrics: Metrics, is_last: bool, settings: GeneratorOptimization) -> None:
    """Warn of blocks that ended in NaN and, after the last block, of unusable generators.

    Raises:
      UserError: there are some, and the settings say to stop.
    """
    ids = np.asarray(metrics.get("clients", np.arange(len(metrics["distance"]))))
    if is_last:
        far = ids[np.asarray(metrics["distance"]) > settings.max_distance]
        most = settings.max_distance
        what = f"images farther than generator_optimization.max_distance = {most} from real ones"
    else:
        far, what = ids[np.asarray(metrics["taken_back"]) > 0], "a block of steps ended in NaN"
    if not len(far):
        return
    distances = dict(zip(ids.tolist(), np.asarray(metrics["distance"]), strict=True))
    named = [f"client {client} ({distances[client]:.2g})" for client in far[:NAMED]]
    more = [f"{len(far) - NAMED} more"] if len(far) > NAMED else []
    text = f"generators of {', '.join([*named, *more])}: {what}"
    if settings.unusable == "stop":
        raise UserError(
            f"{text}; train longer, at a smaller learning rate, or in a new work directory with "
            "generator_optimization.unusable = 'leave_out'"
        )
    done = {"leave_out": "left out", "use": "used all the same"}[settings.unusable]
    log.warning("%s; %s", text, done if is_last else "the next one starts again from before it")


def usable_clients(distances: np.ndarray, settings: GeneratorOptimization) -> np.ndarray:
    """Return whose generators may teach, by their images' distances [clients]: bool [clients]."""
    if settings.unusable == "use":
        return np.ones(len(distances), bool)
    return np.asarray(distances) <= settings.max_distance
