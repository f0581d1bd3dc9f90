"""The steps of ONE client's generator (paper, Figure 1b); `generator_optimization.py` maps them.

L_G = L_adv + w_e L_entropy + w_d L_diversity + [n_i < tau] w_i L_inversion, the last three on the
frozen, eval-mode copy f0 of the client's model. The adversary is a DCGAN discriminator or, as in
the paper, the local model itself with a real/fake head.
"""

import jax
import jax.numpy as jnp
import optax

from mosaic_jax import rng
from mosaic_jax.data.clients import crop_and_flip, to_float, uniform_batch
from mosaic_jax.stages.adversary import Adversary
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.generator_ensemble import build
from mosaic_jax.stages.generator_losses import diversity_loss, entropy_loss, inversion_loss
from mosaic_jax.types import Array, PyTree, Variables

SETTLING = 40
"""Batches whose statistics the uploaded generator takes over: 0.9**40 = 1.5% is left of others."""

CARRY = frozenset(
    {
        "generator",
        "adversary",
        "generator_optimizer",
        "adversary_optimizer",
        "average",
        "settled",
    }
)
"""What each client carries from step to step; all of it stays with the client but the upload."""

LOSS_WEIGHTS = ("entropy_weight", "diversity_weight", "inversion_weight")


class ClientGenerator:
    """Start and steps of ONE client's generator; `client["frozen"]` is its own model, f0."""

    def __init__(self, federation: Federation):
        self.federation = federation
        self.settings = federation.config.generator_optimization
        self.generator = build(federation)
        self.adversary = Adversary(federation)
        self.average = optax.ema(self.settings.ema, debias=False)
        self.decay = optax.cosine_decay_schedule(1.0, self.settings.steps)

    def optimizer(self, learning_rate: Array | float) -> optax.GradientTransformation:
        """Adam with the stage's betas."""
        return optax.adam(learning_rate, self.settings.beta1, self.settings.beta2)

    def start(self, shared: PyTree, client: PyTree) -> PyTree:
        """Fresh networks and optimisers."""
        key = rng.fold(shared["key"], client["id"])
        generator = self.generator.init(rng.fold(key, 1), jnp.zeros((2, self.settings.latent)))
        adversary = self.adversary.init(rng.fold(key, 2), client["frozen"])
        return {
            "generator": generator,
            "adversary": adversary,
            "generator_optimizer": self.optimizer(0.0).init(generator["params"]),
            "adversary_optimizer": self.optimizer(0.0).init(adversary["params"]),
            "average": self.average.init(generator["params"]),
            "settled": generator["batch_stats"],
        }

    def upload(self, carry: PyTree) -> Variables:
        """What the client sends: the average weights, with batch statistics of their own."""
        return {"params": self.averaged(carry), "batch_stats": carry["settled"]}

    def averaged(self, carry: PyTree) -> PyTree:
        """The weights' average, without their start."""
        average = carry["average"]
        return optax.tree.bias_correction(average.ema, self.settings.ema, average.count)

    def settle(self, carry: PyTree, key: Array) -> PyTree:
        """Batch statistics of the average weights.

        The running ones belong to the last weights, not to their average: with them a generator of
        two classes draws nearly one.
        """
        params, settings = self.averaged(carry), self.settings

        def one_batch(number: Array, statistics: PyTree) -> PyTree:
            z = jax.random.normal(rng.fold(key, number), (settings.batch_size, settings.latent))
            variables = {"params": params, "batch_stats": statistics}
            _, updated = self.generator.apply(variables, z, train=True, mutable=["batch_stats"])
            return updated["batch_stats"]

        return jax.lax.fori_loop(0, SETTLING, one_batch, carry["generator"]["batch_stats"])

    def block(self, shared: PyTree, pair: PyTree) -> tuple[PyTree, dict[str, Array]]:
        """`block_steps` steps of a (client, carry) pair; mean health. The last block settles."""
        client, carry = pair
        numbers = shared["first_step"] + jnp.arange(self.settings.block_steps)
        carry, health = jax.lax.scan(
            lambda carry, number: self.step(shared, client, carry, number), carry, numbers
        )
        key = rng.fold(shared["key"], client["id"], numbers[-1], 6)
        is_last = numbers[-1] + 1 == self.settings.steps
        settled = jax.lax.cond(is_last, lambda: self.settle(carry, key), lambda: carry["settled"])
        return carry | {"settled": settled}, jax.tree.map(jnp.mean, health)

    def step(
        self, shared: PyTree, client: PyTree, carry: PyTree, number: Array
    ) -> tuple[PyTree, dict[str, Array]]:
        """One adversary step and one generator step on the same generated batch.

        Both learning rates fall to 0 along a cosine over the stage's steps.
        """
        settings = self.settings
        key = rng.fold(shared["key"], client["id"], number)
        z = jax.random.normal(rng.fold(key, 3), (settings.batch_size, settings.latent))

        def generate(params: PyTree) -> tuple[Array, PyTree]:
            variables = {**carry["generator"], "params": params}
            return self.generator.apply(variables, z, train=True, mutable=["batch_stats"])

        fake, pull_back, updated = jax.vjp(generate, carry["generator"]["params"], has_aux=True)
        adversary_carry, health = self._adversary_step(shared, client, carry, fake, number, key)
        adversary, augmentation = adversary_carry["adversary"], rng.fold(key, 5)
        loss, towards = jax.value_and_grad(self._adversarial_loss)(fake, adversary, augmentation)
        of_frozen, towards_frozen, seen = self._lazy_frozen_loss(shared, client, fake, number)
        rate = shared["learning_rate"] * self.decay(number)
        updates, optimizer = self.optimizer(rate).update(
            pull_back(towards + towards_frozen)[0], carry["generator_optimizer"]
        )
        params = optax.apply_updates(carry["generator"]["params"], updates)
        _, average = self.average.update(params, carry["average"])
        health |= {"generator_loss": loss + of_frozen, "spread": fake.std(axis=0).mean()} | seen
        return adversary_carry | {
            "generator": {"params": params, "batch_stats": updated["batch_stats"]},
            "generator_optimizer": optimizer,
            "average": average,
            "settled": carry["settled"],
        }, health

    def _adversary_step(
        self,
        shared: PyTree,
        client: PyTree,
        carry: PyTree,
        fake: Array,
        number: Array,
        key: Array,
    ) -> tuple[PyTree, dict[str, Array]]:
        """The adversary and its optimiser after one step, and its scores."""
        positions = uniform_batch(client, rng.fold(key, 4), self.settings.batch_size)
        real = to_float(self.federation.taken(shared["data"], positions))
        labels = shared["data"]["labels"][positions]
        params, statistics = carry["adversary"]["params"], carry["adversary"].get("batch_stats", {})
        real, fake = (self.augment(images, rng.fold(key, 5)) for images in (real, fake))
        (loss, health), gradient = jax.value_and_grad(self.adversary.loss, has_aux=True)(
            params, statistics, real, fake, labels
        )
        rate = shared["adversary_learning_rate"] * self.decay(number)
        updates, optimizer = self.optimizer(rate).update(gradient, carry["adversary_optimizer"])
        adversary = {**carry["adversary"], "params": optax.apply_updates(params, updates)}
        return (
            {"adversary": adversary, "adversary_optimizer": optimizer},
            health | {"adversary_loss": loss},
        )

    def _adversarial_loss(self, fake: Array, adversary: Variables, key: Array) -> Array:
        verdict, _ = self.adversary.logits(
            adversary["params"], adversary.get("batch_stats", {}), self.augment(fake, key)
        )
        return jax.nn.softplus(-verdict).mean()

    def _lazy_frozen_loss(
        self, shared: PyTree, client: PyTree, fake: Array, number: Array
    ) -> tuple[Array, Array, dict[str, Array]]:
        """`_frozen_loss`, its gradient and figures in every `frozen_every`-th step, times that.

        A step through f0 costs nearly as much as the rest of a step. (Karras et al. 2020, lazy
        regularisation.)
        """
        every, weights = self.settings.frozen_every, shared["loss_weights"]

        def active() -> tuple[Array, Array, dict[str, Array]]:
            (loss, seen), towards = jax.value_and_grad(self._frozen_loss, has_aux=True)(
                fake, client, weights
            )
            return every * loss, every * towards, jax.tree.map(lambda of: every * of, seen)

        def passive() -> tuple[Array, Array, dict[str, Array]]:
            return jax.tree.map(jnp.zeros_like, jax.eval_shape(active))

        return jax.lax.cond(number % every == 0, active, passive)

    def _frozen_loss(
        self, fake: Array, client: PyTree, weights: PyTree
    ) -> tuple[Array, dict[str, Array]]:
        """The part of L_G that looks at f0, and the entropy (nats) of the classes it sees.

        Nothing is computed for losses that are off.
        """
        settings, frozen, loss = self.settings, client["frozen"], jnp.zeros(())
        seen = {}
        if settings.entropy_weight or settings.diversity_weight:
            logits = self.federation.outputs(frozen, fake).logits
            diversity = diversity_loss(logits)
            loss += weights["entropy_weight"] * entropy_loss(logits)
            loss += weights["diversity_weight"] * diversity
            seen = {"class_entropy": -diversity}
        if settings.inversion_threshold and settings.inversion_weight:
            is_small = client["size"] < settings.inversion_threshold
            weight = jnp.where(is_small, weights["inversion_weight"], 0.0)
            loss += weight * inversion_loss(self.federation.model, frozen, fake)
        return loss, seen

    def augment(self, images: Array, key: Array) -> Array:
        """The same random shift and brightness on real and generated batches (DiffAugment)."""
        shifted = crop_and_flip(images, rng.fold(key, 0), self.settings.shift, flip=False)
        change = jax.random.uniform(rng.fold(key, 1), (len(images), 1, 1, 1), minval=-1.0)
        return shifted + self.settings.brightness * change
