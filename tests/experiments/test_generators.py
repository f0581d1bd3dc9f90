"""The judgement of generated images, and the table of recipes."""

import numpy as np
import pytest

from experiments.accuracy import generators
from experiments.accuracy.image_quality import Judge, frechet_distance, taught
from mosaic_jax.run.load_run import load_run
from mosaic_jax.sweep import launch
from tests.helpers import lines, tiny_config

RANDOM = np.random.default_rng(0)


def test_the_frechet_distance_of_normal_distributions_is_the_closed_form():
    features = RANDOM.standard_normal((400, 3))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + np.array([3, 0, 4])) == pytest.approx(25, abs=1e-6)
    # Stretched about the mean by s, every axis adds (s - 1)^2 of its variance.
    centred = features - features.mean(axis=0)
    expected = 4 * np.trace(np.cov(centred, rowvar=False))
    assert frechet_distance(centred, 3 * centred) == pytest.approx(expected, rel=1e-6)


def test_a_judge_finds_the_clients_own_images_nearest(make_federation):
    """Noise lies farther from them, and shares are those that the judge sees."""
    federation = make_federation()
    judge = Judge(federation, federation.initial_variables())
    images, clients = federation.dataset.train_images, federation.clients
    own = [np.resize(images[part], (60, *images.shape[1:])) for part in clients.indices]
    noise = RANDOM.integers(256, size=np.shape(own)).astype(np.uint8)
    found, other = judge.clients(np.stack(own)), judge.clients(noise)
    assert (found["frechet"] < other["frechet"]).all()
    for client, part in enumerate(clients.indices):
        seen = judge.outputs(images[part]).logits.argmax(-1)
        shares = np.bincount(np.resize(seen, 60), minlength=10) / 60
        counts = clients.class_counts[client] / clients.class_counts[client].sum()
        assert found["overlap"][client] == pytest.approx(np.minimum(shares, counts).sum())


def test_a_network_learns_from_images_what_the_judge_says_of_them(make_federation):
    """A judge that is right about the real images teaches by them, not by noise."""
    federation = make_federation(**{"data.validation_fraction": 0.2, "data.train_images": 600})
    dataset, clients = federation.dataset, federation.clients

    class Truth:
        """Answers to the clients' images by their labels."""

        def __init__(self, labels):
            self.federation, self.labels = federation, labels

        def outputs(self, images):
            assert len(images) == len(self.labels)
            return type("Answers", (), {"logits": 9.0 * np.eye(10)[self.labels]})

    counts = np.rint(clients.sizes / clients.sizes.max() * 150).astype(int)
    chosen = [np.resize(part, 150) for part in clients.indices]
    labels = np.concatenate(
        [dataset.train_labels[part[:count]] for part, count in zip(chosen, counts, strict=True)]
    )
    real = np.stack([dataset.train_images[part] for part in chosen])
    noise = RANDOM.integers(256, size=real.shape).astype(np.uint8)
    assert taught(Truth(labels), real) > 2 * taught(Truth(labels), noise)


def test_recipes_of_a_cell_share_the_stages_before_and_are_judged(tmp_path, capsys):
    short = {"fine_tuning.rounds": 1, "local_update.rounds": 2}
    names = ["dcgan", "projected"]
    rows = generators.run_cell(tiny_config, tmp_path, "", 0, names, short)
    for name, row in zip(names, rows, strict=True):
        assert set(row) == set(generators.COLUMNS) - ({"own view"} if name == "dcgan" else set())
        validation = lines(tmp_path / f"-0-{name}")[-1]["validation_accuracy"]
        assert row["fine-tuned"] == pytest.approx(100 * validation)
        assert row["core-seconds"] > 0
    first, second = (load_run(tmp_path / f"-0-{name}").state for name in names)
    np.testing.assert_array_equal(
        first["global"]["params"]["head"]["bias"], second["global"]["params"]["head"]["bias"]
    )
    text = (tmp_path / "clients.csv").read_text().splitlines()
    assert text[0] == "level,seed,recipe,client,frechet,overlap"
    assert len(text) == 1 + 2 * 3
    assert generators.table("", names, [rows]).splitlines()[2].split("|")[6].strip() == "-"


def test_every_recipe_is_a_config_of_its_own():
    made = [launch.configure(tiny_config, "", 0, own) for own in generators.RECIPES.values()]
    assert all(a != b for i, a in enumerate(made) for b in made[:i])
    assert len({generators.slug(name) for name in generators.RECIPES}) == len(made)
