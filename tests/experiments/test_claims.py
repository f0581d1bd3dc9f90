"""The experiments on single claims of the paper measure what they say."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import figure2, perceptrons, theorem_i1
from experiments.claims.theorem_i1 import CASES, FITTED, OPTIMUM, UNIFORM
from mosaic_jax.models import MetaModel

EQUAL = [name for name in CASES if name.startswith(("equal", "neighbours"))]


class LinearFusion(nn.Module):
    """In the meta model's place: that one takes ten seconds to compile."""

    classes: int

    @nn.compact
    def __call__(self, expert_logits, train=False):
        return nn.Dense(self.classes)(expert_logits.reshape(len(expert_logits), -1))


@pytest.fixture
def linear_fusion(monkeypatch):
    monkeypatch.setattr(perceptrons, "meta_model", LinearFusion)


@pytest.mark.parametrize("name", CASES)
def test_uniform_weights_are_the_optimum_where_rows_of_the_covariance_have_one_sum(name):
    exact, sums = theorem_i1.closed_forms(CASES[name]), CASES[name].sum(axis=1)
    assert np.allclose(sums, sums[0]) == (name in EQUAL)
    if name in EQUAL:
        assert exact[OPTIMUM] == pytest.approx(exact[UNIFORM], rel=1e-12)
        assert exact[FITTED.format(20)] > exact[FITTED.format(100)] > exact[UNIFORM]
    else:
        assert exact[OPTIMUM] < 0.8 * exact[UNIFORM]


@pytest.mark.parametrize("seed", range(5))
def test_no_weights_of_sum_one_vary_less_than_the_optimum(seed):
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(4, 4))
    covariance = root @ root.T
    best = theorem_i1.optimal_weights(covariance)
    others = generator.normal(size=(1000, 4))
    others /= others.sum(axis=1, keepdims=True)
    assert best.sum() == pytest.approx(1)
    least = theorem_i1.variance(best, covariance)
    assert (theorem_i1.variance(others, covariance) >= least * (1 - 1e-9)).all()
    assert least < theorem_i1.variance(np.full(4, 0.25), covariance)


def test_duplicates_of_an_expert_change_no_optimum():
    covariance = np.diag([1.0, 2.0])[[0, 0, 1]][:, [0, 0, 1]]
    weights = theorem_i1.optimal_weights(covariance)
    np.testing.assert_allclose(weights, [1 / 3, 1 / 3, 1 / 3], rtol=1e-12)
    assert theorem_i1.variance(weights, covariance) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["equal, independent", "variances 0.2 to 2, correlated by 0.5"])
def test_draws_agree_with_the_closed_forms(name):
    draws, generator = 8000, np.random.default_rng(0)
    exact = theorem_i1.closed_forms(CASES[name])
    drawn = theorem_i1.monte_carlo(CASES[name], draws, generator)
    assert list(exact) == list(drawn)
    for rule, value in exact.items():  # four standard errors of a variance, tails a little heavy
        assert drawn[rule] == pytest.approx(value, rel=5 * np.sqrt(2 / draws)), rule


def test_variance_and_squared_error_of_predictions():
    logits = np.random.default_rng(0).normal(size=(6, 5, 3)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1])
    found = theorem_i1.measures(logits, labels)
    probabilities = np.asarray(jax.nn.softmax(logits))
    bias = np.square(probabilities.mean(axis=0) - np.eye(3)[labels]).sum(axis=-1).mean()
    assert found["error"] == pytest.approx(bias + found["probabilities"] * 5 / 6, rel=1e-5)
    same = theorem_i1.measures(np.repeat(logits[:1], 6, axis=0), labels)
    assert same["logits"] == pytest.approx(0, abs=1e-10)
    assert same["accuracy"] in {0, 0.2, 0.4, 0.6, 0.8, 1}


def test_the_digits_experts_joined(linear_fusion):
    words = "--clients 5 --seeds 3 --classifier 60 --meta 60 --prototypes 3"
    arguments = theorem_i1.parser().parse_args(words.split())
    cell = theorem_i1.one_partition(arguments, 0)
    assert cell[OPTIMUM]["logits"] <= cell[UNIFORM]["logits"]
    accuracies = [cell[rule]["accuracy"] for rule in (UNIFORM, "meta model")]
    assert accuracies[0] < accuracies[1] < cell["one classifier of all images"]["accuracy"]
    assert len({tuple(row.values()) for row in cell.values()}) == len(cell)
    head, _, *rows = theorem_i1.digits_table([cell, cell]).splitlines()
    assert head.count("|") == rows[0].count("|")
    assert rows[0].split(" | ")[2] == "1.00 ± 0.00"
    assert len(rows) == len(cell)


def test_prototypes_are_means_of_one_clients_points_of_one_class():
    labels, owners = np.array([0, 0, 0, 0, 1, 1, 0]), np.array([0, 0, 0, 0, 0, 0, 1])
    x = jnp.array([[0.0], [0.1], [5.0], [5.1], [9.0], [9.2], [3.0]])
    parts = [np.arange(6), np.array([6])]
    found = jax.tree.map(np.asarray, perceptrons.prototypes(x, labels, parts, 2))
    shares = found["shares"][found["index"][: found["size"]]]
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-6)
    means = sorted((shares @ x[:, 0]).tolist())
    np.testing.assert_allclose(means, [0.05, 3.0, 5.05, 9.0, 9.2], rtol=1e-5)
    for row, label in zip(found["shares"], found["labels"], strict=True):
        assert set(labels[row > 0]) <= {label}
        assert len(set(owners[row > 0])) <= 1


