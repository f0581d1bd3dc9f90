"""Generator optimisation (paper, Figure 1b): each client trains a light generator of its own data.

L_G = L_adv + w_e L_entropy + w_d L_diversity + [n_i < tau] w_i L_inversion, the last three on the
frozen, eval-mode copy f0 of the client's model. The adversary is a DCGAN discriminator or, as in
the paper, the local model itself with a real/fake head. The generator is uploaded once; nothing
else of this stage leaves the client.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax import rng
from mosaic_jax.data.clients import crop_and_flip, to_float, uniform_batch
from mosaic_jax.models import Discriminator, Generator, RealFakeHead
from mosaic_jax.stages.federation import Federation, Stage, State, num_bytes
from mosaic_jax.types import Array, PyTree, Variables

SAMPLES = 8
"""Images of each client that are kept for the report."""

SETTLING = 40
"""Batches whose statistics the uploaded generator takes over: 0.9**40 = 1.5% is left of others."""

LOSS_WEIGHTS = ("entropy_weight", "diversity_weight", "inversion_weight")


def build(federation: Federation) -> Generator:
    """The generator of images of the federation's data set."""
    settings = federation.config.generator_optimization
    height, _, channels = federation.dataset.image_shape
    return Generator(
        image_size=height,
        channels=channels,
        width=settings.width,
        latent=settings.latent,
        form=federation.config.model.conv,
    )


def entropy_loss(logits: Array) -> Array:
    """L_entropy = mean_b H(softmax f(x_b)): low when every image is of a clear class."""
    log_p = jax.nn.log_softmax(logits)
    return -(jnp.exp(log_p) * log_p).sum(axis=-1).mean()


def diversity_loss(logits: Array) -> Array:
    """L_div = sum_c p_c log p_c with p = mean_b softmax f(x_b): -log C where classes are even."""
    log_p = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(logits.shape[0])
    return (jnp.exp(log_p) * log_p).sum()


def inversion_loss(model: nn.Module, variables: Variables, images: Array) -> Array:
    """L_inv = sum over batch norms of ||mean - running mean|| + ||var - running var||."""
    _, sown = model.apply(variables, images, train=False, mutable=["inversion"])
    return sum(jax.tree.leaves(sown["inversion"]), start=jnp.zeros(()))


class Adversary:
    """Real/fake logits of images, and what else the adversary must keep knowing."""

    def __init__(self, federation: Federation):
        self.federation = federation
        self.settings = federation.config.generator_optimization
        height, _, channels = federation.dataset.image_shape
        self.discriminator = Discriminator(
            image_size=height,
            channels=channels,
            width=self.settings.adversary_width,
            form=federation.config.model.conv,
        )

    @property
    def is_local(self) -> bool:
        """Whether the local model itself is the adversary, as in the paper."""
        return self.settings.adversary == "local"

    def init(self, key: Array, frozen: Variables) -> Variables:
        """First weights; the local adversary starts from the client's model."""
        images = jnp.zeros((1, *self.federation.dataset.image_shape))
        if not self.is_local:
            return self.discriminator.init(key, images)
        features = self.federation.outputs(frozen, images).features
        head = RealFakeHead().init(key, features)["params"]
        return {
            "params": {"classifier": frozen["params"], "real_fake": head},
            "batch_stats": frozen["batch_stats"],
        }

    def loss(
        self, params: PyTree, statistics: PyTree, real: Array, fake: Array, labels: Array
    ) -> tuple[Array, dict[str, Array]]:
        """BCE on real and generated images; the local adversary also classifies the real ones."""
        real_logits, class_logits = self.logits(params, statistics, real)
        fake_logits, _ = self.logits(params, statistics, fake)
        loss = jax.nn.softplus(-real_logits).mean() + jax.nn.softplus(fake_logits).mean()
        if class_logits is not None:
            loss += optax.softmax_cross_entropy_with_integer_labels(class_logits, labels).mean()
        health = {
            "real_score": jax.nn.sigmoid(real_logits).mean(),
            "fake_score": jax.nn.sigmoid(fake_logits).mean(),
        }
        return loss, health

    def logits(
        self, params: PyTree, statistics: PyTree, images: Array
    ) -> tuple[Array, Array | None]:
        """Real/fake logits [batch] and, of the local adversary, class logits [batch, classes].

        Always on batch statistics, separately for real and generated batches.
        """
        if not self.is_local:
            variables = {"params": params, "batch_stats": statistics}
            verdict: Any
            verdict, _ = self.discriminator.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
            return verdict, None
        variables = {"params": params["classifier"], "batch_stats": statistics}
        outputs: Any
        outputs, _ = self.federation.model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        head = {"params": params["real_fake"]}
        return cast(Array, RealFakeHead().apply(head, outputs.features)), outputs.logits


