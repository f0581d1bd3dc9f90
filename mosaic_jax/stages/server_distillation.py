"""Server-side data-free distillation, after every round's average, of DENSE, FedFTG and DFRD.

The server trains a conditional generator against the clients' models and its own, and its own model
on the generated images, in turns (methods, section 6). A method defines how it weighs the clients'
predictions and its two losses. The rest is the same for all three: teachers are in eval mode,
optimisers persist, the global model keeps its batch-norm statistics.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mosaic_jax import rng
from mosaic_jax.federation import Federation
from mosaic_jax.models import ConditionalGenerator
from mosaic_jax.stages.cohort import Cohort
from mosaic_jax.stages.generator_ensemble import build_generator
from mosaic_jax.types import Array, PyTree, Variables


class ServerState(struct.PyTreeNode):
    """Carry of the server.

    Attributes:
      average: moving average of the generator's variables, for a method that has one.
      generator: variables of the generator.
      optimizer: its Adam's state.
    """

    average: Variables | None
    generator: Variables
    optimizer: PyTree


class ServerInputs(struct.PyTreeNode):
    """Input of one round: the cohort's models [clients, ...] and class counts, and its key."""

    client_models: Variables
    class_counts: Array
    key: Array
    round_index: Array


class ServerBatch(struct.PyTreeNode):
    """Batch of generated images and the models' predictions.

    Attributes:
      embedding: of the classes, [batch, latent].
      h: the generator's input, [batch, ...].
      images: [batch, h, w, c].
      labels: the classes asked for, int32 [batch].
      student: logits of the global model, [batch, classes].
      tau: each client's share of the cohort's images of the label, [clients, batch].
      teachers: logits of the clients' models, [clients, batch, classes].
      z: latent vectors, [batch, latent].
    """

    embedding: Array
    h: Array
    images: Array
    labels: Array
    student: Array
    tau: Array
    teachers: Array
    z: Array


