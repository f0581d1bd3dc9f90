"""Judge generated images by a network that no client trained."""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax.data.batches import to_float
from mosaic_jax.federation import Federation
from mosaic_jax.models import CNN
from mosaic_jax.stages.generator_ensemble import sampler
from mosaic_jax.types import Array, Outputs, PyTree, Variables

IMAGES = 1000
"""Images of each generator that are judged, and at most as many real ones of its client."""

CHUNK = 250
"""Images that the judge is shown at a time."""

TAUGHT_STEPS, TAUGHT_BATCH = 300, 128


class Judge:
    """A classifier's features and answers, on images of the federation's data set.

    Args:
      federation: clients, data and the judge's classifier.
      variables: of the judge.
    """

    def __init__(self, federation: Federation, variables: Variables):
        self.federation = federation
        self.look = jax.jit(partial(federation.classifier.apply_eval, variables))

    def outputs(self, images: np.ndarray) -> Outputs:
        """Return features and logits of uint8 images [n, h, w, c], as NumPy arrays."""
        starts = range(0, len(images), CHUNK)
        parts = [
            self.look(to_float(jnp.asarray(images[start : start + CHUNK]))) for start in starts
        ]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def clients(self, generated: np.ndarray) -> dict[str, np.ndarray]:
        """Judge every client's generator, of uint8 images [clients, n, h, w, c].

        Returns:
          "frechet" [clients], the distance from the client's images, and "overlap" [clients], how
          much of the class shares that the judge sees are the client's: 1 if they are equal.
        """
        clients, dataset = self.federation.clients, self.federation.dataset
        found: dict[str, list[float]] = {"frechet": [], "overlap": []}
        for client, images in enumerate(generated):
            own = np.random.default_rng(client).permutation(clients.indices[client])[:IMAGES]
            seen, real = self.outputs(images), self.outputs(dataset.train_images[own])
            found["frechet"].append(frechet_distance(seen.features, real.features))
            counts = clients.class_counts[client]
            predicted = np.bincount(seen.logits.argmax(-1), minlength=dataset.num_classes)
            shares = predicted / predicted.sum(), counts / counts.sum()
            found["overlap"].append(float(np.minimum(*shares).sum()))
        return {name: np.array(values) for name, values in found.items()}


def frechet_distance(a: np.ndarray | Array, b: np.ndarray | Array) -> float:
    """Return the Frechet distance of two sets of features [n, d] (Heusel et al. 2017).

    It is that of two normal distributions: |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)).
    """
    covariances = [np.atleast_2d(np.cov(each, rowvar=False)) for each in (a, b)]
    # The roots of the product's eigenvalues, also where few images make it singular.
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1]).real
    roots = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    traces = sum(np.trace(each) for each in covariances) - 2 * roots
    return float(np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + traces)


def draw_images(federation: Federation, generators: Variables) -> np.ndarray:
    """Draw `IMAGES` images of every client's generator, uint8 [clients, IMAGES, h, w, c]."""
    ids = jnp.arange(federation.num_clients)
    images = jax.jit(sampler(federation, IMAGES))(generators, federation.key("judged"), ids)
    return np.rint((np.asarray(images) + 1) * 127.5).astype(np.uint8)


def taught(judge: Judge, generated: np.ndarray) -> float:
    """Return the held-out accuracy, in percent, of a small network taught on these images only.

    It learns the judge's answers to images of the generators, as many of each as its client holds,
    so it measures the images and not a teacher.

    Args:
      judge: gives the answers.
      generated: uint8 [clients, n, h, w, c].
    """
    federation, clients = judge.federation, judge.federation.clients
    counts = np.maximum(1, np.rint(clients.sizes / clients.sizes.max() * generated.shape[1]))
    parts = zip(generated, counts.astype(int), strict=True)
    pool = np.concatenate([images[:count] for images, count in parts])
    dataset, held_out = federation.dataset, clients.validation
    student = CNN(dataset.num_classes, 16, dataset.mean, dataset.std)
    variables = learn(student, pool, jax.nn.softmax(judge.outputs(pool).logits))

    @jax.jit
    def predict(images: Array) -> Array:
        return cast(Outputs, student.apply(variables, to_float(images))).logits.argmax(-1)

    images, labels = dataset.train_images[held_out], dataset.train_labels[held_out]
    starts = range(0, len(images), CHUNK)
    found = np.concatenate([predict(images[start : start + CHUNK]) for start in starts])
    return 100 * float((found == labels).mean())


def learn(student: CNN, pool: np.ndarray, answers: Array) -> Variables:
    """Train a network from its first weights on uint8 images [n, h, w, c] and soft labels."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, TAUGHT_STEPS))

    def loss(params: PyTree, statistics: PyTree, images: Array, target: Array) -> PyTree:
        variables = {"params": params, "batch_stats": statistics}
        outputs, updated = student.apply(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy(outputs.logits, target).mean(), updated["batch_stats"]

    @jax.jit
    def step(variables: PyTree, state: PyTree, images: Array, target: Array) -> PyTree:
        gradient, statistics = jax.grad(loss, has_aux=True)(*variables, to_float(images), target)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(variables[0], updates), statistics), state

    first = student.init(jax.random.key(0), to_float(jnp.asarray(pool[:2])))
    variables = first["params"], first["batch_stats"]
    state, random = optimizer.init(variables[0]), np.random.default_rng(0)
    for _ in range(TAUGHT_STEPS):
        chosen = random.integers(len(pool), size=TAUGHT_BATCH)
        variables, state = step(variables, state, jnp.asarray(pool[chosen]), answers[chosen])
    return {"params": variables[0], "batch_stats": variables[1]}