def test_experts_of_classes_with_one_holder_are_that_client():
    logits = jnp.arange(2 * 3 * 4, dtype=jnp.float32).reshape(2, 3, 4)
    experts = perceptrons.class_experts(np.array([[5, 0, 1, 0], [0, 7, 3, 0]]))(logits)
    np.testing.assert_array_equal(experts[:, 0], logits[0])
    np.testing.assert_array_equal(experts[:, 1], logits[1])
    np.testing.assert_allclose(experts[:, 2], logits[0] / 4 + 3 * logits[1] / 4, rtol=1e-6)


def fusion_examples():
    """Logits [60, experts, classes] of which only the class's expert knows, and their labels."""
    labels = np.tile(np.arange(3), 20)
    tokens = np.random.default_rng(0).normal(size=(60, 3, 3)).astype(np.float32)
    tokens[np.arange(60), labels, labels] += 8
    index, size = jnp.arange(60), jnp.int32(60)
    return {"labels": jnp.asarray(labels), "index": index, "size": size}, jnp.asarray(tokens)


def test_fusion_learns_whom_to_ask(linear_fusion):
    examples, tokens = fusion_examples()
    fusion = perceptrons.fit_meta(examples, tokens, jax.random.key(0), 600)
    answers = perceptrons.meta_model(3).apply(fusion, tokens).argmax(axis=-1)
    assert (answers == examples["labels"]).mean() > 0.9
    weights = theorem_i1.fit_convex(examples, tokens, 20)
    assert weights.sum() == pytest.approx(1, rel=1e-5)
    assert (weights >= 0).all()


def test_fusion_is_the_projects_meta_model():
    examples, tokens = fusion_examples()
    fitted = jax.eval_shape(lambda: perceptrons.fit_meta(examples, tokens, jax.random.key(0), 1))
    assert isinstance(perceptrons.meta_model(3), MetaModel)
    assert fitted["params"]["expert_embedding"].shape == (3, 12)


def test_what_the_toys_clients_hold():
    apart = figure2.class_counts(400, 0.0)
    assert (apart.sum(axis=1) == 400).all()
    assert ((apart > 0).sum(axis=1) == 2).all()
    assert (figure2.class_counts(400, 1.0) == 50).all()
    mixed = figure2.class_counts(400, 0.1)
    assert mixed.min() == 5
    assert mixed[0].tolist() == [185, 185, 5, 5, 5, 5, 5, 5]


def test_coverage_knows_real_points_from_others():
    real = np.asarray(figure2.real_points(figure2.TEST_LABELS, jax.random.key(0)))
    modes, close = figure2.coverage(real)
    assert modes == figure2.CLASSES
    assert close == pytest.approx(100 * (1 - np.exp(-4.5)), abs=1.0)
    one_mode = np.asarray(figure2.real_points(0 * figure2.TEST_LABELS, jax.random.key(0)))
    assert figure2.coverage(one_mode)[0] == 1
    assert figure2.coverage(0 * real) == (0, 0.0)


def test_equal_generators_have_themselves_as_average():
    one = figure2.GENERATOR.init(jax.random.key(0), jnp.zeros((1, figure2.LATENT)))
    copies = (2, figure2.CLIENTS + 1)
    equal = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*copies, *leaf.shape)), one)
    first, *others = jax.jit(figure2.drawn_points)(equal, jax.random.key(1))
    assert len(others) == 3
    for points in others:
        np.testing.assert_allclose(points, first, atol=1e-6)


def test_the_toy_from_command_line_to_figure(tmp_path, linear_fusion):
    words = "--seeds 0 1 --mixes 0.1 --points 40 --generator 3 --classifier 200 --meta 3"
    out = tmp_path / "figures" / "toy.png"
    arguments = figure2.parser().parse_args(
        [*words.split(), "--prototypes", "2", "--out", str(out)]
    )
    text = figure2.run(arguments)
    assert out.stat().st_size > 1000
    assert text.startswith("mix 0.1\n")
    rows = {row.split(" | ")[0]: row for row in text.splitlines() if row.startswith("| ")}
    assert rows["| the real distribution"].split(" | ")[1] == "8.0 ± 0.0"
    pooled = float(rows["| one classifier of all points"].split(" | ")[1].split(" ")[0])
    assert pooled > 90


def test_the_toys_figure_and_tables_say_what_was_found(tmp_path):
    real = np.asarray(figure2.real_points(figure2.TEST_LABELS, jax.random.key(0)))
    inverted = figure2.CLASSES - 1 - figure2.TEST_LABELS
    answers = [
        np.append(each, np.zeros(figure2.GRID**2, int)) for each in (figure2.TEST_LABELS, inverted)
    ]
    found = {
        "drawn": [real[None], *[np.zeros((1, 9, 2))] * 4],
        "answers": [answers[0][None], *[answers[1][None]] * 3],
    }
    lines = figure2.tables(found).splitlines()
    assert lines[2].startswith("| the real distribution | 8.0 ± 0.0 | 9")
    assert lines[3] == "| ensemble of the clients' generators | 0.0 ± 0.0 | 0.0 ± 0.0 |"
    assert lines[-4] == "| uniform ensemble of the clients | 100.0 ± 0.0 |"
    assert lines[-1] == "| one classifier of all points | 0.0 ± 0.0 |"
    figure2.figure(found, tmp_path / "toy.pdf")
    assert (tmp_path / "toy.pdf").read_bytes().startswith(b"%PDF")
