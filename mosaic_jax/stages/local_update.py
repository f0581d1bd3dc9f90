"""Local update (paper, Figure 1a): clients train the received model on their own data.

`ClientUpdate` is one client's training; methods override its hooks. A round
(`stages/federated_round.py`) maps it over the clients that take part and averages the models they
send.
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from mosaic_jax import rng
from mosaic_jax.data.augmentation import crop_and_flip
from mosaic_jax.data.batches import ClientLists, epoch_batch, to_float
from mosaic_jax.federation import Federation
from mosaic_jax.types import Array, Outputs, PyTree, TrainingImages, Variables


class RoundInputs(struct.PyTreeNode):
    """Downlink of a round: the input that all its clients share.

    Attributes:
      data: the images that clients index into.
      key: key of the stage; client and step are folded in.
      learning_rate: float32 [].
      first_step: int32 [], steps made in earlier rounds of the stage, so that epochs go on.
      round_index: int32 [], rounds made since the first of the run.
      variables: the received model; the global one as a round is called, and in a client's update
        the sub-model that the client holds.
      channels: the channels that a sub-model holds; empty for the whole model.
      from_server: named pytrees that a method's server sends beside the model.
    """

    data: TrainingImages
    key: Array
    learning_rate: Array
    first_step: Array
    round_index: Array
    variables: Variables | None = None
    channels: dict[str, Array] = struct.field(default_factory=dict)
    from_server: dict[str, PyTree] = struct.field(default_factory=dict)


class Batch(NamedTuple):
    """Batch of one step: images [batch, h, w, c], labels [batch], mask [batch], and a key."""

    images: Array
    labels: Array
    mask: Array
    key: Array


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """SGD steps of ONE client on cross-entropy, with hooks for methods.

    A method overrides `adjust_logits` and `regularizer` to change the loss, `receive` and `keep`
    to keep a part of the model on the client, and `mask` to send less than the client holds.

    Attributes:
      federation: model and settings.
      steps: number of steps.
      batch_norm: "train" uses batch statistics, and the client's running statistics go into the
        average; "frozen" uses the received statistics, which stay as they are.
      module: the classifier that the client trains; the federation's if None.
    """

    federation: Federation
    steps: int
    batch_norm: str = "train"
    module: nn.Module | None = None

    def __call__(
        self, inputs: RoundInputs, client: ClientLists
    ) -> tuple[Variables, dict[str, Array]]:
        """Train the received model.

        Returns:
          The trained variables, and mean loss and accuracy on the batches.
        """
        received = inputs.variables
        assert received is not None
        start = (received, self.optimizer(inputs).init(received["params"]))
        steps = inputs.first_step + jnp.arange(self.steps)
        (variables, _), sums = jax.lax.scan(
            lambda carry, step: self.step(inputs, client, carry, step), start, steps
        )
        totals = jax.tree.map(jnp.sum, sums)
        return variables, {
            "loss": totals["loss"] / totals["count"],
            "accuracy": totals["correct"] / totals["count"],
        }

    def optimizer(self, inputs: RoundInputs) -> optax.GradientTransformation:
        """Return SGD with L2 on all parameters."""
        settings = self.federation.config.local_update
        return optax.chain(
            optax.add_decayed_weights(settings.weight_decay),
            optax.sgd(inputs.learning_rate, momentum=settings.momentum or None),
        )

    def step(
        self, inputs: RoundInputs, client: ClientLists, carry: PyTree, step: Array
    ) -> tuple[PyTree, dict[str, Array]]:
        """Make one step on the next batch of the client's epoch."""
        variables, state = carry
        batch = self.batch(inputs, client, step)
        gradient, (statistics, sums) = jax.grad(self.loss, has_aux=True)(
            variables["params"], variables["batch_stats"], batch, inputs, client
        )
        updates, state = self.optimizer(inputs).update(gradient, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, "batch_stats": statistics}, state), sums

    def batch(self, inputs: RoundInputs, client: ClientLists, step: Array) -> Batch:
        """Gather and augment the batch of a step."""
        config, data = self.federation.config, inputs.data
        key = rng.fold(inputs.key, client.id)
        positions, mask = epoch_batch(
            client.index, client.size, step=step, key=key, batch_size=self.federation.batch_size
        )
        augment = rng.fold(key, step, 1)
        images = to_float(data.gather(positions))
        images = crop_and_flip(images, augment, config.data.crop_padding, config.data.flip)
        return Batch(images, data.labels[positions], mask, rng.fold(key, step, 2))

    def loss(
        self,
        params: PyTree,
        statistics: PyTree,
        batch: Batch,
        inputs: RoundInputs,
        client: ClientLists,
    ) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        """Return the mean cross-entropy of the unmasked images plus the regularizer.

        Beside it, return the new batch-norm statistics and sums over the batch.
        """
        module = self.module or self.federation.classifier.module
        outputs, updated = module.apply(
            {"params": params, "batch_stats": statistics},
            batch.images,
            train=self.batch_norm == "train",
            mask=batch.mask,
            mutable=["batch_stats"],
        )
        logits = self.adjust_logits(outputs.logits, client)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels) * batch.mask
        correct = (outputs.logits.argmax(-1) == batch.labels) * batch.mask
        sums = {"loss": losses.sum(), "correct": correct.sum(), "count": batch.mask.sum()}
        regularizer = self.regularizer(params, outputs, batch, inputs, client)
        statistics = updated.get("batch_stats", statistics)
        return losses.sum() / batch.mask.sum() + regularizer, (statistics, sums)

    def adjust_logits(self, logits: Array, client: ClientLists) -> Array:
        """Hook: change the logits [batch, classes] before the cross-entropy."""
        return logits

    def regularizer(
        self,
        params: PyTree,
        outputs: Outputs,
        batch: Batch,
        inputs: RoundInputs,
        client: ClientLists,
    ) -> Array | float:
        """Hook: return a term to add to the loss."""
        return 0.0

    def initial_own(self, variables: Variables) -> PyTree:
        """Hook: return what a client keeps of its own before the first round; `{}` for nothing."""
        return {}

    def receive(self, variables: Variables, own: PyTree) -> Variables:
        """Hook: combine the received whole model with what the client keeps of its own."""
        return variables

    def keep(self, model: Variables, held: PyTree, received: Variables) -> PyTree:
        """Hook: return what a client keeps until its next round, in the form of `initial_own`.

        Args:
          model: the trained model in the shapes of the whole one, 0 where it holds nothing.
          held: 1 where it holds an element, else 0; broadcasts against `model`.
          received: the whole model after `receive`.
        """
        return {}

    def mask(self, held: PyTree, client: ClientLists) -> PyTree:
        """Hook: return which elements of its model a client sends, of those it holds."""
        return held
