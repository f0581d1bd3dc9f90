"""FedGen (Zhu et al. 2021): a generator of features, trained on the clients' heads, guides clients.

The server trains it so that the heads of a class's holders know its features; clients get it with
the model and learn to agree with it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax import rng
from mosaic_jax.models import LatentGenerator, head_logits, submodel
from mosaic_jax.stages import rounds
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.local_update import Batch, ClientUpdate
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import Array, Outputs, PyTree, Variables

NOISE = 32
HIDDEN = 256
STEPS = 50
"""Of the generator after every round, by Adam, its learning rate falling by DECAY a round."""

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 1e-2
DECAY = 0.98
SMALLEST_WEIGHT = 1e-4


class GuidedUpdate(ClientUpdate):
    """Cross-entropy + a_t (CE of generated features + KL(head(G(y)) || f(x))) from round 1 on."""

    def own_term(
        self, params: PyTree, outputs: Outputs, batch: Batch, shared: PyTree, client: PyTree
    ) -> Array:
        """The generator's two terms, with a_t = max(1e-4, weight 0.98^t)."""
        classes, size = outputs.logits.shape[-1], len(batch.labels)
        drawn = jax.random.randint(rng.fold(batch.key, 0), (size,), 0, classes)

        def by_head(labels: Array, part: int) -> Array:
            features = _features(shared["generator"], labels, rng.fold(batch.key, part))
            if shared["sets"]:
                stream = submodel.streams_of(self.federation.model)["head"][0]
                features = features[:, shared["sets"][stream]]
            return head_logits(params, features)

        own = optax.softmax_cross_entropy_with_integer_labels(by_head(drawn, 1), drawn).mean()
        guide = jax.nn.log_softmax(jax.lax.stop_gradient(by_head(batch.labels, 2)))
        seen = jax.nn.log_softmax(outputs.logits)
        apart = optax.losses.kl_divergence_with_log_targets(seen, guide)
        apart = (apart * batch.mask).sum() / batch.mask.sum()
        weight = self.federation.config.fedgen.weight * DECAY ** shared["round"]
        weight = jnp.where(shared["round"] > 0, jnp.maximum(weight, SMALLEST_WEIGHT), 0.0)
        return weight * (own + apart)


class FeatureGenerator:
    """The server's side, a `rounds.Server`."""

    def __init__(self, federation: Federation):
        self.federation = federation
        full = federation.shapes(federation.model)
        width, classes = full["params"]["head"]["kernel"].shape
        self.generator = LatentGenerator(width, classes, HIDDEN)
        self.optimizer = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.scale_by_adam())
        self.counts = federation.counts.astype(np.float32)
        self.key = federation.place(federation.key("fedgen"))
        self.train = federation.jit(self.one_round, donate_argnums=0)

    def start(self, variables: Variables) -> PyTree:
        """The generator and Adam's moments."""
        key, labels = self.federation.key("fedgen", 1), jnp.zeros(2, jnp.int32)
        generator = self.generator.init(key, jnp.zeros((2, NOISE)), labels)
        return {"generator": generator, "optimizer": self.optimizer.init(generator["params"])}

    def send(self, carry: PyTree) -> dict[str, PyTree]:
        """The generator goes down with the model."""
        return {"generator": carry["generator"]}

    def __call__(
        self, variables: Variables, carry: PyTree, clients: Variables, cohort: PyTree, round: Array
    ) -> tuple[Variables, PyTree, PyTree]:
        """See `rounds.Server`; the global model stays the average."""
        shared = {"key": self.key, "counts": self.federation.place(self.counts)}
        carry, loss = self.train(carry, shared, clients["params"]["head"], cohort["clients"], round)
        return variables, carry, {"generator_loss": loss}

    def one_round(
        self, carry: PyTree, shared: PyTree, heads: PyTree, ids: Array, round: Array
    ) -> tuple[PyTree, Array]:
        """All steps of one round on the heads [clients, ...]."""
        counts = shared["counts"][ids]
        held = counts.sum(axis=0)
        tau = counts / jnp.maximum(held, 1.0)
        rate, size = LEARNING_RATE * DECAY**round, self.federation.config.local_update.batch_size

        def loss(params: PyTree, statistics: PyTree, key: Array) -> tuple[Array, PyTree]:
            labels = jax.random.categorical(rng.fold(key, 0), jnp.log(held + 1e-12), shape=(size,))
            noise = jax.random.uniform(rng.fold(key, 1), (size, NOISE))
            variables = {"params": params, "batch_stats": statistics}
            drawn: Any = self.generator.apply(
                variables, noise, labels, True, mutable=["batch_stats"]
            )
            features, updated = drawn
            logits = jax.vmap(lambda head: head_logits({"head": head}, features))(heads)
            known = jax.vmap(optax.softmax_cross_entropy_with_integer_labels, in_axes=(0, None))(
                logits, labels
            )
            value = (tau[:, labels] * known).sum(axis=0).mean()
            return value + spread_loss(noise, features), updated["batch_stats"]

        def step(carry: PyTree, number: Array) -> tuple[PyTree, Array]:
            generator, key = carry["generator"], rng.fold(shared["key"], round, number)
            (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(
                generator["params"], generator["batch_stats"], key
            )
            updates, optimizer = self.optimizer.update(
                gradient, carry["optimizer"], generator["params"]
            )
            updates = jax.tree.map(lambda update: -rate * update, updates)
            params = optax.apply_updates(generator["params"], updates)
            return {
                "generator": {"params": params, "batch_stats": statistics},
                "optimizer": optimizer,
            }, value

        carry, losses = jax.lax.scan(step, carry, jnp.arange(STEPS))
        return carry, losses.mean()


def _features(variables: Variables, labels: Array, key: Array) -> Array:
    """What the sent generator draws for these labels [batch]: features [batch, features].

    In eval mode: a batch of one class has that class in its mean, which batch norm would take out,
    and with it all that the features say of their class.
    """
    width = variables["params"]["features"]["bias"].shape[0]
    classes = variables["params"]["hidden"]["kernel"].shape[0] - NOISE
    noise = jax.random.uniform(key, (len(labels), NOISE))
    drawn: Any = LatentGenerator(width, classes, HIDDEN).apply(variables, noise, labels)
    return jax.lax.stop_gradient(drawn)


def spread_loss(noise: Array, features: Array) -> Array:
    """exp(-mean_jk msd(noise_j, noise_k) |features_j - features_k|): low where noise matters."""
    apart = jnp.square(noise[:, None] - noise[None]).mean(axis=-1)
    distance = jnp.abs(features[:, None] - features[None]).mean(axis=-1)
    return jnp.exp(-(apart * distance).mean())


def stages(federation: Federation) -> list[Stage]:
    """The whole method is one stage."""
    update = GuidedUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update, server=FeatureGenerator(federation))]
