"""Models: sizes of the paper's networks, the conventions they share, and the meta model's eyes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.models import (
    CLASSIFIERS,
    CNN,
    Discriminator,
    Generator,
    MetaModel,
    RealFakeHead,
    ResNet,
    build_classifier,
    check_classifier,
    head_logits,
)
from mosaic_jax.models.layers import BatchNorm, Dense
from mosaic_jax.types import Outputs, UserError

KEY = jax.random.key(0)


def make_variables(module, *arguments):
    """Variables of sensible size, without the seconds that compiling `init` takes."""
    generator = np.random.default_rng(0)

    def fill(leaf):
        if leaf.ndim > 1:
            fan_in = np.prod(leaf.shape[:-1])
            return jnp.asarray(generator.standard_normal(leaf.shape) / np.sqrt(fan_in), jnp.float32)
        return jnp.asarray(generator.uniform(0.5, 1.5, leaf.shape), jnp.float32)

    return jax.tree.map(fill, jax.eval_shape(module.init, KEY, *arguments))


def parameters(module, *shapes):
    """Number of parameters, without making any."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    params = jax.eval_shape(module.init, KEY, *arguments)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


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


def test_generator_and_discriminator_have_the_reference_size():
    assert parameters(Generator(), (2, 100)) == 3_573_824
    assert parameters(Discriminator(), (2, 32, 32, 3)) == 2_759_424


@pytest.mark.parametrize(("classes", "expected"), [(10, 948_206), (100, 20_425_196)])
def test_meta_model_has_the_reference_size(classes, expected):
    blind = MetaModel(classes, experts=classes, expert_embedding=False)
    assert parameters(blind, (2, classes, classes)) == expected
    seeing = MetaModel(classes, experts=classes)
    added = classes * 10 * classes
    assert parameters(seeing, (2, classes, classes)) == expected + added


@pytest.mark.parametrize(
    ("name", "features"),
    [("resnet8", 16), ("resnet18", 32), ("resnet34", 32), ("resnet50", 128), ("cnn", 16)],
)
def test_classifiers_share_one_convention(name, features):
    model = build_classifier(name, 7, 4, (0.5,), (0.25,))
    images = jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.float32)
    variables = jax.eval_shape(model.init, KEY, images)
    assert set(variables) == {"params", "batch_stats"}
    assert "head" in variables["params"]
    outputs = jax.eval_shape(model.apply, variables, images)
    assert outputs.logits.shape == (2, 7)
    assert outputs.features.shape == (2, features)


@pytest.mark.parametrize("form", ["native", "gradients"])
def test_bfloat16_is_the_arithmetic_and_not_what_is_kept(form):
    half, full = (
        build_classifier("cnn", 5, 8, (0.5,), (0.5,), form, dtype)
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


@pytest.mark.parametrize("size", [16, 32, 64])
def test_generator_draws_images_and_the_discriminator_judges_them(size):
    generator = Generator(size, channels=2, width=8, latent=6)
    discriminator = Discriminator(size, channels=2, width=2)
    z = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    drawing = make_variables(generator, z)
    drawing["params"]["colour"]["kernel"] *= 5
    judging = make_variables(discriminator, jnp.zeros((4, size, size, 2)))

    @jax.jit
    def draw_and_judge(z):
        images, _ = generator.apply(drawing, z, True, mutable=["batch_stats"])
        return images, discriminator.apply(judging, images)

    images, logits = draw_and_judge(z)
    assert images.shape == (4, size, size, 2)
    assert np.abs(images).max() <= 1.0
    assert images.min() < -0.5
    assert images.max() > 0.5
    assert logits.shape == (4,)
    assert logits.min() < 0 or logits.max() > 1  # no sigmoid


def test_generator_refuses_other_sizes():
    with pytest.raises(UserError, match="image_size=28"):
        Generator(28).init(KEY, jnp.zeros((1, 100)))


def test_real_fake_head_gives_one_logit():
    logits, _ = RealFakeHead().init_with_output(KEY, jnp.ones((3, 8)))
    assert logits.shape == (3,)


def meta(expert_embedding):
    model = MetaModel(
        4, experts=3, width_per_class=2, heads=2, feedforward=16, expert_embedding=expert_embedding
    )
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3, 4)), jnp.float32)
    return model, make_variables(model, logits), logits


def test_meta_model_sees_which_expert_speaks_only_with_expert_embeddings():
    for expert_embedding, sees in ((False, False), (True, True)):
        model, variables, logits = meta(expert_embedding)
        fused = model.apply(variables, logits)
        swapped = model.apply(variables, logits[:, ::-1])
        assert fused.shape == (5, 4)
        assert (np.abs(fused - swapped).max() > 1e-3) == sees


def test_meta_model_drops_out_in_training_only():
    model, variables, logits = meta(True)
    fused = model.apply(variables, logits)
    first = model.apply(variables, logits, True, rngs={"dropout": jax.random.key(1)})
    second = model.apply(variables, logits, True, rngs={"dropout": jax.random.key(2)})
    np.testing.assert_array_equal(fused, model.apply(variables, logits))
    assert np.abs(first - second).max() > 1e-3


def test_meta_model_mixes_experts_of_one_example_only():
    model, variables, logits = meta(True)
    changed = model.apply(variables, logits.at[0].add(1.0)) - model.apply(variables, logits)
    assert np.abs(changed[0]).max() > 1e-3
    np.testing.assert_allclose(changed[1:], 0.0, atol=1e-6)


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


class Mine(nn.Module):
    """A user's model, right but for what is changed."""

    wrong: str = ""

    @nn.compact
    def __call__(self, images, train=False, mask=None):
        x = images.reshape(len(images), 1, 1, -1)
        if self.wrong == "norm":
            x = nn.Dense(4)(x)
        else:
            x = BatchNorm(name="norm")(nn.Dense(4)(x), train, mask)
        features = x if self.wrong == "features" else x.reshape(len(images), -1)
        name = "last" if self.wrong == "head" else "head"
        logits = Dense(4 if self.wrong == "classes" else 3, name=name)(x.reshape(len(images), -1))
        if self.wrong == "shape":
            images.reshape(7)
        return (logits, features) if self.wrong == "tuple" else Outputs(logits, features)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("norm", "has no batch norm"),
        ("features", "gives features [2, 1, 1, 4] for 2 images, not [2, d]"),
        ("head", "has no last layer 'head' with kernel [4, 3] and bias [3]"),
        ("classes", "gives logits [2, 4] for 2 images of 3 classes"),
        ("tuple", "returns a tuple, not Outputs(logits, features)"),
        ("shape", "cannot be run: "),
    ],
)
def test_a_users_model_is_checked_before_anything_runs(wrong, message):
    check_classifier("mine", Mine(), (8, 8, 1), 3)
    with pytest.raises(UserError) as error:
        check_classifier("mine", Mine(wrong), (8, 8, 1), 3)
    assert str(error.value).startswith(f"model 'mine' {message}")
    assert str(error.value).endswith("; see docs/guide.md")


def test_a_model_without_the_arguments_of_one_is_an_answer(monkeypatch):
    monkeypatch.setitem(CLASSIFIERS, "mine", Mine)
    with pytest.raises(UserError, match=r"model 'mine' cannot be built: .*num_classes"):
        build_classifier("mine", 3, 8, (0.5,), (0.3,))
