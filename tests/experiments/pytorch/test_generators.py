"""The PyTorch baseline's generator steps and crops are ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the PyTorch baseline needs the extra `torch`")

from experiments.speed.pytorch_baseline import data as torch_data  # noqa: E402
from experiments.speed.pytorch_baseline import generator_optimization as torch_generators  # noqa: E402
from experiments.speed.pytorch_baseline import generators, weights  # noqa: E402
from mosaic_jax import rng  # noqa: E402
from mosaic_jax.data.batches import to_float, uniform_batch  # noqa: E402
from mosaic_jax.stages import client_generator  # noqa: E402
from mosaic_jax.stages.generator_state import (  # noqa: E402
    LOSS_WEIGHTS,
    GeneratorClient,
    GeneratorInputs,
)
from tests.experiments.pytorch.deviations import perturbed  # noqa: E402
from tests.experiments.pytorch.parity import (  # noqa: E402
    adam_gradient,
    classifier,
    compare,
    compare_moved,
    gradients,
    to_torch,
)
from tests.helpers import member  # noqa: E402


def generator_pair(federation, carry, frozen):
    """The baseline's client with the weights of a carry."""
    settings = federation.config.generator_optimization
    height, _, channels = federation.dataset.image_shape
    generator = generators.Generator(height, channels, settings.width, settings.latent).eval()
    discriminator = generators.Discriminator(height, channels, settings.adversary_width)
    return torch_generators.ClientGenerator(
        weights.load(generator, carry.generator),
        weights.load(discriminator, carry.adversary),
        classifier(federation, frozen),
        settings,
    )


def step_draws(federation, inputs, client, number):
    """What `ClientGenerator.step` draws: noise, real images, corners and brightness."""
    settings = federation.config.generator_optimization
    key = rng.fold(inputs.key, client.id, number)
    z = jax.random.normal(rng.fold(key, 3), (settings.batch_size, settings.latent))
    positions = uniform_batch(
        client.index, client.size, key=rng.fold(key, 4), batch_size=settings.batch_size
    )
    corner_key, _ = jax.random.split(rng.fold(key, 5, 0))
    corners = jax.random.randint(corner_key, (len(z), 2), 0, 2 * settings.shift + 1)
    brightness = jax.random.uniform(rng.fold(key, 5, 1), (len(z), 1, 1, 1), minval=-1.0)
    return (
        torch.from_numpy(np.array(z)),
        to_torch(to_float(inputs.data.gather(positions))),
        torch.from_numpy(np.array(corners)).long(),
        torch.from_numpy(np.array(brightness)),
    )


def test_generator_steps(federation, record, request):
    """Steps with (even numbers) and without the frozen losses, and the upload."""
    settings = federation.config.generator_optimization
    client = client_generator.ClientGenerator(federation)
    inputs = GeneratorInputs(
        adversary_learning_rate=jnp.float32(settings.adversary_learning_rate),
        data=federation.data,
        key=federation.key("parity"),
        learning_rate=jnp.float32(settings.learning_rate),
        loss_weights={name: jnp.float32(getattr(settings, name)) for name in LOSS_WEIGHTS},
        first_step=jnp.int32(0),
    )
    frozen = perturbed(federation)
    lists = member(federation.clients.lists, 1)
    packed = GeneratorClient(frozen, lists)
    start = carry = jax.jit(lambda: client.start(inputs, packed))()
    step = jax.jit(lambda carry, number: client.step(inputs, packed, carry, number))
    pair = generator_pair(federation, carry, frozen)
    for number in range(4):
        after, health = step(carry, number)
        found = pair.step(*step_draws(federation, inputs, lists, number))
        for name, value in found.items():
            record(f"{name}", value, health[name])
        for name, module, optimizer in (
            ("generator", pair.generator, "generator_optimizer"),
            ("adversary", pair.discriminator, "adversary_optimizer"),
        ):
            expected = adam_gradient(
                getattr(carry, optimizer), getattr(after, optimizer), settings.beta1
            )
            compare(record, f"{name}_gradient", module, gradients(module), {"params": expected})
        carry = after
    untracked = {"params": carry.adversary["params"]}
    compare_moved(request, pair.discriminator, {"params": start.adversary["params"]}, untracked)
    key = jax.random.key(5)
    noise = [
        jax.random.normal(rng.fold(key, i), (settings.batch_size, settings.latent))
        for i in range(client_generator.BN_BATCHES)
    ]
    upload = pair.upload(torch.from_numpy(np.array(noise)))
    statistics = jax.jit(client.recompute_batch_stats)(carry, key, packed)
    expected = client.upload(carry.replace(ema_batch_stats=statistics))
    compare_moved(request, upload, start.generator, expected)


def test_the_crop_and_its_gradient(federation, record):
    client = client_generator.ClientGenerator(federation)
    settings, key = federation.config.generator_optimization, jax.random.key(8)
    images = to_float(federation.data.gather(np.arange(6)))
    above = jax.random.normal(key, images.shape)
    expected, pull = jax.vjp(lambda images: client.augment(images, key), images)
    corner_key, _ = jax.random.split(rng.fold(key, 0))
    corners = np.array(jax.random.randint(corner_key, (6, 2), 0, 2 * settings.shift + 1))
    change = np.array(jax.random.uniform(rng.fold(key, 1), (6, 1, 1, 1), minval=-1.0))
    mine = to_torch(images).requires_grad_()
    found = torch_data.crop(mine, torch.from_numpy(corners).long(), settings.shift)
    found = found + settings.brightness * torch.from_numpy(change)
    found.backward(to_torch(above))
    record("images", found.detach().permute(0, 2, 3, 1), expected)
    record("gradient", mine.grad.permute(0, 2, 3, 1), pull(above)[0])
