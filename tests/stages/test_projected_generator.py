"""Conditional generators, and the adversary that sees images through the frozen model's maps."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax import models, parallel, rng, settings
from mosaic_jax.models.generator import Generator
from mosaic_jax.stages import generator_ensemble, generator_losses
from mosaic_jax.stages.adversary import Adversary
from mosaic_jax.types import Outputs, UserError
from tests.helpers import TINY, assert_close, differ
from tests.stages.unequal import COUNTS, KEY, LONG, loss_weights, unequal

CONDITIONAL = {
    "generator_optimization.conditional": True,
    "generator_optimization.class_weight": 0.5,
    "generator_optimization.upsampling": "nearest",
    "generator_optimization.inversion_threshold": 1000,
}
PROJECTED = {**CONDITIONAL, "generator_optimization.adversary": "projected"}
WEIGHTS = loss_weights(class_weight=0.7, inversion_weight=0.3, entropy_weight=0.2)


@pytest.fixture(scope="module", params=["dcgan", "projected"])
def conditional(request, bench):
    """Return a bench of conditional generators, for each adversary."""
    adversary = {"generator_optimization.adversary": request.param}
    return bench.of(unequal(**LONG, **CONDITIONAL, **adversary))


@pytest.fixture(scope="module")
def projected(bench):
    return bench.of(unequal(**LONG, **PROJECTED))


def drawn(bench, i, number):
    """Return the step's images, real and generated, and labels, computed plainly."""
    federation, lists = bench.federation, bench.client(i).lists
    key = rng.fold(KEY, lists.id, number)
    slot = jax.random.randint(rng.fold(key, 4), (8,), 0, lists.size)
    positions = lists.index[slot]
    labels = federation.data.labels[positions]
    z = jax.random.normal(rng.fold(key, 3), (8, 8))
    z = jnp.concatenate([z, 3.0 * jnp.eye(10)[labels]], axis=1)
    return federation.data.gather(positions) / 127.5 - 1, z, labels, rng.fold(key, 5)


def seen(bench, client, images, key):
    """Return what the adversary sees of images."""
    images = bench.generator.augment(images, key)
    if bench.generator.settings.adversary == "dcgan":
        return images
    module = bench.federation.classifier.module
    return generator_losses.view(module, client.frozen, images).maps


def frozen_terms(bench, client, fake, labels, key):
    """Return the losses of `WEIGHTS` on f0, of what a projected adversary's f0 is shown."""
    shown, classifier = fake, bench.federation.classifier
    if bench.generator.settings.adversary == "projected":
        shown = bench.generator.augment(fake, key)
    log_p = nn.log_softmax(classifier.apply_eval(client.frozen, shown).logits)
    entropy, mean = -(jnp.exp(log_p) * log_p).sum(-1).mean(), jnp.exp(log_p).mean(0)
    inversion = generator_losses.inversion_loss(classifier.module, client.frozen, shown)
    of_class = -log_p[jnp.arange(len(labels)), labels].mean()
    diversity = (mean * jnp.log(mean)).sum()
    return 0.2 * entropy + diversity + 0.7 * of_class + 0.3 * inversion


