"""Width sub-models: a part computes what the whole does with the rest off."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.models import build_classifier, submodel
from mosaic_jax.types import UserError
from tests.helpers import assert_close, assert_same, random_variables

SCHEMES = ("static", "rolling", "random")


class Cut:
    """A whole model, a sub-model of it, and the same embedded and widened."""

    def __init__(self, name, scheme, capacity=0.3):
        self.whole = build_classifier(name, 5, 6, (0.5,), (0.25,), conv_impl="native")
        self.part = self.whole.clone(capacity=capacity)
        self.images = jnp.asarray(
            np.random.default_rng(1).uniform(-1, 1, (6, 16, 16, 1)), "float32"
        )
        shapes = jax.eval_shape(self.whole.init, jax.random.key(0), self.images)
        self.full, self.streams = random_variables(shapes), self.whole.channel_groups()
        self.capacity, self.scheme = capacity, scheme
        self.sets = submodel.channel_indices(
            self.streams,
            self.full,
            capacity=capacity,
            scheme=scheme,
            round_index=4,
            key=jax.random.key(7),
        )
        self.sub = submodel.extract(self.full, self.streams, self.sets)

    def widened(self, sub):
        embedded = submodel.embed(sub, self.streams, self.sets, self.full)
        return submodel.as_full_model(embedded, 1 / self.capacity)


@pytest.fixture(scope="module", params=["cnn", "resnet8", "resnet50"])
def cut(request):
    return Cut(request.param, "random")


def test_a_part_has_the_shapes_of_its_own_model(cut):
    shapes = jax.eval_shape(cut.part.init, jax.random.key(0), cut.images)
    assert jax.tree.map(jnp.shape, cut.sub) == jax.tree.map(jnp.shape, shapes)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (cut.sub, cut.full)]
    assert sizes[0] < 0.2 * sizes[1]


def test_a_part_is_the_whole_with_the_rest_off_in_value_gradient_and_statistics(cut):
    labels = jnp.arange(6) % 5

    def loss(params, statistics, model, change):
        variables = change({"params": params, "batch_stats": statistics})
        outputs, updated = model.apply(variables, cut.images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels)
        return losses.mean(), (outputs.logits, updated["batch_stats"])

    def both(params, statistics):
        run = jax.value_and_grad(loss, has_aux=True)
        part = run(params, statistics, cut.part, lambda sub: sub)
        whole = run(params, statistics, cut.whole, cut.widened)
        return part, whole

    part, whole = jax.jit(both)(cut.sub["params"], cut.sub["batch_stats"])
    assert_close(part[0][0], whole[0][0], rtol=2e-5, atol=2e-5)
    assert_close(part[0][1][0], whole[0][1][0], rtol=1e-3, atol=1e-3)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(part[1]))
    assert largest > 1e-2
    tolerance = 2e-3 * max(1, largest)  # a unit near zero may fall on either side of it
    assert_close(part[1], whole[1], rtol=tolerance, atol=tolerance)
    held = submodel.extract(
        {"params": cut.full["params"], "batch_stats": whole[0][1][1]}, cut.streams, cut.sets
    )
    assert_close(part[0][1][1], held["batch_stats"], rtol=1e-4, atol=1e-4)


def test_a_widened_part_computes_the_same_in_eval_mode(cut):
    part = cut.part.apply(cut.sub, cut.images)
    whole = jax.jit(lambda sub: cut.whole.apply(cut.widened(sub), cut.images))(cut.sub)
    assert_close(part.logits, whole.logits, rtol=1e-3, atol=1e-3)
    features = np.zeros(whole.features.shape, np.float32)
    features[:, np.asarray(cut.sets[cut.streams["head"][0]])] = part.features
    assert_close(whole.features, features, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_extract_undoes_embed_and_embed_leaves_zeros(scheme):
    cut = Cut("resnet8", scheme)
    embedded = submodel.embed(cut.sub, cut.streams, cut.sets, cut.full)
    assert_same(submodel.extract(embedded, cut.streams, cut.sets), cut.sub)
    masks = submodel.channel_masks(cut.sets, cut.streams, cut.full)
    held = submodel.element_mask(cut.full, cut.streams, masks)
    assert_same(embedded, jax.tree.map(jnp.multiply, cut.full, held))


def test_schemes_hold_the_channels_their_papers_say():
    cut = Cut("cnn", "static", 0.5)

    def sets(scheme, round, key=0):
        found = submodel.channel_indices(
            cut.streams,
            cut.full,
            capacity=0.5,
            scheme=scheme,
            round_index=round,
            key=jax.random.key(key),
        )
        return {stream: np.asarray(held).tolist() for stream, held in found.items()}

    assert sets("static", 9)["conv1"] == [0, 1, 2]
    assert sets("rolling", 0)["conv1"] == [0, 1, 2]
    assert sets("rolling", 4)["conv1"] == [4, 5, 0]
    assert sets("random", 0, 1) != sets("random", 0, 2)
    for held in sets("random", 0, 3).values():
        assert len(set(held)) == len(held)


def test_rolling_trains_every_channel_within_as_many_rounds_as_there_are():
    cut = Cut("resnet8", "rolling", 0.1)
    for stream, channels in submodel.widths(cut.streams, cut.full).items():
        held = [
            submodel.channel_indices(
                cut.streams,
                cut.full,
                capacity=0.1,
                scheme="rolling",
                round_index=t,
                key=jax.random.key(0),
            )[stream]
            for t in range(channels)
        ]
        assert set(np.concatenate(held).tolist()) == set(range(channels))


@pytest.mark.parametrize(
    ("rho", "expected"),
    [
        (0, [1.0] * 10),
        (5, [1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 16, 1 / 16, 1 / 16]),
        (10, [1 / 2, 1 / 4, 1 / 8, *[1 / 16] * 7]),
        (20, [1 / 4, *[1 / 16] * 9]),
    ],
)
def test_budgets_are_those_of_the_paper(rho, expected):
    assert submodel.capacity_schedule(10, rho, 4) == expected


@pytest.mark.parametrize("capacity", [1 / 16, 0.01])
def test_every_layer_keeps_a_channel(capacity):
    assert submodel.num_channels(3, capacity) == 1


def test_a_classifier_without_streams_has_no_sub_models():
    class Plain:
        pass

    with pytest.raises(UserError, match="Plain has no sub-models"):
        submodel.channel_groups_of(Plain())


def test_a_narrow_client_does_a_fraction_of_the_operations(make_federation):
    """A quarter of the channels of every layer: a sixteenth, but for the first layer."""

    def operations(capacity):
        model = build_classifier("resnet8", 10, 64, (0.5,), (0.25,), conv_impl="native").clone(
            capacity=capacity
        )
        images = jnp.zeros((8, 16, 16, 1))
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        return jax.jit(model.apply).lower(variables, images).compile().cost_analysis()["flops"]

    assert operations(0.25) < operations(1.0) / 14
