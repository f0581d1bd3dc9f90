"""Training of ONE client's generator (paper, Figure 1b); `generator_optimization.py` maps it.

L_G = L_adv + w_e L_entropy + w_d L_diversity + w_c L_class + [n_i < tau] w_i L_inversion, all but
the first on the frozen, eval-mode copy f0 of the client's model. L_class, which is not in the
paper, is the cross-entropy of f0 on the class that a conditional generator was asked for.
"""

import jax
import jax.numpy as jnp
import optax

from mosaic_jax import rng, trees
from mosaic_jax.data.augmentation import crop_and_flip
from mosaic_jax.data.batches import to_float, uniform_batch
from mosaic_jax.federation import Federation
from mosaic_jax.stages.adversary import Adversary
from mosaic_jax.stages.generator_ensemble import (
    build_generator,
    draw_labels,
    draw_latent,
    latent_size,
)
from mosaic_jax.stages.generator_judgement import (
    FAR,
    JUDGED,
    relative_distance,
    unless_diverged,
)
from mosaic_jax.stages.generator_losses import FrozenLosses, FrozenView
from mosaic_jax.stages.generator_state import (
    Batch,
    GeneratorClient,
    GeneratorInputs,
    GeneratorState,
)
from mosaic_jax.types import Array, PyTree, Variables

BN_BATCHES = 40
"""Number of batches used to recompute batch statistics of the EMA weights; after 40, old statistics
have weight 0.9**40 = 1.5%."""