class ClientGenerator:
    """Start and steps of ONE client's generator; `client["frozen"]` is its own model, f0."""

    def __init__(self, federation: Federation):
        self.federation = federation
        self.settings = federation.config.generator_optimization
        self.generator = build(federation)
        self.adversary = Adversary(federation)
        self.average = optax.ema(self.settings.ema, debias=False)

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
            "upload": generator,
        }

    def upload(self, carry: PyTree, key: Array) -> Variables:
        """What the client sends: the average weights, with batch statistics of their own.

        The running statistics belong to the last weights, not to their average: with them a
        generator of two classes draws nearly one.
        """
        average, settings = carry["average"], self.settings
        params = optax.tree.bias_correction(average.ema, settings.ema, average.count)

        def settle(number: Array, statistics: PyTree) -> PyTree:
            z = jax.random.normal(rng.fold(key, number), (settings.batch_size, settings.latent))
            variables = {"params": params, "batch_stats": statistics}
            _, updated = self.generator.apply(variables, z, train=True, mutable=["batch_stats"])
            return updated["batch_stats"]

        statistics = carry["generator"]["batch_stats"]
        statistics = jax.lax.fori_loop(0, SETTLING, settle, statistics)
        return {"params": params, "batch_stats": statistics}

    def step(
        self, shared: PyTree, client: PyTree, carry: PyTree, number: Array
    ) -> tuple[PyTree, dict[str, Array]]:
        """One adversary step and one generator step on the same generated batch."""
        settings = self.settings
        key = rng.fold(shared["key"], client["id"], number)
        z = jax.random.normal(rng.fold(key, 3), (settings.batch_size, settings.latent))
        positions = uniform_batch(client, rng.fold(key, 4), settings.batch_size)
        real = to_float(shared["data"]["images"][positions])
        labels = shared["data"]["labels"][positions]

        def generate(params: PyTree) -> tuple[Array, PyTree]:
            variables = {**carry["generator"], "params": params}
            return self.generator.apply(variables, z, train=True, mutable=["batch_stats"])

        fake, pull_back, updated = jax.vjp(generate, carry["generator"]["params"], has_aux=True)
        adversary, adversary_state, health = self._adversary_step(
            shared, carry, real, fake, labels, rng.fold(key, 5)
        )
        (loss, classes), towards = jax.value_and_grad(self._generator_loss, has_aux=True)(
            fake, adversary, client, shared, rng.fold(key, 5)
        )
        updates, generator_state = self.optimizer(shared["learning_rate"]).update(
            pull_back(towards)[0], carry["generator_optimizer"]
        )
        params = optax.apply_updates(carry["generator"]["params"], updates)
        _, average = self.average.update(params, carry["average"])
        statistics = updated["batch_stats"]
        carry = {
            "generator": {"params": params, "batch_stats": statistics},
            "adversary": adversary,
            "generator_optimizer": generator_state,
            "adversary_optimizer": adversary_state,
            "average": average,
            "upload": carry["upload"],
        }
        spread = fake.std(axis=0).mean()
        return carry, health | classes | {"generator_loss": loss, "spread": spread}

    def _adversary_step(
        self, shared: PyTree, carry: PyTree, real: Array, fake: Array, labels: Array, key: Array
    ) -> tuple[Variables, PyTree, dict[str, Array]]:
        params, statistics = carry["adversary"]["params"], carry["adversary"].get("batch_stats", {})
        (loss, health), gradient = jax.value_and_grad(self.adversary.loss, has_aux=True)(
            params, statistics, self.augment(real, key), self.augment(fake, key), labels
        )
        updates, state = self.optimizer(shared["adversary_learning_rate"]).update(
            gradient, carry["adversary_optimizer"]
        )
        adversary = {**carry["adversary"], "params": optax.apply_updates(params, updates)}
        return adversary, state, health | {"adversary_loss": loss}

    def _generator_loss(
        self,
        fake: Array,
        adversary: Variables,
        client: PyTree,
        shared: PyTree,
        key: Array,
    ) -> tuple[Array, dict[str, Array]]:
        """L_G, and the entropy of the mean class under f0, where the losses make use of f0."""
        verdict, _ = self.adversary.logits(
            adversary["params"], adversary.get("batch_stats", {}), self.augment(fake, key)
        )
        loss, classes = jax.nn.softplus(-verdict).mean(), {}
        settings, weights, frozen = self.settings, shared["loss_weights"], client["frozen"]
        if settings.entropy_weight or settings.diversity_weight:
            logits = self.federation.outputs(frozen, fake).logits
            diversity = diversity_loss(logits)
            loss += weights["entropy_weight"] * entropy_loss(logits)
            loss += weights["diversity_weight"] * diversity
            classes["class_entropy"] = -diversity
        if settings.inversion_threshold and settings.inversion_weight:
            is_small = client["size"] < settings.inversion_threshold
            weight = jnp.where(is_small, weights["inversion_weight"], 0.0)
            loss += weight * inversion_loss(self.federation.model, frozen, fake)
        return loss, classes

    def augment(self, images: Array, key: Array) -> Array:
        """The same random shift and brightness on real and generated batches (DiffAugment)."""
        shifted = crop_and_flip(images, rng.fold(key, 0), self.settings.shift, flip=False)
        change = jax.random.uniform(rng.fold(key, 1), (len(images), 1, 1, 1), minval=-1.0)
        return shifted + self.settings.brightness * change