class ServerDistillation:
    """Base of the methods' servers, a `server.Server`; subclasses set the constants and the losses.

    Attributes:
      generator_steps: in each of `server_distillation.iterations`.
      global_steps: likewise, of the global model.
      combine: how latent vector and label meet, "product" or "concatenation".
      latent: dimension of z.
    """

    generator_steps: int
    global_steps: int
    combine: str
    latent: int

    def __init__(self, federation: Federation):
        self.federation, self.settings = federation, federation.config.server_distillation
        classes, layout = federation.dataset.num_classes, federation.layout
        inputs = self.latent + (classes if self.combine == "concatenation" else 0)
        self.generator = ConditionalGenerator(
            build_generator(federation, inputs), classes, self.combine
        )
        self.classifier = federation.classifier
        self.map = layout.map_clients(self._one_client)
        self.optimizer = optax.adam(self.settings.generator_learning_rate, b1=0.5, b2=0.999)
        self.student = optax.chain(
            optax.add_decayed_weights(self.settings.weight_decay),
            optax.sgd(self.settings.learning_rate),
        )
        self.class_counts = layout.put_replicated(
            federation.clients.class_counts.astype(np.float32)
        )
        self.key = layout.put_replicated(federation.key("server_distillation"))
        self.run = layout.jit(self.one_round, donate_argnums=(0, 1))

    def label_weights(self, class_counts: Array) -> Array:
        """Hook: how often each class is drawn [classes], of the cohort's counts [clients, classes].

        By default in proportion to the cohort's images of the class.
        """
        return class_counts.sum(axis=0)

    def generator_terms(self, batch: ServerBatch) -> tuple[Array, Array, Array | float]:
        """Hook: return the three terms of the generator's loss.

        They are the cross-entropy of the clients' predictions, the disagreement between clients and
        global model (subtracted), and a mode-seeking diversity penalty.
        """
        raise NotImplementedError

    def global_loss(self, batch: ServerBatch) -> Array:
        """Hook: return the global model's loss; only `student` has a gradient."""
        raise NotImplementedError

    def statistics_loss(self, client_models: Variables, images: Array) -> Array | float:
        """Hook: return another term of the generator's loss, by the clients' models."""
        return 0.0

    def after_round(self, carry: ServerState) -> ServerState:
        """Hook: change the carry at the end of a round."""
        return carry

    def generator_loss(self, batch: ServerBatch) -> Array:
        """Return the three terms with their weights."""
        unknown, disagreement, likeness = self.generator_terms(batch)
        loss = unknown - self.settings.adversarial_weight * disagreement
        return loss + self.settings.diversity_weight * likeness

    def divergence(self, of: Array, to: Array) -> Array:
        """Return `divergence` at the method's temperature."""
        return divergence(of, to, self.settings.temperature)

    def start(self, variables: Variables) -> ServerState:
        """Draw the generator and start its optimiser."""
        key = self.federation.key("server_distillation", 1)
        labels = jnp.zeros(2, jnp.int32)
        generator = self.generator.init(key, jnp.zeros((2, self.latent)), labels)
        return ServerState(None, generator, self.optimizer.init(generator["params"]))

    def send(self, carry: ServerState) -> dict[str, PyTree]:
        """Send nothing: the generator stays on the server."""
        return {}

    def __call__(
        self,
        variables: Variables,
        carry: ServerState,
        client_models: Variables,
        cohort: Cohort,
        round_index: Array,
    ) -> tuple[Variables, ServerState, dict[str, Array]]:
        """Distil after one round; see `server.Server`."""
        shared = (self.key, self.class_counts)
        result: tuple[Variables, ServerState, dict[str, Array]] = self.run(
            variables, carry, shared, client_models, cohort.client_ids, round_index
        )
        return result

    def one_round(
        self,
        variables: Variables,
        carry: ServerState,
        shared: tuple[Array, Array],
        client_models: Variables,
        client_ids: Array,
        round_index: Array,
    ) -> tuple[Variables, ServerState, dict[str, Array]]:
        """Make all iterations of one round, generator and global model in turns."""
        stage_key, class_counts = shared
        key = rng.fold(stage_key, round_index)
        inputs = ServerInputs(client_models, class_counts[client_ids], key, round_index)
        iterations = jnp.arange(self.settings.iterations)
        (variables, carry), losses = jax.lax.scan(
            lambda state, index: self._iteration(state, index, inputs),
            (variables, carry),
            iterations,
        )
        return variables, self.after_round(carry), jax.tree.map(jnp.mean, losses)

    def _iteration(
        self, state: tuple[Variables, ServerState], index: Array, inputs: ServerInputs
    ) -> tuple[tuple[Variables, ServerState], dict[str, Array]]:
        """Make the generator's steps, then the global model's."""

        def key(step: Array, part: int) -> Array:
            return rng.fold(inputs.key, index, part, step)

        state, generator_losses = jax.lax.scan(
            lambda s, step: self._generator_step(s, inputs, key(step, 0)),
            state,
            jnp.arange(self.generator_steps),
        )
        state, global_losses = jax.lax.scan(
            lambda s, step: self._global_step(s, inputs, key(step, 1)),
            state,
            jnp.arange(self.global_steps),
        )
        return state, {
            "generator_loss": generator_losses.mean(),
            "distillation_loss": global_losses.mean(),
        }

    def _generator_step(
        self, state: tuple[Variables, ServerState], inputs: ServerInputs, key: Array
    ) -> tuple[tuple[Variables, ServerState], Array]:
        variables, carry = state

        def loss(params: PyTree) -> tuple[Array, PyTree]:
            generator = {**carry.generator, "params": params}
            batch, updated = self.batch(generator, variables, inputs, key)
            value = self.generator_loss(batch)
            return value + self.statistics_loss(inputs.client_models, batch.images), updated

        params = carry.generator["params"]
        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, optimizer = self.optimizer.update(gradient, carry.optimizer)
        generator = {"params": optax.apply_updates(params, updates), "batch_stats": statistics}
        return (variables, carry.replace(generator=generator, optimizer=optimizer)), value

    def _global_step(
        self, state: tuple[Variables, ServerState], inputs: ServerInputs, key: Array
    ) -> tuple[tuple[Variables, ServerState], Array]:
        variables, carry = state

        def loss(params: PyTree) -> Array:
            return self.student_objective(carry, {**variables, "params": params}, inputs, key)

        value, gradient = jax.value_and_grad(loss)(variables["params"])
        optimizer = self.student.init(variables["params"])
        updates, _ = self.student.update(gradient, optimizer, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, "params": params}, carry), value

    def student_objective(
        self, carry: ServerState, student: Variables, inputs: ServerInputs, key: Array
    ) -> Array:
        """Return the global model's loss on a fresh batch of the generator."""
        batch, _ = self.batch(carry.generator, student, inputs, key)
        return self.global_loss(batch)

    def batch(
        self, generator: Variables, student: Variables, inputs: ServerInputs, key: Array
    ) -> tuple[ServerBatch, PyTree]:
        """Generate images, predict on them, and return the generator's new batch statistics too."""
        size, counts = self.settings.batch_size, inputs.class_counts
        z = jax.random.normal(rng.fold(key, 0), (size, self.latent))
        weights = self.label_weights(counts)
        labels = jax.random.categorical(rng.fold(key, 1), jnp.log(weights + 1e-12), shape=(size,))
        generated: Any = self.generator.apply(generator, z, labels, True, mutable=["batch_stats"])
        (images, h, embedding), updated = generated
        held = counts.sum(axis=0)
        tau = jnp.where(held > 0, counts / jnp.maximum(held, 1.0), 1 / len(counts))
        return ServerBatch(
            embedding=embedding,
            h=h,
            images=images,
            labels=labels,
            student=self.classifier.apply_eval(student, images).logits,
            tau=tau[:, labels],
            teachers=self.map(images, inputs.client_models),
            z=z,
        ), updated["batch_stats"]

    def _one_client(self, images: Array, client_model: Variables) -> Array:
        return self.classifier.apply_eval(client_model, images).logits


def divergence(of: Array, to: Array, temperature: float) -> Array:
    """Return KL(softmax(of / T) || softmax(to / T)) over the last axis; `of` has no gradient."""
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(of) / temperature)
    log_q = jax.nn.log_softmax(to / temperature)
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def mode_seeking(inputs: Array, images: Array) -> Array:
    """Return Div = exp(-mean_jk msd(u_j, u_k) msd(x_j, x_k)); low if inputs change the images."""
    flat = images.reshape(len(images), -1)
    return jnp.exp(-(_mean_squares(inputs) * _mean_squares(flat)).mean())


def _mean_squares(rows: Array) -> Array:
    """Return the mean squared difference of every pair of rows [n, d], [n, n]."""
    squares = jnp.square(rows).mean(axis=1)
    return jnp.maximum(squares[:, None] + squares - 2 * rows @ rows.T / rows.shape[1], 0.0)


def mean_where(values: Array, mask: Array) -> Array:
    """Average the values where the mask is set; 0 if it is nowhere."""
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(mask.sum(), 1)
