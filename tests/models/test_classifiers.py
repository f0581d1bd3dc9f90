"""Classifiers: sizes of the paper's networks, and the conventions they share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.models import CNN, LeNet, ResNet, build_classifier, head_logits
from mosaic_jax.types import UserError
from tests.models.arrays import KEY, make_variables, parameters


@pytest.mark.parametrize(
    ("depth", "classes", "expected"),
    [
        (18, 10, 11_173_962),
        (18, 100, 11_220_132),
        (34, 10, 21_282_122),
        (34, 100, 21_328_292),
        (50, 10, 23_520_842),
        (50, 100, 23_705_252),
    ],
)
def test_resnets_have_the_reference_size(depth, classes, expected):
    assert parameters(ResNet(classes, depth), (2, 32, 32, 3)) == expected


@pytest.mark.parametrize(("shape", "expected"), [((28, 28, 1), 44_426), ((32, 32, 3), 62_006)])
def test_lenet_has_niid_benchs_size(shape, expected):
    assert parameters(LeNet(10), (2, *shape)) == expected


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("resnet8", 16),
        ("resnet18", 32),
        ("resnet34", 32),
        ("resnet50", 128),
        ("cnn", 16),
        ("lenet", 84),
    ],
)
def test_classifiers_share_one_convention(name, features):
    model = build_classifier(name, 7, 4, (0.5,), (0.25,))
    images = jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.float32)
    variables = jax.eval_shape(model.init, KEY, images)
    assert set(variables) == {"params"} | ({"batch_stats"} if name != "lenet" else set())
    assert "head" in variables["params"]
    outputs = jax.eval_shape(model.apply, variables, images)
    assert outputs.logits.shape == (2, 7)
    assert outputs.features.shape == (2, features)


@pytest.mark.parametrize("form", ["native", "gradients"])
def test_bfloat16_is_the_arithmetic_and_not_what_is_kept(form):
    half, full = (
        build_classifier("cnn", 5, 8, (0.5,), (0.5,), conv_impl=form, dtype=dtype)
        for dtype in ("bfloat16", "float32")
    )
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
    variables = half.init(KEY, images)

    def loss(params, model):
        outputs, updated = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.square(outputs.logits).sum(), updated

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    gradients, updated = gradient(variables["params"], half)
    exact = gradient(variables["params"], full)[0]
    for leaf in jax.tree.leaves((variables, gradients, updated)):
        assert leaf.dtype == jnp.float32
    difference = optax.tree.norm(optax.tree.sub(gradients, exact)) / optax.tree.norm(exact)
    assert 1e-4 < difference < 0.2  # other arithmetic, and the same function


def test_larger_images_keep_the_feature_size():
    model = ResNet(10, 18, width=4)
    outputs, _ = jax.eval_shape(lambda x: model.init_with_output(KEY, x), jnp.zeros((2, 64, 64, 3)))
    assert outputs.features.shape == (2, 32)


def test_unknown_classifier_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        build_classifier("resent18", 10, 8, (0.5,), (0.5,))


@pytest.fixture(scope="module")
def small():
    """A tiny ResNet-8 whose running statistics are not the initial ones, and its images."""
    model = ResNet(5, 8, width=4, mean=(0.3, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    images = np.random.default_rng(1).uniform(-1, 1, (6, 12, 12, 3)).astype(np.float32)
    return model, make_variables(model, images), jnp.asarray(images)


def test_classifier_normalises_images_itself(small):
    model, variables, images = small
    normalised = ((images + 1) / 2 - jnp.array(model.mean)) / jnp.array(model.std)
    # Mean and std of one half make the normalisation the identity.
    plain = model.clone(mean=(0.5,) * 3, std=(0.5,) * 3)
    actual = model.apply(variables, images).logits
    np.testing.assert_allclose(actual, plain.apply(variables, normalised).logits, atol=1e-5)
    assert np.abs(actual - plain.apply(variables, images).logits).max() > 1e-3


def test_classifier_logits_are_the_head_on_the_features(small):
    model, variables, images = small
    outputs = model.apply(variables, images)
    actual = head_logits(variables["params"], outputs.features)
    np.testing.assert_allclose(actual, outputs.logits, rtol=1e-5)


def test_mask_reaches_every_batch_norm(small):
    model, variables, images = small
    train = jax.jit(lambda x, m: model.apply(variables, x, True, m, mutable=["batch_stats"]))
    padded = images.at[4:].set(0.9)
    outputs, stats = train(padded, jnp.array([1.0, 1, 1, 1, 0, 0]))
    expected, expected_stats = train(images[:4], jnp.ones(4))
    np.testing.assert_allclose(outputs.logits[:4], expected.logits, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stats, expected_stats)


def test_training_mode_uses_the_batch(small):
    model, variables, images = small
    trained, _ = model.apply(variables, images, True, mutable=["batch_stats"])
    assert np.abs(trained.logits - model.apply(variables, images).logits).max() > 1e-3


def test_inversion_has_one_distance_per_batch_norm(small):
    model, variables, images = small
    _, sown = model.apply(variables, images, mutable=["inversion"])
    assert len(jax.tree.leaves(sown)) == len(jax.tree.leaves(variables["batch_stats"])) // 2


@pytest.mark.parametrize("model", [CNN(3, 4), ResNet(3, 8, width=4)])
def test_classifier_learns_two_brightnesses(model):
    labels = jnp.arange(16) % 2
    images = (labels[:, None, None, None] - 0.5) * jnp.ones((16, 8, 8, 1))
    images += 0.1 * np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)
    variables = make_variables(model, images)

    def loss(params, stats):
        outputs, updates = model.apply(
            {"params": params, "batch_stats": stats}, images, True, mutable=["batch_stats"]
        )
        chosen = jax.nn.log_softmax(outputs.logits)[jnp.arange(16), labels]
        return -chosen.mean(), updates["batch_stats"]

    @jax.jit
    def step(params, stats):
        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), stats, value

    params, stats = variables["params"], variables["batch_stats"]
    for _ in range(40):
        params, stats, value = step(params, stats)
    assert value < 0.05
    logits = model.apply({"params": params, "batch_stats": stats}, images).logits
    assert (logits.argmax(-1) == labels).all()
