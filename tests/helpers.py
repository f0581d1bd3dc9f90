"""Functions that tests of several folders use: tiny federations, runs of them, comparisons."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import settings
from mosaic_jax.federation import clients_of, load_federation, partition_seed
from mosaic_jax.run import experiment

ROOT = Path(__file__).resolve().parents[1]
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(ROOT / ".pytest_cache" / "jax")
CACHE_SETTINGS = {
    "jax_compilation_cache_dir": CACHE,
    "jax_persistent_cache_min_compile_time_secs": 0,
}
TINY = {
    "data.name": "synthetic",
    "data.image_size": 16,
    "data.train_images": 200,
    "data.test_images": 60,
    "partition.clients": 3,
    "partition.alpha": 0.5,
    "partition.minimum": 4,
    "model.name": "cnn",
    "model.width": 4,
    "local_update.rounds": 2,
    "local_update.steps": 3,
    "local_update.batch_size": 16,
    "local_update.learning_rate": 0.05,
    "model_aggregation.steps": 3,
    "generator_optimization.steps": 4,
    "generator_optimization.block_steps": 2,
    "generator_optimization.batch_size": 8,
    "generator_optimization.latent": 8,
    "generator_optimization.width": 4,
    "generator_optimization.adversary_width": 4,
    "generator_optimization.unusable": "use",
    "prototypes.per_class": 3,
    "prototypes.images_per_class": 12,
    "prototypes.iterations": 5,
    "meta_model.steps": 4,
    "meta_model.batch_size": 16,
    "meta_model.feedforward": 16,
    "knowledge_distillation.steps": 4,
    "knowledge_distillation.block_steps": 2,
    "knowledge_distillation.images_per_generator": 4,
    "fine_tuning.rounds": 1,
}
ROUNDS = {"method": "fedavg", "run.checkpoint_every": 1, "local_update.rounds": 5}
"""Settings of a run of rounds alone, where what is tested is the same for every stage."""

BLOCKS = {
    "run.checkpoint_every": 1,
    "local_update.rounds": 3,
    "generator_optimization.steps": 4,
    "generator_optimization.block_steps": 2,
    "knowledge_distillation.steps": 4,
    "knowledge_distillation.block_steps": 2,
    "knowledge_distillation.images_per_generator": 4,
    "fine_tuning.rounds": 2,
}
"""Settings with which the stages have several blocks, each with its checkpoint."""


def tiny_federation(**overrides):
    """Return a federation of 3 clients and 200 images.

    Args:
      overrides: `{"section.setting": value}`, settings that differ from `TINY`.
    """
    config = settings.from_config_dict(settings.make("", TINY | overrides, {}).to_dict())
    return load_federation(config)


def federation_of(parts, **overrides):
    """Return a tiny federation whose clients hold so many images of each class.

    Args:
      parts: images, `[clients, classes]`.
      overrides: as of `tiny_federation`.
    """
    federation = tiny_federation(**overrides)
    labels = federation.dataset.train_labels
    ends = np.cumsum(parts, axis=0)
    indices = [
        np.concatenate(
            [
                np.flatnonzero(labels == c)[ends[i, c] - parts[i, c] : ends[i, c]]
                for c in range(parts.shape[1])
            ]
        )
        for i in range(len(parts))
    ]
    federation = with_indices(federation, indices)
    np.testing.assert_array_equal(federation.clients.class_counts, parts)
    return federation


def with_indices(federation, indices):
    """Return a federation whose clients hold these images."""
    seed, validation = partition_seed(federation.config), federation.clients.validation
    clients = clients_of(federation.dataset, indices, validation, seed, federation.layout)
    return dataclasses.replace(federation, clients=clients)


class Killed(Exception):
    """Stands for a kill: raised after a block was saved, from outside the run."""


def run(federation, workdir, kill_after=None):
    """Run a method and return its last state and the blocks it ran, (stage, block) each.

    Args:
      kill_after: blocks after which the run is killed.

    Raises:
      Killed: after that many blocks.
    """
    blocks = []

    def watch(stage, done, seconds, figures):
        blocks.append((stage.name, done))
        if len(blocks) == kill_after:
            raise Killed

    return experiment.run(federation, workdir, watch), blocks


def lines(workdir, with_seconds=False):
    """Return the lines of `metrics.jsonl`, without the time they took unless it is asked for."""
    read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "seconds"} for line in read]
    return read if with_seconds else kept


def member(tree, i):
    """Return one member of stacked arrays: `leaf[i]` of every leaf."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


def assert_same(one, other):
    """Fail unless all arrays of two trees are exactly equal."""
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(one, other, *, rtol=1e-7, atol=0.0):
    """Fail unless all arrays of two trees agree within `atol + rtol * |other|`."""

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)

    jax.tree.map(compare, one, other)


def differ(one, other, by=0.0):
    """Return whether any number of two trees differs by more than `by`; NaN fails."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    apart = [np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)) for a, b in pairs]
    assert not any(np.isnan(each).any() for each in apart)
    return any((each > by).any() for each in apart)


def random_variables(shapes, seed=0):
    """Return variables of these shapes whose batch-norm statistics are no trivial ones."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        values = random.standard_normal(leaf.shape, np.float32)
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.asarray(1 + 0.3 * np.abs(values))
        return jnp.asarray(values * (0.2 if name == "kernel" else 0.5))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def tiny_config(level):
    """Return the `ConfigDict` of `TINY` at a level of heterogeneity."""
    return settings.make(level, TINY, {})
