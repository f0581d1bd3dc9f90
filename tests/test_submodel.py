"""Width sub-models: a part computes what the whole does with the rest off, averaged right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax import methods, rng
from mosaic_jax.data.clients import epoch_batch, to_float
from mosaic_jax.models import build_classifier, submodel
from mosaic_jax.stages import calibration, cohort, model_aggregation, prototypes, round
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.types import UserError

SCHEMES = ("static", "rolling", "random")
CAPACITIES = (1.0, 0.5, 0.3)


def assert_close(one, other, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other
    )


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def drawn(shapes, seed=0):
    """Random variables whose batch-norm statistics are no trivial ones."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        values = random.standard_normal(leaf.shape, np.float32)
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.asarray(1 + 0.3 * np.abs(values))
        return jnp.asarray(values * (0.2 if name == "kernel" else 0.5))

    return jax.tree_util.tree_map_with_path(draw, shapes)


class Cut:
    """A whole model, a sub-model of it, and the same embedded and widened."""

    def __init__(self, name, scheme, capacity=0.3):
        self.whole = build_classifier(name, 5, 6, (0.5,), (0.25,), "native")
        self.part = self.whole.clone(capacity=capacity)
        self.images = jnp.asarray(
            np.random.default_rng(1).uniform(-1, 1, (6, 16, 16, 1)), "float32"
        )
        shapes = jax.eval_shape(self.whole.init, jax.random.key(0), self.images)
        self.full, self.streams = drawn(shapes), self.whole.streams()
        self.capacity, self.scheme = capacity, scheme
        self.sets = submodel.index_sets(
            self.streams, self.full, capacity, scheme, 4, jax.random.key(7)
        )
        self.sub = submodel.extract(self.full, self.streams, self.sets)

    def widened(self, sub):
        embedded = submodel.embed(sub, self.streams, self.sets, self.full)
        return submodel.widened(embedded, 1 / self.capacity)


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
    assert_close(part[0][0], whole[0][0])
    assert_close(part[0][1][0], whole[0][1][0], 1e-3)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(part[1]))
    assert largest > 1e-2
    assert_close(part[1], whole[1], 2e-4 * max(1, largest))
    held = submodel.extract(
        {"params": cut.full["params"], "batch_stats": whole[0][1][1]}, cut.streams, cut.sets
    )
    assert_close(part[0][1][1], held["batch_stats"], 1e-4)


