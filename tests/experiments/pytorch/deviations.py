"""How far the PyTorch baseline may be from this package, and the weights both are given."""

import dataclasses

import jax
import numpy as np

TOLERANCE = 1e-4
MOVED = 1e-3
"""Of trained weights."""
ABSOLUTE = 1e-7
"""Gradients that are zero but for rounding, such as that of an attention key's bias."""
SETTINGS = {
    "local_update.batch_size": 48,
    "local_update.momentum": 0.5,
    "local_update.weight_decay": 0.05,  # enough to be seen in a few steps
    "meta_model.dropout": 0.0,  # the two libraries draw different masks
    "generator_optimization.frozen_every": 2,
    "generator_optimization.entropy_weight": 0.3,
    "knowledge_distillation.class_prior": True,
    "knowledge_distillation.temperature": 1.5,
}
DEVIATIONS: dict[str, float] = {}
"""The largest of each test and quantity, printed at the end with `pytest -s`."""
FRESH: dict = {}


def noisy(federation):
    """Training images of noise.

    In an even area all pixels have the same activation; where it is zero but for rounding, the
    gradients of two libraries differ by the whole area.
    """
    images = federation.data.images
    noise = np.random.default_rng(2).integers(0, 256, images.shape, np.uint8)
    data = federation.layout.put_replicated(federation.data.replace(images=noise))
    return dataclasses.replace(federation, data=data)


def fresh(federation):
    """The federation's first variables, compiled once for each architecture."""
    key = federation.classifier.module, federation.dataset.image_shape
    if key not in FRESH:
        FRESH[key] = jax.tree.map(np.asarray, federation.initial_variables())
    return FRESH[key]


def perturbed(federation, seed=0):
    """Variables of a model that has seen something: no scale, bias or statistic is 0 or 1."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = generator.uniform(-1, 1, leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "var":
            return 0.15 + 0.1 * noise
        return leaf + noise * (0.3 if name == "scale" else 0.1 if leaf.ndim == 1 else 0.02)

    variables = fresh(federation)
    return jax.tree_util.tree_map_with_path(draw, variables)
