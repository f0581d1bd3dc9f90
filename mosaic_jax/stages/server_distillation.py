"""Server-side data-free distillation: what DENSE, FedFTG and DFRD do after every round's average.

The server trains a conditional generator against the clients' models and its own, and its own on
the generated images, in turns (methods, section 6). A method says how it weighs the clients'
answers and what its two losses are; all else, this included, is the same for all three: the
teachers are in eval mode, optimisers persist, the global model keeps its batch-norm statistics.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax import rng
from mosaic_jax.models import ConditionalGenerator
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.generator_ensemble import build
from mosaic_jax.types import Array, PyTree, Variables


class ServerDistillation:
    """A `rounds.Server`; subclasses set the constants and the losses.

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
        classes = federation.dataset.num_classes
        given = self.latent + (classes if self.combine == "concatenation" else 0)
        self.generator = ConditionalGenerator(build(federation, given), classes, self.combine)
        self.map = federation.map(self._one_client)
        self.optimizer = optax.adam(self.settings.generator_learning_rate, b1=0.5, b2=0.999)
        self.student = optax.chain(
            optax.add_decayed_weights(self.settings.weight_decay),
            optax.sgd(self.settings.learning_rate),
        )
        self.counts = federation.counts.astype(np.float32)
        self.key = federation.place(federation.key("server_distillation"))
        self.run = federation.jit(self.one_round, donate_argnums=(0, 1))

    # What a method says ------------------------------------------------------------------------

    def label_weights(self, counts: Array) -> Array:
        """How often each class is drawn [classes], from the cohort's counts [clients, classes]."""
        return counts.sum(axis=0)

    def generator_terms(self, batch: PyTree) -> tuple[Array, Array, Array | float]:
        """What the generator makes small: what its images lack of being known to the clients,
        minus how far clients and global model disagree, plus how alike the images are.

        Of a batch: "z", "labels", "h" (what drew the images), "embedding" of the classes,
        "images", "teachers" [clients, batch, classes], "student" [batch, classes] and "tau"
        [clients, batch], each client's share of the cohort's images of the label."""
        raise NotImplementedError

    def global_loss(self, batch: PyTree) -> Array:
        """Of the same, without gradient through anything but "student"."""
        raise NotImplementedError

    def statistics_loss(self, clients: Variables, images: Array) -> Array | float:
        """More of the generator's loss, by the models of the clients [clients, ...]."""
        return 0.0

    def after_round(self, carry: PyTree) -> PyTree:
        """What is carried into the next round."""
        return carry

    # What is the same for all ------------------------------------------------------------------

    def generator_loss(self, batch: PyTree) -> Array:
        """The three terms with their weights."""
        unknown, disagreement, likeness = self.generator_terms(batch)
        settings = self.settings
        return (
            unknown
            - settings.adversarial_weight * disagreement
            + settings.diversity_weight * likeness
        )

    def divergence(self, of: Array, to: Array) -> Array:
        """`divergence` at the method's temperature."""
        return divergence(of, to, self.settings.temperature)

    def start(self, variables: Variables) -> PyTree:
        """Generator and its optimiser."""
        key = self.federation.key("server_distillation", 1)
        labels = jnp.zeros(2, jnp.int32)
        generator = self.generator.init(key, jnp.zeros((2, self.latent)), labels)
        return {"generator": generator, "optimizer": self.optimizer.init(generator["params"])}

    def send(self, carry: PyTree) -> dict[str, PyTree]:
        """Nothing: the generator stays on the server."""
        return {}

    def __call__(
        self, variables: Variables, carry: PyTree, clients: Variables, cohort: PyTree, round: Array
    ) -> tuple[Variables, PyTree, PyTree]:
        """See `rounds.Server`."""
        shared = {"key": self.key, "counts": self.federation.place(self.counts)}
        return self.run(variables, carry, shared, clients, cohort["clients"], round)

    def one_round(
        self,
        variables: Variables,
        carry: PyTree,
        shared: PyTree,
        clients: Variables,
        ids: Array,
        round: Array,
    ) -> tuple[Variables, PyTree, PyTree]:
        """All iterations of one round, generator and global model in turns."""
        inputs = {"clients": clients, "counts": shared["counts"][ids]}
        key = rng.fold(shared["key"], round)

        def iteration(state: PyTree, number: Array) -> tuple[PyTree, PyTree]:
            def draw(step: Array, part: int) -> Array:
                return rng.fold(key, number, part, step)

            state, generator_losses = jax.lax.scan(
                lambda s, step: self._generator_step(s, inputs, draw(step, 0)),
                state,
                jnp.arange(self.generator_steps),
            )
            state, global_losses = jax.lax.scan(
                lambda s, step: self._global_step(s, inputs, draw(step, 1), round),
                state,
                jnp.arange(self.global_steps),
            )
            return state, {
                "generator_loss": generator_losses.mean(),
                "distillation_loss": global_losses.mean(),
            }

        state, losses = jax.lax.scan(
            iteration, (variables, carry), jnp.arange(self.settings.iterations)
        )
        variables, carry = state
        return variables, self.after_round(carry), jax.tree.map(jnp.mean, losses)

    def _generator_step(self, state: PyTree, inputs: PyTree, key: Array) -> tuple[PyTree, Array]:
        variables, carry = state

        def loss(params: PyTree) -> tuple[Array, PyTree]:
            generator = {**carry["generator"], "params": params}
            batch, updated = self.batch(generator, variables, inputs, key)
            value = self.generator_loss(batch)
            return value + self.statistics_loss(inputs["clients"], batch["images"]), updated

        params = carry["generator"]["params"]
        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, optimizer = self.optimizer.update(gradient, carry["optimizer"])
        generator = {"params": optax.apply_updates(params, updates), "batch_stats": statistics}
        return (variables, carry | {"generator": generator, "optimizer": optimizer}), value

    def _global_step(
        self, state: PyTree, inputs: PyTree, key: Array, round: Array
    ) -> tuple[PyTree, Array]:
        variables, carry = state

        def loss(params: PyTree) -> Array:
            student = {**variables, "params": params}
            return self.student_objective(carry, student, inputs, key, round)

        value, gradient = jax.value_and_grad(loss)(variables["params"])
        optimizer = self.student.init(variables["params"])
        updates, _ = self.student.update(gradient, optimizer, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, "params": params}, carry), value

    def student_objective(
        self, carry: PyTree, student: Variables, inputs: PyTree, key: Array, round: Array
    ) -> Array:
        """The global model's loss on a fresh batch of the generator."""
        batch, _ = self.batch(carry["generator"], student, inputs, key)
        return self.global_loss(batch)

    def batch(
        self, generator: Variables, student: Variables, inputs: PyTree, key: Array
    ) -> tuple[PyTree, PyTree]:
        """Generated images and what everybody says of them; the generator's new statistics."""
        size, counts = self.settings.batch_size, inputs["counts"]
        z = jax.random.normal(rng.fold(key, 0), (size, self.latent))
        weights = self.label_weights(counts)
        labels = jax.random.categorical(rng.fold(key, 1), jnp.log(weights + 1e-12), shape=(size,))
        drawn: Any = self.generator.apply(generator, z, labels, True, mutable=["batch_stats"])
        (images, h, embedding), updated = drawn
        held = counts.sum(axis=0)
        tau = jnp.where(held > 0, counts / jnp.maximum(held, 1.0), 1 / len(counts))
        return {
            "z": z,
            "labels": labels,
            "h": h,
            "embedding": embedding,
            "images": images,
            "teachers": self.map(images, inputs["clients"]),
            "student": self.federation.outputs(student, images).logits,
            "tau": tau[:, labels],
        }, updated["batch_stats"]

    def _one_client(self, images: Array, client: Variables) -> Array:
        return self.federation.outputs(client, images).logits


def divergence(of: Array, to: Array, temperature: float) -> Array:
    """KL(softmax(of / T) || softmax(to / T)) over the last axis, without gradient through `of`."""
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(of) / temperature)
    log_q = jax.nn.log_softmax(to / temperature)
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def mode_seeking(inputs: Array, images: Array) -> Array:
    """Div = exp(-mean_jk msd(u_j, u_k) msd(x_j, x_k)): low where other inputs give other images."""
    flat = images.reshape(len(images), -1)
    return jnp.exp(-(_mean_squares(inputs) * _mean_squares(flat)).mean())


def _mean_squares(rows: Array) -> Array:
    """Mean squared difference of every pair of rows [n, d]: [n, n]."""
    squares = jnp.square(rows).mean(axis=1)
    return jnp.maximum(squares[:, None] + squares - 2 * rows @ rows.T / rows.shape[1], 0.0)


def mean_where(values: Array, chosen: Array) -> Array:
    """Mean of the chosen values; 0 where none is."""
    return jnp.where(chosen, values, 0.0).sum() / jnp.maximum(chosen.sum(), 1)