def train(federation: Federation) -> Stage:
    """All clients' generators, `block_steps` steps of each in one compiled call."""
    settings, client_generator = (
        federation.config.generator_optimization,
        ClientGenerator(federation),
    )
    shared = {
        "data": federation.data,
        "key": federation.key("generator_optimization"),
        "learning_rate": jnp.float32(settings.learning_rate),
        "adversary_learning_rate": jnp.float32(settings.adversary_learning_rate),
        "loss_weights": {name: jnp.float32(getattr(settings, name)) for name in LOSS_WEIGHTS},
    }

    def block_of_one(shared: PyTree, pair: PyTree) -> tuple[PyTree, PyTree]:
        client, carry = pair
        numbers = shared["first_step"] + jnp.arange(settings.block_steps)
        carry, health = jax.lax.scan(
            lambda carry, number: client_generator.step(shared, client, carry, number),
            carry,
            numbers,
        )
        key = rng.fold(shared["key"], client["id"], numbers[-1], 6)
        carry = carry | {"upload": client_generator.upload(carry, key)}
        return carry, jax.tree.map(lambda leaf: leaf[-10:].mean(), health)

    start_all = federation.jit(federation.map(client_generator.start))
    block_all = federation.jit(_paired(federation.map(block_of_one)), donate_argnums=2)

    def clients(state: State) -> PyTree:
        return federation.clients | {"frozen": state["clients"]}

    def block(state: State, carry: PyTree, index: int) -> tuple[PyTree, PyTree]:
        first = shared | {"first_step": jnp.int32(index * settings.block_steps)}
        return block_all(first, clients(state), carry)

    upload = jax.eval_shape(
        client_generator.generator.init, jax.random.key(0), jnp.zeros((1, settings.latent))
    )
    return Stage(
        name="generator_optimization",
        blocks=settings.steps // settings.block_steps,
        start=lambda state: start_all(shared, clients(state)),
        block=block,
        finish=lambda state, carry: state | {"generators": carry["upload"]},
        samples=_samples(federation),
        client_steps=settings.block_steps * federation.num_clients,
        upload=num_bytes(upload),
    )


def _samples(federation: Federation) -> Callable[[State], dict[str, np.ndarray]]:
    """Some generated and some real images of each client, for the eye."""
    draw = federation.jit(sampler(federation, SAMPLES))

    def samples(state: State) -> dict[str, np.ndarray]:
        images = np.asarray(draw(state["generators"], federation.key("samples")))
        chosen = np.stack([np.resize(indices, SAMPLES) for indices in federation.indices])
        return {
            "generated": np.rint((images + 1) * 127.5).astype(np.uint8),
            "real": federation.dataset.train_images[chosen],
        }

    return samples


def _paired(mapped: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Clients and what they carry as separate arguments, so that only the latter is donated."""
    return lambda shared, clients, carry: mapped(shared, (clients, carry))


def sampler(federation: Federation, images: int) -> Any:
    """`(generators [clients, ...], key) -> images [clients, images, h, w, c]` in [-1, 1].

    Each generator draws with its client's own key; the ensemble is never averaged.
    """
    generator, latent = build(federation), federation.config.generator_optimization.latent

    def of_client(key: Array, client: PyTree) -> Array:
        z = jax.random.normal(rng.fold(key, client["id"]), (images, latent))
        return cast(Array, generator.apply(client["generator"], z))

    mapped = federation.map(of_client)

    def draw(generators: Variables, key: Array) -> Array:
        ids = jnp.arange(jax.tree.leaves(generators)[0].shape[0])
        return mapped(key, {"id": ids, "generator": generators})

    return draw
