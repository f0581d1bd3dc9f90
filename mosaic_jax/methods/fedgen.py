"""FedGen (Zhu et al. 2021): a generator of features, trained on the clients' heads, guides clients.

The server trains it so that the heads of a class's holders know its features; clients get it with
the model and learn to agree with it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mosaic_jax import rng
from mosaic_jax.data.batches import ClientLists
from mosaic_jax.federation import Federation
from mosaic_jax.models import LatentGenerator, head_logits, submodel
from mosaic_jax.stages import rounds
from mosaic_jax.stages.cohort import Cohort
from mosaic_jax.stages.local_update import Batch, ClientUpdate, RoundInputs
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import Array, Outputs, PyTree, Variables

SECTIONS = {"fedgen"}

NOISE = 32
HIDDEN = 256
STEPS = 50
"""Steps of Adam on the generator after every round; the learning rate falls by DECAY a round."""

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 1e-2
DECAY = 0.98
SMALLEST_WEIGHT = 1e-4


class GuidedUpdate(ClientUpdate):
    """Cross-entropy + a_t (CE of generated features + KL(head(G(y)) || f(x))) from round 1 on."""

    def regularizer(
        self,
        params: PyTree,
        outputs: Outputs,
        batch: Batch,
        inputs: RoundInputs,
        client: ClientLists,
    ) -> Array:
        """Return the generator's two terms, weighted by a_t, see `weight_of`."""
        classes, size = outputs.logits.shape[-1], len(batch.labels)
        drawn = jax.random.randint(rng.fold(batch.key, 0), (size,), 0, classes)

        def by_head(labels: Array, part: int) -> Array:
            generator = inputs.from_server["generator"]
            features = _features(generator, labels, rng.fold(batch.key, part))
            if inputs.channels:
                group = submodel.channel_groups_of(self.federation.classifier.module)["head"][0]
                assert group is not None
                features = features[:, inputs.channels[group]]
            return head_logits(params, features)

        own = optax.softmax_cross_entropy_with_integer_labels(by_head(drawn, 1), drawn).mean()
        guide = jax.nn.log_softmax(jax.lax.stop_gradient(by_head(batch.labels, 2)))
        seen = jax.nn.log_softmax(outputs.logits)
        apart = optax.losses.kl_divergence_with_log_targets(seen, guide)
        apart = (apart * batch.mask).sum() / batch.mask.sum()
        weight = weight_of(self.federation.config.fedgen.weight, inputs.round_index)
        return weight * (own + apart)


def weight_of(first: float, round_index: int | Array) -> Array:
    """Return a_t = max(1e-4, first 0.98^t) of round t; 0 in the first round, and if `first` is 0.

    Args:
      first: the setting `fedgen.weight`; one below 1e-4 does not grow to it.
      round_index: t, from 0; before round 1 the generator has learned nothing.
    """
    weight = jnp.maximum(first * DECAY**round_index, min(first, SMALLEST_WEIGHT))
    return jnp.where(jnp.asarray(round_index) > 0, weight, 0.0)


class FeatureServerState(struct.PyTreeNode):
    """Carry of the server: the generator's variables and its Adam's state."""

    generator: Variables
    optimizer: PyTree