def test_a_widened_part_computes_the_same_in_eval_mode(cut):
    part = cut.part.apply(cut.sub, cut.images)
    whole = jax.jit(lambda sub: cut.whole.apply(cut.widened(sub), cut.images))(cut.sub)
    assert_close(part.logits, whole.logits, 1e-3)
    features = np.zeros(whole.features.shape, np.float32)
    features[:, np.asarray(cut.sets[cut.streams["head"][0]])] = part.features
    assert_close(whole.features, features, 1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_extract_undoes_embed_and_embed_leaves_zeros(scheme):
    cut = Cut("resnet8", scheme)
    embedded = submodel.embed(cut.sub, cut.streams, cut.sets, cut.full)
    assert_same(submodel.extract(embedded, cut.streams, cut.sets), cut.sub)
    masks = submodel.masks(cut.sets, cut.streams, cut.full)
    held = submodel.coverage(cut.full, cut.streams, masks)
    assert_same(embedded, jax.tree.map(jnp.multiply, cut.full, held))


def test_schemes_hold_the_channels_their_papers_say():
    cut = Cut("cnn", "static", 0.5)

    def sets(scheme, round, key=0):
        found = submodel.index_sets(cut.streams, cut.full, 0.5, scheme, round, jax.random.key(key))
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
            submodel.index_sets(cut.streams, cut.full, 0.1, "rolling", t, jax.random.key(0))[stream]
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
    assert submodel.budgets(10, rho, 4) == expected


@pytest.mark.parametrize("capacity", [1 / 16, 0.01])
def test_every_layer_keeps_a_channel(capacity):
    assert submodel.share(3, capacity) == 1


def test_a_classifier_without_streams_has_no_sub_models():
    class Plain:
        pass

    with pytest.raises(UserError, match="Plain has no sub-models"):
        submodel.streams_of(Plain())


# --- rounds of them ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SCHEMES)
def federation(request, make_federation):
    return make_federation(**{"submodel.capacities": CAPACITIES, "submodel.scheme": request.param})


@pytest.fixture(scope="module")
def by_hand(federation):
    """Each client's model of a round, trained alone, and what it holds, in whole shapes."""
    variables, results = federation.initial_variables(), []
    shared = {
        "data": federation.data,
        "learning_rate": 0.05,
        "key": federation.key("hand"),
        "first_step": 0,
        "round": 2,
    }
    streams = federation.model.streams()
    for i, capacity in enumerate(CAPACITIES):
        client = jax.tree.map(lambda leaf, i=i: leaf[i], federation.clients)
        scheme = federation.config.submodel.scheme
        sets = round.held_channels(federation, capacity, scheme, variables, 2, i)
        model = federation.model.clone(capacity=capacity)
        update = ClientUpdate(federation, 3, model=model)
        received = submodel.extract(variables, streams, sets)
        trained, _ = jax.jit(update)(shared | {"variables": received, "sets": sets}, client)
        embedded = submodel.embed(trained, streams, sets, variables)
        masks = submodel.masks(sets, streams, variables)
        held = submodel.coverage(variables, streams, masks)
        held = jax.tree.map(jnp.broadcast_to, held, jax.tree.map(jnp.shape, variables))
        results.append((embedded, held))
    return variables, shared, results


def mean_over_holders(results, weights, previous):
    def mean(before, *pairs):
        models, held = (np.asarray(p, np.float64) for p in (pairs[::2], pairs[1::2]))
        share = held * np.reshape(weights, (-1,) + (1,) * before.ndim)
        total = share.sum(0)
        found = (models * share).sum(0) / np.where(total > 0, total, 1)
        return np.where(total > 0, found, before)

    return jax.tree.map(mean, previous, *(tree for pair in results for tree in pair))


def test_a_round_averages_each_element_over_its_holders(federation, by_hand):
    variables, shared, results = by_hand
    run = round.round_function(federation, ClientUpdate(federation, 3), keep=True)
    weights = cohort.equal_weights(federation)
    members = cohort.cohort_of(federation, np.arange(3), weights)
    after = run({"global": federation.fresh(variables)}, shared, members)
    assert_close(after["carry"]["global"], mean_over_holders(results, [1, 1, 1], variables))
    for i, capacity in enumerate(CAPACITIES):
        kept = jax.tree.map(lambda leaf, i=i: leaf[i], after["clients"])
        assert_close(kept, submodel.widened(results[i][0], 1 / capacity))


def test_what_nobody_in_the_round_holds_stays(federation, by_hand):
    variables, shared, results = by_hand
    run = round.round_function(federation, ClientUpdate(federation, 3))
    weights = cohort.size_weights(federation)
    members = cohort.cohort_of(federation, np.array([1, 2]), weights)
    after = run({"global": federation.fresh(variables)}, shared, members)
    expected = mean_over_holders(results[1:], weights[1:, 0], variables)
    assert_close(after["carry"]["global"], expected)
    untouched = jax.tree.map(
        lambda a, b, c: (np.asarray(b) + np.asarray(c) == 0).any(),
        variables,
        *(held for _, held in results[1:]),
    )
    assert any(jax.tree.leaves(untouched))
    assert after["metrics"]["loss"].shape == (2,)


@pytest.mark.parametrize("mode", ["auto", "parameters", "logits"])
def test_experts_average_logits_where_there_are_sub_models(make_federation, mode):
    setting = {"model_aggregation.expert_mode": mode}
    narrow = make_federation(**{"submodel.capacities": CAPACITIES} | setting)
    assert model_aggregation.averages_parameters(narrow) == (mode == "parameters")
    whole = make_federation(**setting)
    assert model_aggregation.averages_parameters(whole) == (mode != "logits")


def test_prototypes_of_narrow_clients_are_those_of_whole_ones(make_federation):
    """They run the models they are sent whole, whatever they train."""
    found = []
    for capacities in ((), CAPACITIES):
        federation = make_federation(**{"submodel.capacities": capacities})
        variables = federation.initial_variables()
        several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), variables)
        state = {"global": variables, "experts": several}
        found.append(prototypes.collect(federation).block(state, None, 0)[0])
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert np.asarray(found[0]["features"]).any()


