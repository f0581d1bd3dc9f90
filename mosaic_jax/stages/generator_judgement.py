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
from mosaic_jax.types import Array, UserError, clients_text

log = logging.getLogger(__name__)

JUDGED = 128
"""Number of images, generated and real, that a client compares."""

FAR = 1e9
"""The largest distance."""

TINY = 1e-9
"""Added to the variance of real images, which may all be equal."""


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
    """Warn of steps that ended in NaN and, after the last block, of unusable generators.

    Raises:
      UserError: there are some, and the settings say to stop.
    """
    distance, most = np.asarray(metrics["distance"]), settings.max_distance
    taken_back = np.asarray(metrics["taken_back"]) > 0
    problems = [(taken_back, "a block of steps ended in NaN", "they are taken back")]
    if is_last:
        what = f"images farther than generator_optimization.max_distance = {most} from real ones"
        done = "used all the same" if settings.unusable == "use" else "left out"
        problems.append((distance > most, what, done))
    ids = np.asarray(metrics.get("clients", np.arange(len(distance))))
    for affected, what, done in problems:
        if not affected.any():
            continue
        named = clients_text(dict(zip(ids[affected].tolist(), distance[affected], strict=True)))
        if settings.unusable == "stop":
            raise UserError(
                f"generators of {named}: {what}; train longer, at a smaller learning rate, or in a "
                "new work directory with generator_optimization.unusable = 'leave_out'"
            )
        log.warning("generators of %s: %s; %s", named, what, done)


def usable_clients(distances: np.ndarray, settings: GeneratorOptimization) -> np.ndarray:
    """Return whose generators may teach, by their images' distances [clients]: bool [clients]."""
    if settings.unusable == "use":
        return np.ones(len(distances), bool)
    return np.asarray(distances) <= settings.max_distance