class FeatureGenerator:
    """The server's generator of features, a `server.Server`."""

    def __init__(self, federation: Federation):
        self.federation, layout = federation, federation.layout
        full = federation.classifier.abstract_variables()
        width, classes = full["params"]["head"]["kernel"].shape
        self.generator = LatentGenerator(width, classes, HIDDEN)
        counts = federation.clients.class_counts.astype(np.float32)
        self.shared = layout.put_replicated((federation.key("fedgen"), counts))
        self.train = layout.jit(self.one_round, donate_argnums=0)

    def optimizer(self, learning_rate: Array | float) -> optax.GradientTransformation:
        """Return Adam with L2."""
        return optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.adam(learning_rate))

    def start(self, variables: Variables) -> FeatureServerState:
        """Draw the generator and start its optimiser."""
        key, labels = self.federation.key("fedgen", 1), jnp.zeros(2, jnp.int32)
        generator = self.generator.init(key, jnp.zeros((2, NOISE)), labels)
        return FeatureServerState(generator, self.optimizer(0.0).init(generator["params"]))

    def send(self, carry: FeatureServerState) -> dict[str, PyTree]:
        """Send the generator with the model."""
        return {"generator": carry.generator}

    def __call__(
        self,
        variables: Variables,
        carry: FeatureServerState,
        client_models: Variables,
        cohort: Cohort,
        round_index: Array,
    ) -> tuple[Variables, FeatureServerState, dict[str, Array]]:
        """Train the generator; the global model stays the average. See `server.Server`."""
        heads = client_models["params"]["head"]
        carry, loss = self.train(carry, self.shared, heads, cohort.client_ids, round_index)
        return variables, carry, {"generator_loss": loss}

    def one_round(
        self,
        carry: FeatureServerState,
        shared: tuple[Array, Array],
        heads: PyTree,
        client_ids: Array,
        round_index: Array,
    ) -> tuple[FeatureServerState, Array]:
        """Make all steps of one round on the heads [clients, ...]; return the mean loss."""
        stage_key, class_counts = shared
        counts = class_counts[client_ids]
        optimizer = self.optimizer(LEARNING_RATE * DECAY**round_index)

        def step(carry: FeatureServerState, step: Array) -> tuple[FeatureServerState, Array]:
            generator, key = carry.generator, rng.fold(stage_key, round_index, step)
            (value, statistics), gradient = jax.value_and_grad(self.loss, has_aux=True)(
                generator["params"], generator["batch_stats"], heads, counts, key
            )
            updates, state = optimizer.update(gradient, carry.optimizer, generator["params"])
            params = optax.apply_updates(generator["params"], updates)
            generator = {"params": params, "batch_stats": statistics}
            return FeatureServerState(generator, state), value

        carry, losses = jax.lax.scan(step, carry, jnp.arange(STEPS))
        return carry, losses.mean()

    def loss(
        self, params: PyTree, statistics: PyTree, heads: PyTree, counts: Array, key: Array
    ) -> tuple[Array, PyTree]:
        """Return sum_i tau_iy CE of the heads plus diversity; beside it, the batch statistics.

        Args:
          params: of the generator.
          statistics: its batch statistics.
          heads: of the cohort's models, [clients, ...].
          counts: the cohort's images of each class, [clients, classes].
          key: of the step.
        """
        held = counts.sum(axis=0)
        tau = counts / jnp.maximum(held, 1.0)
        size = self.federation.config.local_update.batch_size
        labels = jax.random.categorical(rng.fold(key, 0), jnp.log(held + 1e-12), shape=(size,))
        noise = jax.random.uniform(rng.fold(key, 1), (size, NOISE))
        variables = {"params": params, "batch_stats": statistics}
        generated: Any = self.generator.apply(
            variables, noise, labels, True, mutable=["batch_stats"]
        )
        features, updated = generated
        logits = jax.vmap(lambda head: head_logits({"head": head}, features))(heads)
        known = jax.vmap(optax.softmax_cross_entropy_with_integer_labels, in_axes=(0, None))(
            logits, labels
        )
        value = (tau[:, labels] * known).sum(axis=0).mean()
        return value + diversity_penalty(noise, features), updated["batch_stats"]


def _features(variables: Variables, labels: Array, key: Array) -> Array:
    """Generate features [batch, features] of labels [batch] with the received generator.

    It is in eval mode: a batch of one class has that class in its mean, which batch norm would take
    out, and with it all that the features say of their class.
    """
    width = variables["params"]["features"]["bias"].shape[0]
    classes = variables["params"]["hidden"]["kernel"].shape[0] - NOISE
    noise = jax.random.uniform(key, (len(labels), NOISE))
    generated: Any = LatentGenerator(width, classes, HIDDEN).apply(variables, noise, labels)
    return jax.lax.stop_gradient(generated)


def diversity_penalty(noise: Array, features: Array) -> Array:
    """Return exp(-mean_jk msd(noise_j, noise_k) |features_j - features_k|).

    It is low where noise changes the features.
    """
    apart = jnp.square(noise[:, None] - noise[None]).mean(axis=-1)
    distance = jnp.abs(features[:, None] - features[None]).mean(axis=-1)
    return jnp.exp(-(apart * distance).mean())


def stages(federation: Federation) -> list[Stage]:
    """Return the method's one stage."""
    update = GuidedUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update, server=FeatureGenerator(federation))]
