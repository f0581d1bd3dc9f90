"""Training of ONE client's generator (paper, Figure 1b); `generator_optimization.py` maps it.

L_G = L_adv + w_e L_entropy + w_d L_diversity + [n_i < tau] w_i L_inversion, the last three on the
frozen, eval-mode copy f0 of the client's model. The adversary is a DCGAN discriminator or, as in
the paper, the local model itself with a real/fake head.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mosaic_jax import rng, trees
from mosaic_jax.data.augmentation import crop_and_flip
from mosaic_jax.data.batches import ClientLists, to_float, uniform_batch
from mosaic_jax.federation import Federation
from mosaic_jax.models import require_batch_norm
from mosaic_jax.stages.adversary import Adversary
from mosaic_jax.stages.generator_ensemble import build_generator
from mosaic_jax.stages.generator_losses import diversity_loss, entropy_loss, inversion_loss
from mosaic_jax.types import Array, PyTree, TrainingImages, Variables

BN_BATCHES = 40
"""Number of batches used to recompute batch statistics of the EMA weights; after 40, old statistics
have weight 0.9**40 = 1.5%."""

LOSS_WEIGHTS = ("entropy_weight", "diversity_weight", "inversion_weight")


class GeneratorInputs(struct.PyTreeNode):
    """Input that all clients share.

    Attributes:
      adversary_learning_rate: float32 [].
      data: the images that clients index into.
      key: key of the stage; client and step are folded in.
      learning_rate: the generator's, float32 [].
      loss_weights: of `LOSS_WEIGHTS`, float32 [] each.
      first_step: int32 [], steps made in earlier blocks.
    """

    adversary_learning_rate: Array
    data: TrainingImages
    key: Array
    learning_rate: Array
    loss_weights: dict[str, Array]
    first_step: Array | int = 0


class GeneratorClient(struct.PyTreeNode):
    """One client's input: its packed lists and its frozen model f0."""

    frozen: Variables
    lists: ClientLists


class GeneratorState(struct.PyTreeNode):
    """Carry of one client's training; all of it stays with the client but the upload.

    Attributes:
      adversary: variables of the adversary.
      adversary_optimizer: Adam's state.
      average: state of the exponential moving average of the generator's weights.
      frozen: f0, where there are several waves; it then rests here between blocks.
      generator: variables of the generator.
      generator_optimizer: Adam's state.
      ema_batch_stats: batch statistics of the average weights; of the first weights before the end.
    """

    adversary: Variables
    adversary_optimizer: PyTree
    average: PyTree
    frozen: Variables | None
    generator: Variables
    generator_optimizer: PyTree
    ema_batch_stats: PyTree


