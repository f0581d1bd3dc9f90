"""Losses of a generator on the frozen classifier f0 (paper, Figure 1b)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from mosaic_jax.federation import Federation
from mosaic_jax.models import require_batch_norm
from mosaic_jax.stages.generator_state import GeneratorClient
from mosaic_jax.types import Array, PyTree, Variables


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

    L_inv is computed if `inversion`. The maps are what the model sows as `maps` into its collection
    `intermediates`.
    """
    collections = ["intermediates", "inversion"] if inversion else ["intermediates"]
    outputs, sown = model.apply(variables, images, train=False, mutable=collections)
    return FrozenView(
        inversion=_total(sown.get("inversion", {})),
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
    """Return L_inv = sum over batch norms of ||mean - running mean|| + ||var - running var||."""
    _, sown = model.apply(variables, images, train=False, mutable=["inversion"])
    return _total(sown["inversion"])


def _total(distances: PyTree) -> Array:
    return sum(jax.tree.leaves(distances), start=jnp.zeros(()))


class FrozenLosses:
    """The terms of a client's L_G on its frozen model f0; nothing is computed for those off.

    Raises:
      UserError: the inversion loss of a model without batch norm.
    """

    def __init__(self, federation: Federation):
        self.module = federation.classifier.module
        self.settings = settings = federation.config.generator_optimization
        self.uses_inversion = bool(settings.inversion_threshold and settings.inversion_weight)
        if self.uses_inversion:
            variables, name = (
                federation.classifier.abstract_variables(),
                federation.config.model.name,
            )
            require_batch_norm(variables, name, "generator_optimization.inversion_threshold")

    def view(self, frozen: Variables, images: Array) -> FrozenView:
        """Return what f0 makes of images, L_inv included if it is on."""
        return view(self.module, frozen, images, self.uses_inversion)

    def total(
        self,
        seen: FrozenView,
        client: GeneratorClient,
        weights: dict[str, Array],
        labels: Array,
    ) -> tuple[Array, dict[str, Array]]:
        """Return the weighted sum, and the entropy (nats) of the classes that f0 predicts.

        Of a conditional generator's images also return the share that f0 puts into its class.
        """
        settings, loss, diagnostics = self.settings, jnp.zeros(()), {}
        if settings.entropy_weight or settings.diversity_weight or settings.conditional:
            diversity = diversity_loss(seen.logits)
            loss += weights["entropy_weight"] * entropy_loss(seen.logits)
            loss += weights["diversity_weight"] * diversity
            diagnostics["class_entropy"] = -diversity
        if settings.conditional:
            if settings.class_weight:
                each = optax.softmax_cross_entropy_with_integer_labels(seen.logits, labels)
                loss += weights["class_weight"] * each.mean()
            diagnostics["class_match"] = (seen.logits.argmax(axis=-1) == labels).mean()
        if self.uses_inversion:
            is_small = client.lists.size < settings.inversion_threshold
            loss += jnp.where(is_small, weights["inversion_weight"], 0.0) * seen.inversion
        return loss, diagnostics