@pytest.mark.parametrize("i", [0, 1])
def test_a_step_descends_all_losses_of_one_batch_and_its_classes(conditional, i):
    """The losses written out again, in one function and by the adversary after its step."""
    client = parallel.put_replicated(conditional.federation.layout.mesh, conditional.client(i))
    inputs, logits = conditional.inputs(**WEIGHTS), conditional.generator.adversary.logits
    carry = conditional.start(inputs, client)
    after, figures = conditional.step(inputs, client, carry, jnp.int32(0))
    real, z, labels, key = drawn(conditional, i, 0)
    statistics = carry.adversary["batch_stats"]

    def generate(params):
        variables, model = {**carry.generator, "params": params}, conditional.generator.generator
        return model.apply(variables, z, train=True, mutable=["batch_stats"])[0]

    def score(params, images):
        return logits(params, statistics, seen(conditional, client, images, key), labels)[0]

    def of_adversary(params):
        fake = generate(carry.generator["params"])
        real_score, fake_score = score(params, real), score(params, fake)
        return -(jnp.log(nn.sigmoid(real_score)) + jnp.log1p(-nn.sigmoid(fake_score))).mean()

    def of_generator(params):
        fake = generate(params)
        adversarial = -jnp.log(nn.sigmoid(score(after.adversary["params"], fake))).mean()
        return adversarial + frozen_terms(conditional, client, fake, labels, key)

    for loss, part, rate in ((of_adversary, "adversary", 1e-3), (of_generator, "generator", 2e-3)):
        params = getattr(carry, part)["params"]
        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        assert figures[f"{part}_loss"] == pytest.approx(float(value), rel=1e-4)
        adam = optax.adam(rate, 0.5, 0.99)
        expected = optax.apply_updates(params, adam.update(gradient, adam.init(params))[0])
        # Adam's first step is the gradient's sign; a few gradients are zero but for rounding.
        moved = getattr(after, part)["params"]
        apart = jax.tree.map(lambda a, b: int((jnp.abs(a - b) > 1e-5).sum()), moved, expected)
        assert sum(jax.tree.leaves(apart)) <= 3, part


def test_inversion_below_a_large_tau_acts_on_every_client(projected):
    for i in range(3):
        off, on = (
            projected.run(i, **loss_weights(inversion_weight=weight))[1]["generator_loss"]
            for weight in (0.0, 1.0)
        )
        assert on - off > 0.1


def test_the_share_of_images_of_the_right_class_is_that_of_the_frozen_model(projected):
    """A model that is sure of class 0 is right about a client of class 0 alone."""
    for i, share in ((0, 1.0), (1, 0.0)):
        client = projected.client(i)
        head = {"kernel": jnp.zeros((16, 10)), "bias": 50.0 * jnp.eye(10)[0]}
        sure = {**client.frozen, "params": {**client.frozen["params"], "head": head}}
        _, figures = projected.run(i, client=client.replace(frozen=sure))
        assert figures["class_match"] == share
        assert figures["class_entropy"] == pytest.approx(0, abs=1e-4)


def test_classes_are_drawn_as_often_as_their_client_holds_them():
    for counts in COUNTS:
        labels = generator_ensemble.draw_labels(KEY, jnp.float32(counts), 20_000)
        shares = np.bincount(labels, minlength=10) / 20_000
        np.testing.assert_allclose(shares, counts / counts.sum(), atol=0.015)
        assert not shares[counts == 0].any()


def test_the_server_asks_each_generator_for_its_clients_classes(projected, monkeypatch):
    """By a generator whose images show the class they were asked for."""

    class Shows:
        def apply(self, variables, z):
            return jnp.broadcast_to(z[:, 8:].argmax(-1)[:, None, None, None], (len(z), 16, 16, 1))

    monkeypatch.setattr(generator_ensemble, "build_generator", lambda federation: Shows())
    draw = generator_ensemble.sampler(projected.federation, 2000)
    labels = np.asarray(draw({}, KEY, jnp.arange(3)))[:, :, 0, 0, 0]
    for own, counts in zip(labels, COUNTS, strict=True):
        shares = np.bincount(own, minlength=10) / 2000
        np.testing.assert_allclose(shares, counts / counts.sum(), atol=0.05)
        assert not shares[counts == 0].any()


def test_a_generators_input_is_noise_and_its_class(projected):
    z = generator_ensemble.draw_latent(projected.federation, KEY, jnp.array([2, 7]))
    np.testing.assert_array_equal(z[:, 8:], 3.0 * np.eye(10)[[2, 7]])
    np.testing.assert_array_equal(z[:, :8], jax.random.normal(KEY, (2, 8)))
    shapes = generator_ensemble.upload_shapes(projected.federation)
    assert shapes["params"]["up1"]["kernel"].shape[2] == 18