class ClientGenerator:
    """Training of ONE client's generator against its adversary and its frozen model f0.

    Raises:
      UserError: the inversion loss of a model without batch norm.
    """

    def __init__(self, federation: Federation):
        self.federation = federation
        self.settings = federation.config.generator_optimization
        if self.settings.inversion_threshold and self.settings.inversion_weight:
            variables, name = (
                federation.classifier.abstract_variables(),
                federation.config.model.name,
            )
            require_batch_norm(variables, name, "generator_optimization.inversion_threshold")
        self.generator = build_generator(federation)
        self.adversary = Adversary(federation)
        self.ema = optax.ema(self.settings.ema, debias=False)
        self.decay = optax.cosine_decay_schedule(1.0, self.settings.steps)

    def optimizer(self, learning_rate: Array | float) -> optax.GradientTransformation:
        """Return Adam with the stage's betas."""
        return optax.adam(learning_rate, self.settings.beta1, self.settings.beta2)

    def start(self, inputs: GeneratorInputs, client: GeneratorClient) -> GeneratorState:
        """Draw the networks and start the optimisers."""
        key = rng.fold(inputs.key, client.lists.id)
        generator = self.generator.init(rng.fold(key, 1), jnp.zeros((2, self.settings.latent)))
        adversary = self.adversary.init(rng.fold(key, 2), client.frozen)
        return GeneratorState(
            adversary=adversary,
            adversary_optimizer=self.optimizer(0.0).init(adversary["params"]),
            average=self.ema.init(generator["params"]),
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
        return optax.tree.bias_correction(average.ema, self.settings.ema, average.count)

    def recompute_batch_stats(self, carry: GeneratorState, key: Array) -> PyTree:
        """Compute batch statistics of the EMA weights on generated batches.

        The running statistics belong to the last weights, not to their average: with them a
        generator of two classes draws nearly one.
        """
        params, settings = self.averaged(carry), self.settings

        def one_batch(step: Array, statistics: PyTree) -> PyTree:
            z = jax.random.normal(rng.fold(key, step), (settings.batch_size, settings.latent))
            variables = {"params": params, "batch_stats": statistics}
            _, updated = self.generator.apply(variables, z, train=True, mutable=["batch_stats"])
            return updated["batch_stats"]

        return jax.lax.fori_loop(0, BN_BATCHES, one_batch, carry.generator["batch_stats"])

    def block(
        self, inputs: GeneratorInputs, pair: tuple[GeneratorClient, GeneratorState]
    ) -> tuple[GeneratorState, dict[str, Array]]:
        """Make `block_steps` steps; return mean diagnostics.

        The last block of the stage recomputes the batch statistics.
        """
        client, carry = pair
        steps = inputs.first_step + jnp.arange(self.settings.block_steps)
        carry, diagnostics = jax.lax.scan(
            lambda carry, step: self.step(inputs, client, carry, step), carry, steps
        )
        key = rng.fold(inputs.key, client.lists.id, steps[-1], 6)
        is_last = steps[-1] + 1 == self.settings.steps
        statistics = jax.lax.cond(
            is_last,
            lambda: self.recompute_batch_stats(carry, key),
            lambda: carry.ema_batch_stats,
        )
        return carry.replace(ema_batch_stats=statistics), jax.tree.map(jnp.mean, diagnostics)

    def step(
        self, inputs: GeneratorInputs, client: GeneratorClient, carry: GeneratorState, step: Array
    ) -> tuple[GeneratorState, dict[str, Array]]:
        """Make one adversary step and one generator step on the same generated batch.

        Both learning rates fall to 0 along a cosine over the stage's steps.
        """
        settings = self.settings
        key = rng.fold(inputs.key, client.lists.id, step)
        z = jax.random.normal(rng.fold(key, 3), (settings.batch_size, settings.latent))

        def generate(params: PyTree) -> tuple[Array, PyTree]:
            variables = {**carry.generator, "params": params}
            return self.generator.apply(variables, z, train=True, mutable=["batch_stats"])

        fake, vjp, updated = jax.vjp(generate, carry.generator["params"], has_aux=True)
        carry, diagnostics = self._adversary_step(inputs, client, carry, fake, step, key)
        # The generator is the same for both losses: their gradients meet at its images.
        loss, grad_images = jax.value_and_grad(self.adversarial_loss)(
            fake, carry.adversary, rng.fold(key, 5)
        )
        frozen_loss, grad_frozen, seen = self._lazy_frozen_loss(inputs, client, fake, step)
        rate = inputs.learning_rate * self.decay(step)
        updates, optimizer = self.optimizer(rate).update(
            vjp(grad_images + grad_frozen)[0], carry.generator_optimizer
        )
        params = optax.apply_updates(carry.generator["params"], updates)
        _, average = self.ema.update(params, carry.average)
        carry = carry.replace(
            generator={"params": params, "batch_stats": updated["batch_stats"]},
            generator_optimizer=optimizer,
            average=average,
        )
        pixel_std = fake.std(axis=0).mean()
        return carry, diagnostics | {
            "generator_loss": loss + frozen_loss,
            "spread": pixel_std,
        } | seen

    def _adversary_step(
        self,
        inputs: GeneratorInputs,
        client: GeneratorClient,
        carry: GeneratorState,
        fake: Array,
        step: Array,
        key: Array,
    ) -> tuple[GeneratorState, dict[str, Array]]:
        """Make one step of the adversary; return its scores."""
        positions = uniform_batch(
            client.lists.index,
            client.lists.size,
            key=rng.fold(key, 4),
            batch_size=self.settings.batch_size,
        )
        real, labels = to_float(inputs.data.gather(positions)), inputs.data.labels[positions]
        params, statistics = carry.adversary["params"], carry.adversary.get("batch_stats", {})
        real, fake = (self.augment(images, rng.fold(key, 5)) for images in (real, fake))
        (loss, diagnostics), gradient = jax.value_and_grad(self.adversary.loss, has_aux=True)(
            params, statistics, real, fake, labels
        )
        rate = inputs.adversary_learning_rate * self.decay(step)
        updates, optimizer = self.optimizer(rate).update(gradient, carry.adversary_optimizer)
        adversary = {**carry.adversary, "params": optax.apply_updates(params, updates)}
        carry = carry.replace(adversary=adversary, adversary_optimizer=optimizer)
        return carry, diagnostics | {"adversary_loss": loss}

    def adversarial_loss(self, fake: Array, adversary: Variables, key: Array) -> Array:
        """Return L_adv of generated images: the mean of -log sigmoid A(x)."""
        verdict, _ = self.adversary.logits(
            adversary["params"], adversary.get("batch_stats", {}), self.augment(fake, key)
        )
        return jax.nn.softplus(-verdict).mean()

    def _lazy_frozen_loss(
        self, inputs: GeneratorInputs, client: GeneratorClient, fake: Array, step: Array
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Compute `frozen_loss` and its gradient in every `frozen_every`-th step, times that.

        A step through f0 costs nearly as much as the rest of a step. (Karras et al. 2020, lazy
        regularisation.)
        """
        every, weights = self.settings.frozen_every, inputs.loss_weights

        def active() -> tuple[Array, Array, dict[str, Array]]:
            (loss, seen), gradient = jax.value_and_grad(self.frozen_loss, has_aux=True)(
                fake, client, weights
            )
            return every * loss, every * gradient, jax.tree.map(lambda of: every * of, seen)

        def passive() -> tuple[Array, Array, dict[str, Array]]:
            zeros: tuple[Array, Array, dict[str, Array]] = trees.zeros_like(jax.eval_shape(active))
            return zeros

        return jax.lax.cond(step % every == 0, active, passive)

    def frozen_loss(
        self, fake: Array, client: GeneratorClient, weights: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Return the terms of L_G on f0, and the entropy (nats) of the classes it predicts.

        Nothing is computed for losses that are off.
        """
        settings, frozen, loss = self.settings, client.frozen, jnp.zeros(())
        classifier, seen = self.federation.classifier, {}
        if settings.entropy_weight or settings.diversity_weight:
            logits = classifier.apply_eval(frozen, fake).logits
            diversity = diversity_loss(logits)
            loss += weights["entropy_weight"] * entropy_loss(logits)
            loss += weights["diversity_weight"] * diversity
            seen = {"class_entropy": -diversity}
        if settings.inversion_threshold and settings.inversion_weight:
            is_small = client.lists.size < settings.inversion_threshold
            weight = jnp.where(is_small, weights["inversion_weight"], 0.0)
            loss += weight * inversion_loss(classifier.module, frozen, fake)
        return loss, seen

    def augment(self, images: Array, key: Array) -> Array:
        """Apply a random shift and brightness, the same to both batches of a step (DiffAugment)."""
        shifted = crop_and_flip(images, rng.fold(key, 0), self.settings.shift, flip=False)
        change = jax.random.uniform(rng.fold(key, 1), (len(images), 1, 1, 1), minval=-1.0)
        return shifted + self.settings.brightness * change
