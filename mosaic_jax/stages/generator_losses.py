"""Losses of a generator on the frozen classifier f0 (paper, Figure 1b)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mosaic_jax.types import Array, Variables


class FrozenView(struct.PyTreeNode):
    """What a frozen classifier makes of a batch of images.

    Attributes:
      inversion: L_inv, float32 []; 0 if it was not asked for.
      logits: float32 [batch, classes].
      maps: feature maps [batch, height, width, channels], from the first layers to the last.
    """

    inversion: Array
    logits: Array
    maps: tuple[Array, ...]


def view(
    model: nn.Module, variables: Variables, images: Array, inversion: bool = False
) -> FrozenView:
    """Evaluate a frozen classifier on images, in one pass.

    L_inv = sum over batch norms of ||mean - running mean|| + ||var - running var||, if `inversion`.
    The maps are what the model sows as `maps` into its collection `intermediates`.
    """
    collections = ["intermediates", "inversion"] if inversion else ["intermediates"]
    outputs, sown = model.apply(variables, images, train=False, mutable=collections)
    return FrozenView(
        inversion=sum(jax.tree.leaves(sown.get("inversion", {})), start=jnp.zeros(())),
        logits=outputs.logits,
        maps=tuple(sown.get("intermediates", {}).get("maps", ())),
    )


def entropy_loss(logits: Array) -> Array:
    """Return L_entropy = mean_b H(softmax f(x_b)): low when every image is of a clear class."""
    log_p = jax.nn.log_softmax(logits)
    return -(jnp.exp(log_p) * log_p).sum(axis=-1).mean()


def diversity_loss(logits: Array) -> Array:
    """Return L_div = sum_c p_c log p_c, p = mean_b softmax f(x_b): -log C for even classes."""
    log_p = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(logits.shape[0])
    return (jnp.exp(log_p) * log_p).sum()


def inversion_loss(model: nn.Module, variables: Variables, images: Array) -> Array:
    """Return L_inv of images, see `view`."""
    return view(model, variables, images, inversion=True).inversion