def test_a_clients_images_do_not_depend_on_the_other_clients(projected):
    federation = projected.federation
    generator = generator_ensemble.build_generator(federation)
    init = jax.vmap(lambda key: generator.init(key, jnp.zeros((2, 18))))
    generators = init(jax.random.split(KEY, 3))
    draw = jax.jit(generator_ensemble.sampler(federation, 4))
    every = draw(generators, KEY, jnp.arange(3))
    last = jax.tree.map(lambda leaf: leaf[2:], generators)
    assert_close(draw(last, KEY, jnp.array([2])), every[2:], atol=1e-5)
    assert differ(draw(last, KEY, jnp.array([1])), every[2:])  # another client's classes


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "cnn", "lenet"])
def test_every_classifier_shows_its_maps_from_the_first_to_the_last(name):
    model = models.build_classifier(name, 10, 4, (0.5,), (0.5,))
    images = jax.random.normal(KEY, (3, 16, 16, 1))
    variables = models.with_statistics(model.init(KEY, images))
    assert set(variables) == {"params", "batch_stats"}
    seen = generator_losses.view(model, variables, images)
    sizes = {
        "resnet8": [16, 8, 4],
        "resnet18": [16, 8, 4, 2],
        "cnn": [16, 8, 4],
        "lenet": [6, 1],
    }[name]
    assert [each.shape[:3] for each in seen.maps] == [(3, size, size) for size in sizes]
    outputs = model.apply(variables, images)
    assert_close(seen.logits, outputs.logits, atol=1e-5)
    if name != "lenet":
        assert_close(seen.maps[-1].mean(axis=(1, 2)), outputs.features, atol=1e-5)


def test_a_model_without_maps_is_refused(projected):
    class Blind(nn.Module):
        num_classes: int = 10

        @nn.compact
        def __call__(self, images, train=False, mask=None):
            features = images.reshape(len(images), -1)
            return Outputs(nn.Dense(10, name="head")(features), features)

    federation = projected.federation
    classifier = dataclasses.replace(federation.classifier, module=Blind())
    adversary = Adversary(dataclasses.replace(federation, classifier=classifier))
    frozen = models.with_statistics(Blind().init(KEY, jnp.zeros((1, 16, 16, 1))))
    with pytest.raises(UserError, match="'projected' needs a model that sows its feature maps"):
        adversary.init(KEY, frozen)


@pytest.mark.parametrize("upsampling", ["transposed", "nearest"])
def test_a_pixel_of_the_first_map_reaches_its_own_part_of_the_image(upsampling):
    """Repeated pixels make flat squares where a transposed convolution makes a pattern."""
    generator = Generator(image_size=16, channels=1, width=4, latent=8, upsampling=upsampling)
    variables = generator.init(KEY, jnp.zeros((2, 8)))
    sizes = {name: leaf["kernel"].shape[:2] for name, leaf in variables["params"].items()
             if "kernel" in leaf}  # fmt: skip
    later = (3, 3) if upsampling == "nearest" else (4, 4)
    last = (3, 3) if upsampling == "nearest" else (1, 1)
    assert sizes == {"up1": (4, 4), "up2": later, "up3": later, "colour": last}
    # All kernels constant: a constant first map gives an image that is flat inside.
    ones = jax.tree.map(jnp.ones_like, variables["params"])
    ones["colour"]["kernel"] = 1e-5 * ones["colour"]["kernel"]
    image = generator.apply({**variables, "params": ones}, jnp.ones((1, 8)))[0, 4:-4, 4:-4, 0]
    assert image.shape == (8, 8)
    if upsampling == "nearest":
        np.testing.assert_allclose(image, image[0, 0], rtol=1e-5)


def test_a_projected_adversary_asks_the_frozen_model_in_every_step():
    changes = {
        "generator_optimization.adversary": "projected",
        "generator_optimization.frozen_every": 2,
    }
    with pytest.raises(UserError, match="frozen_every saves nothing with adversary = 'projected'"):
        settings.from_config_dict(settings.make("", TINY | changes, {}).to_dict())