class ClientGenerator:
    """Training of ONE client's generator against its adversary and its frozen model f0.

    Raises:
      UserError: the inversion loss of a model without batch norm.
    """

    def __init__(self, federation: Federation):
        self.federation = federation
        self.settings = federation.config.generator_optimization
        self.generator = build_generator(federation)
        self.adversary = Adversary(federation)
        self.losses = FrozenLosses(federation)
        self.ema = optax.ema(self.settings.ema, debias=False)
        self.decay = optax.cosine_decay_schedule(1.0, self.settings.steps)

    def optimizer(self, learning_rate: Array | float) -> optax.GradientTransformation:
        """Return Adam with the stage's betas."""
        return optax.adam(learning_rate, self.settings.beta1, self.settings.beta2)

    def start(self, inputs: GeneratorInputs, client: GeneratorClient) -> GeneratorState:
        """Draw the networks and start the optimisers."""
        key = rng.fold(inputs.key, client.lists.id)
        latent = jnp.zeros((2, latent_size(self.federation)))
        generator = self.generator.init(rng.fold(key, 1), latent)
        adversary = self.adversary.init(rng.fold(key, 2), client.frozen)
        return GeneratorState(
            adversary=adversary,
            adversary_optimizer=self.optimizer(0.0).init(adversary["params"]),
            average=self.ema.init(generator["params"]),
            distance=jnp.float32(FAR),
            frozen=None,
            generator=generator,
            generator_optimizer=self.optimizer(0.0).init(generator["params"]),
            ema_batch_stats=generator["batch_stats"],
        )

    def upload(self, carry: GeneratorState) -> Variables:
        """Return the uplink of the stage: the EMA weights, with batch statistics of their own."""
        return {"params": self.averaged(carry), "batch_stats": carry.ema_batch_stats}

    def averaged(self, carry: GeneratorState) -> PyTree:
        """Return the debiased average of the weights."""
        average = carry.average
        count = jnp.maximum(average.count, 1)  # 0 where every block was taken back
        return optax.tree.bias_correction(average.ema, self.settings.ema, count)

    def recompute_batch_stats(
        self, carry: GeneratorState, key: Array, client: GeneratorClient
    ) -> PyTree:
        """Compute batch statistics of the EMA weights on generated batches.

        The running statistics belong to the last weights, not to their average: with them a
        generator of two classes draws nearly one.
        """
        params, settings = self.averaged(carry), self.settings

        def one_batch(step: Array, statistics: PyTree) -> PyTree:
            each = rng.fold(key, step)
            labels = draw_labels(each, client.lists.class_counts, settings.batch_size)
            z = draw_latent(self.federation, each, labels)
            variables = {"params": params, "batch_stats": statistics}
            _, updated = self.generator.apply(variables, z, train=True, mutable=["batch_stats"])
            return updated["batch_stats"]

        return jax.lax.fori_loop(0, BN_BATCHES, one_batch, carry.generator["batch_stats"])

    def block(
        self, inputs: GeneratorInputs, pair: tuple[GeneratorClient, GeneratorState]
    ) -> tuple[GeneratorState, dict[str, Array]]:
        """Make `block_steps` steps; return mean diagnostics, and the images' `distance`.

        The last block of the stage recomputes the batch statistics. Steps that end in NaN are taken
        back; "taken_back" is then 1 and the other diagnostics are 0.
        """
        client, before = pair
        steps = inputs.first_step + jnp.arange(self.settings.block_steps)
        after, every = jax.lax.scan(
            lambda carry, step: self.step(inputs, client, carry, step), before, steps
        )
        carry, diagnostics = unless_diverged(before, after, jax.tree.map(jnp.mean, every))
        key = rng.fold(inputs.key, client.lists.id, steps[-1], 6)
        is_last = steps[-1] + 1 == self.settings.steps
        statistics = jax.lax.cond(
            is_last,
            lambda: self.recompute_batch_stats(carry, key, client),
            lambda: carry.ema_batch_stats,
        )
        distance = self.distance(inputs, client, carry, key)
        carry = carry.replace(distance=distance, ema_batch_stats=statistics)
        return carry, diagnostics | {"distance": distance}

    def distance(
        self, inputs: GeneratorInputs, client: GeneratorClient, carry: GeneratorState, key: Array
    ) -> Array:
        """Return the distance of the EMA weights' images from the client's own, as f0 sees them."""
        lists = client.lists
        z = draw_latent(self.federation, key, draw_labels(key, lists.class_counts, JUDGED))
        variables = {"params": self.averaged(carry), "batch_stats": carry.ema_batch_stats}
        fake, _ = self.generator.apply(variables, z, train=True, mutable=["batch_stats"])
        positions = uniform_batch(lists.index, lists.size, key=rng.fold(key, 2), batch_size=JUDGED)
        fake_features, real_features = (
            self.federation.classifier.apply_eval(client.frozen, images).features
            for images in (fake, to_float(inputs.data.gather(positions)))
        )
        return relative_distance(fake_features, real_features)

    def step(
        self, inputs: GeneratorInputs, client: GeneratorClient, carry: GeneratorState, step: Array
    ) -> tuple[GeneratorState, dict[str, Array]]:
        """Make one adversary step and one generator step on the same generated batch.

        Both learning rates fall to 0 along a cosine over the stage's steps.
        """
        key = rng.fold(inputs.key, client.lists.id, step)
        positions = uniform_batch(
            client.lists.index,
            client.lists.size,
            key=rng.fold(key, 4),
            batch_size=self.settings.batch_size,
        )
        real, labels = to_float(inputs.data.gather(positions)), inputs.data.labels[positions]
        # A conditional generator draws the classes of the real images.
        z = draw_latent(self.federation, rng.fold(key, 3), labels)

        def generate(params: PyTree) -> tuple[Array, PyTree]:
            variables = {**carry.generator, "params": params}
            return self.generator.apply(variables, z, train=True, mutable=["batch_stats"])

        fake, vjp, updated = jax.vjp(generate, carry.generator["params"], has_aux=True)
        # The generator is the same for all losses: their gradients meet at its images.
        carry, gradient, diagnostics = self._feedback(
            inputs, client, carry, Batch(fake, rng.fold(key, 5), labels, real), step
        )
        rate = inputs.learning_rate * self.decay(step)
        updates, optimizer = self.optimizer(rate).update(
            vjp(gradient)[0], carry.generator_optimizer
        )
        params = optax.apply_updates(carry.generator["params"], updates)
        _, average = self.ema.update(params, carry.average)
        carry = carry.replace(
            generator={"params": params, "batch_stats": updated["batch_stats"]},
            generator_optimizer=optimizer,
            average=average,
        )
        return carry, diagnostics | {"spread": fake.std(axis=0).mean()}

    def _feedback(
        self,
        inputs: GeneratorInputs,
        client: GeneratorClient,
        carry: GeneratorState,
        batch: Batch,
        step: Array,
    ) -> tuple[GeneratorState, Array, dict[str, Array]]:
        """Make one step of the adversary; return the gradient of L_G by the generated images."""
        frozen, labels, weights = client.frozen, batch.labels, inputs.loss_weights
        real = self.augment(batch.real, batch.key)
        fake, augment_vjp = jax.vjp(lambda images: self.augment(images, batch.key), batch.fake)
        if self.adversary.is_projected:
            seen, view_vjp = jax.vjp(lambda images: self.losses.view(frozen, images), fake)
            carry, scores = self._adversary_step(
                inputs, carry, (self.losses.view(frozen, real).maps, seen.maps), labels, step
            )

            def loss(seen: FrozenView) -> tuple[Array, dict[str, Array]]:
                of_classes, diagnostics = self.losses.total(seen, client, weights, labels)
                return self.adversarial_loss(seen.maps, carry, labels) + of_classes, diagnostics

            (value, diagnostics), gradient = jax.value_and_grad(loss, has_aux=True)(seen)
            (gradient,) = augment_vjp(*view_vjp(gradient))
            return carry, gradient, scores | {"generator_loss": value} | diagnostics
        carry, scores = self._adversary_step(inputs, carry, (real, fake), labels, step)
        value, gradient = jax.value_and_grad(self.adversarial_loss)(fake, carry, labels)
        of_classes, more, diagnostics = self._lazy_frozen_loss(inputs, client, batch, step)
        (gradient,) = augment_vjp(gradient)
        scores["generator_loss"] = value + of_classes
        return carry, gradient + more, scores | diagnostics

    def _adversary_step(
        self,
        inputs: GeneratorInputs,
        carry: GeneratorState,
        seen: tuple[PyTree, PyTree],
        labels: Array,
        step: Array,
    ) -> tuple[GeneratorState, dict[str, Array]]:
        """Make one step of the adversary on what it sees of both batches; return its scores."""
        params, statistics = carry.adversary["params"], carry.adversary.get("batch_stats", {})
        (loss, diagnostics), gradient = jax.value_and_grad(self.adversary.loss, has_aux=True)(
            params, statistics, *seen, labels
        )
        rate = inputs.adversary_learning_rate * self.decay(step)
        updates, optimizer = self.optimizer(rate).update(gradient, carry.adversary_optimizer)
        adversary = {**carry.adversary, "params": optax.apply_updates(params, updates)}
        carry = carry.replace(adversary=adversary, adversary_optimizer=optimizer)
        return carry, diagnostics | {"adversary_loss": loss}

    def adversarial_loss(self, seen: PyTree, carry: GeneratorState, labels: Array) -> Array:
        """Return L_adv of what the adversary sees of images: the mean of -log sigmoid A(x)."""
        adversary = carry.adversary
        verdict, _ = self.adversary.logits(
            adversary["params"], adversary.get("batch_stats", {}), seen, labels
        )
        return jax.nn.softplus(-verdict).mean()

    def _lazy_frozen_loss(
        self, inputs: GeneratorInputs, client: GeneratorClient, batch: Batch, step: Array
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Compute the losses on f0 and their gradient in every `frozen_every`-th step, times that.

        A step through f0 costs nearly as much as the rest of a step. (Karras et al. 2020, lazy
        regularisation.)
        """
        every, weights = self.settings.frozen_every, inputs.loss_weights

        def active() -> tuple[Array, Array, dict[str, Array]]:
            def loss(images: Array) -> tuple[Array, dict[str, Array]]:
                seen = self.losses.view(client.frozen, images)
                return self.losses.total(seen, client, weights, batch.labels)

            (value, diagnostics), gradient = jax.value_and_grad(loss, has_aux=True)(batch.fake)
            return every * value, every * gradient, jax.tree.map(lambda of: every * of, diagnostics)

        def passive() -> tuple[Array, Array, dict[str, Array]]:
            zeros: tuple[Array, Array, dict[str, Array]] = trees.zeros_like(jax.eval_shape(active))
            return zeros

        return active() if every == 1 else jax.lax.cond(step % every == 0, active, passive)

    def augment(self, images: Array, key: Array) -> Array:
        """Apply a random shift and brightness, the same to both batches of a step (DiffAugment)."""
        shifted = crop_and_flip(images, rng.fold(key, 0), self.settings.shift, flip=False)
        change = jax.random.uniform(rng.fold(key, 1), (len(images), 1, 1, 1), minval=-1.0)
        return shifted + self.settings.brightness * change
