"""Local update (paper, Figure 1a): clients train the received model on their own data.

One client's training is `ClientUpdate`; methods change its loss. A round (`stages/round.py`) maps
it over the clients that take part and averages what comes back.
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mosaic_jax import rng
from mosaic_jax.data.clients import crop_and_flip, epoch_batch, to_float
from mosaic_jax.stages.federation import Federation
from mosaic_jax.types import Array, Outputs, PyTree, Variables


class Batch(NamedTuple):
    """What one step sees: images [batch, h, w, c], labels [batch], mask [batch], and a key."""

    images: Array
    labels: Array
    mask: Array
    key: Array


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """SGD steps of ONE client on cross-entropy. A method's own loss overrides the last two hooks.

    Attributes:
      federation: model and settings.
      steps: number of steps.
      batch_norm: "train": batch statistics, and the client's own running ones go into the average;
        "frozen": the received statistics, which stay as they are.
      masked: whether logits of classes a client does not hold are set to 0 (HeteroFL); such a
        client has no say in these classes' rows of the head.
      personal: whether batch norms, parameters and statistics, stay with their client (FedBN).
      model: what the client trains; the federation's model if not given.
    """

    federation: Federation
    steps: int
    batch_norm: str = "train"
    masked: bool = False
    personal: bool = False
    model: nn.Module | None = None

    def __call__(self, shared: PyTree, client: PyTree) -> tuple[Variables, dict[str, Array]]:
        """Train the received model.

        Args:
          shared: "variables", the received model; "data" all clients index into; "learning_rate";
            "key" of the stage, on which, with the client and the step, the client's stream depends;
            "first_step", steps made before, so that epochs go on across rounds.
          client: its packed lists.

        Returns:
          The trained variables, and the loss and accuracy on the batches it saw.
        """
        received = shared["variables"]
        start = (received, self.optimizer(shared).init(received["params"]))
        numbers = shared["first_step"] + jnp.arange(self.steps)
        (variables, _), sums = jax.lax.scan(
            lambda carry, number: self.step(shared, client, carry, number), start, numbers
        )
        totals = jax.tree.map(jnp.sum, sums)
        return variables, {
            "loss": totals["loss"] / totals["count"],
            "accuracy": totals["correct"] / totals["count"],
        }

    def optimizer(self, shared: PyTree) -> optax.GradientTransformation:
        """SGD with L2 on all parameters."""
        settings = self.federation.config.local_update
        return optax.chain(
            optax.add_decayed_weights(settings.weight_decay),
            optax.sgd(shared["learning_rate"], momentum=settings.momentum or None),
        )

    def step(
        self, shared: PyTree, client: PyTree, carry: PyTree, number: Array
    ) -> tuple[PyTree, dict[str, Array]]:
        """One step on the next batch of the client's epoch."""
        variables, state = carry
        batch = self.batch(shared, client, number)
        gradient, (statistics, sums) = jax.grad(self.loss, has_aux=True)(
            variables["params"], variables["batch_stats"], batch, shared, client
        )
        updates, state = self.optimizer(shared).update(gradient, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, "batch_stats": statistics}, state), sums

    def batch(self, shared: PyTree, client: PyTree, number: Array) -> Batch:
        """The batch of a step, augmented."""
        config, data = self.federation.config, shared["data"]
        key = rng.fold(shared["key"], client["id"])
        positions, mask = epoch_batch(client, number, key, self.federation.batch_size)
        augment = rng.fold(key, number, 1)
        images = to_float(self.federation.taken(data, positions))
        images = crop_and_flip(images, augment, config.data.crop_padding, config.data.flip)
        return Batch(images, data["labels"][positions], mask, rng.fold(key, number, 2))

    def loss(
        self, params: PyTree, statistics: PyTree, batch: Batch, shared: PyTree, client: PyTree
    ) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        """Mean cross-entropy of the unmasked images and the method's own term.

        Returns, beside it, the new statistics and sums over the batch.
        """
        model = self.model or self.federation.model
        outputs, updated = model.apply(
            {"params": params, "batch_stats": statistics},
            batch.images,
            train=self.batch_norm == "train",
            mask=batch.mask,
            mutable=["batch_stats"],
        )
        logits = self.logits(outputs.logits, client)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels) * batch.mask
        correct = (outputs.logits.argmax(-1) == batch.labels) * batch.mask
        sums = {"loss": losses.sum(), "correct": correct.sum(), "count": batch.mask.sum()}
        own_term = self.own_term(params, outputs, batch, shared, client)
        statistics = updated.get("batch_stats", statistics)
        return losses.sum() / batch.mask.sum() + own_term, (statistics, sums)

    def logits(self, logits: Array, client: PyTree) -> Array:
        """What the cross-entropy sees of logits [batch, classes]."""
        return jnp.where(client["class_counts"] > 0, logits, 0.0) if self.masked else logits

    def own_term(
        self, params: PyTree, outputs: Outputs, batch: Batch, shared: PyTree, client: PyTree
    ) -> Array | float:
        """What a method adds to the loss."""
        return 0.0
