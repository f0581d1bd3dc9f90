"""Losses of a generator on the frozen classifier f0 (paper, Figure 1b)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.types import Array, Variables


def entropy_loss(logits: Array) -> Array:
    """Return L_entropy = mean_b H(softmax f(x_b)): low when every image is of a clear class."""
    log_p = jax.nn.log_softmax(logits)
    return -(jnp.exp(log_p) * log_p).sum(axis=-1).mean()


def diversity_loss(logits: Array) -> Array:
    """Return L_div = sum_c p_c log p_c, p = mean_b softmax f(x_b): -log C for even classes."""
    log_p = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(logits.shape[0])
    return (jnp.exp(log_p) * log_p).sum()


def inversion_loss(model: nn.Module, variables: Variables, images: Array) -> Array:
    """Return L_inv = sum over batch norms of ||mean - running mean|| + ||var - running var||."""
    _, sown = model.apply(variables, images, train=False, mutable=["inversion"])
    return sum(jax.tree.leaves(sown["inversion"]), start=jnp.zeros(()))