def test_experts_are_averaged_over_the_holders_of_class_and_element(federation, by_hand):
    """A class's holders where one of them holds the element, else everybody who does."""
    variables, shared, results = by_hand
    run = round.round_function(federation, ClientUpdate(federation, 3))
    rows, _ = model_aggregation.expert_weights(federation.counts)
    sizes = cohort.size_weights(federation)
    members = cohort.cohort_of(federation, np.arange(3), np.concatenate([sizes, rows.T], axis=1))
    after = run({"global": federation.fresh(variables)}, shared, members)
    general = mean_over_holders(results, sizes[:, 0], variables)
    for number, row in enumerate(rows):
        expert = jax.tree.map(lambda leaf, n=number: leaf[n], after["others"])
        assert_close(expert, mean_over_holders(results, row, general))


def test_a_narrow_client_does_a_fraction_of_the_operations(make_federation):
    """A quarter of the channels of every layer: a sixteenth, but for the first layer."""

    def operations(capacity):
        model = build_classifier("resnet8", 10, 64, (0.5,), (0.25,), "native").clone(
            capacity=capacity
        )
        images = jnp.zeros((8, 16, 16, 1))
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        return jax.jit(model.apply).lower(variables, images).compile().cost_analysis()["flops"]

    assert operations(0.25) < operations(1.0) / 14


# --- batch-norm statistics of the whole model --------------------------------------------------


def test_calibrated_statistics_are_those_of_the_clients_batches_under_the_whole_model(federation):
    """Weighted means and second moments, for each model by its own column of weights."""
    models = [drawn(federation.shapes(federation.model), seed) for seed in (1, 2)]
    weights = np.array([[1.0, 0.2], [2.0, 0.5], [1.0, 0.3]])
    members = cohort.cohort_of(federation, np.arange(3), weights)
    shared = {"data": federation.data, "key": federation.key("calibration")}
    others = jax.tree.map(lambda leaf: leaf[None], models[1])
    first, rest = calibration.calibrator(federation)(models[0], others, shared, members)
    found = jax.tree.map(lambda a, b: jnp.stack([a, b[0]]), first, rest)
    for number, model in enumerate(models):
        assert_same(jax.tree.map(lambda leaf, n=number: leaf[n], found["params"]), model["params"])
    for number, model in enumerate(models):
        shares, batches = weights[:, number] / weights[:, number].sum(), []
        for i in range(3):
            client = jax.tree.map(lambda leaf, i=i: leaf[i], federation.clients)
            key = rng.fold(shared["key"], i)
            positions, mask = epoch_batch(client, 0, key, 16)
            real = np.asarray(positions)[np.asarray(mask) > 0]
            images = to_float(federation.dataset.train_images[real])
            blank = {**model, "batch_stats": jax.tree.map(jnp.zeros_like, model["batch_stats"])}
            _, updated = federation.model.apply(blank, images, train=True, mutable=["batch_stats"])
            batches.append(jax.tree.map(lambda x: 10 * np.asarray(x), updated["batch_stats"]))
        for norm, of in jax.tree.map(lambda leaf, n=number: leaf[n], found["batch_stats"]).items():
            means = np.stack([batch[norm]["mean"] for batch in batches])
            squares = np.stack([batch[norm]["var"] for batch in batches]) + means**2
            mean = shares @ means
            np.testing.assert_allclose(of["mean"], mean, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(of["var"], shares @ squares - mean**2, rtol=1e-3, atol=1e-5)


def test_a_model_put_together_of_parts_classifies_with_calibrated_statistics(make_federation):
    settings = {
        "partition.kind": "iid",
        "submodel.capacities": (1.0, 0.5, 0.25),
        "model.width": 8,
        "data.image_size": 16,
        "local_update.rounds": 12,
        "local_update.steps": 5,
        "local_update.learning_rate": 0.2,
        "run.evaluate_every": 100,
    }
    federation = make_federation(**settings)
    stage = methods.stages("heterofl", federation)[0]
    state = {"global": federation.initial_variables()}
    carry = stage.start(state)
    for index in range(stage.blocks):
        carry, _ = stage.block(state, carry, index)
    calibrated = stage.evaluate(stage.finish(state, carry))["test_accuracy"]
    assert calibrated > 0.4  # of ten classes
