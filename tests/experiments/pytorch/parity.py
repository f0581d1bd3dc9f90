"""Comparisons of the PyTorch baseline with this package: same weights, batches and noise.

Each test gives one stage of `mosaic_jax` and its counterpart in
`experiments.speed.pytorch_baseline` the same weights, images and noise. The deviation of a loss or
gradient is the largest difference in a tensor over its largest entry; that of trained weights is
the sum of all differences over the sum of all ways the training took them. (A ReLU's input that is
zero but for rounding, or a gradient that Adam makes a whole step of, moves single weights.)
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the PyTorch baseline needs the extra `torch`")

from experiments.speed.pytorch_baseline import classifiers, weights  # noqa: E402
from mosaic_jax import rng  # noqa: E402
from mosaic_jax.data.batches import epoch_batch, to_float  # noqa: E402
from mosaic_jax.stages.local_update import RoundInputs  # noqa: E402
from tests.experiments.pytorch.deviations import DEVIATIONS, MOVED  # noqa: E402

CPU = torch.device("cpu")


def compare(record, quantity, module, found, variables):
    """Every tensor of `found`, a dict of names, with the Flax tree's."""
    expected = weights.convert(module, variables)
    for name, value in found.items():
        record(f"{quantity} {name}", value.detach(), expected[name])


def compare_moved(request, module, start, end):
    """All weights and statistics of the module with `end`, to which training took `start`."""
    before, after = (weights.convert(module, variables) for variables in (start, end))
    found = module.state_dict()
    off = sum(float((found[name] - after[name]).abs().sum()) for name in found)
    way = sum(float((before[name] - after[name]).abs().sum()) for name in found)
    name = f"{request.node.name}: weights"
    DEVIATIONS[name] = max(DEVIATIONS.get(name, 0.0), off / way)
    assert off <= MOVED * way, (off, way)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def to_torch(images):
    """Images [n, h, w, c] as a channels-last batch."""
    return torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)


def classifier(federation, variables=None):
    settings, dataset = federation.config.model, federation.dataset
    model = classifiers.build_classifier(
        settings.name,
        dataset.num_classes,
        settings.width,
        dataset.mean,
        dataset.std,
        dataset.image_shape[0],
    )
    return model if variables is None else weights.load(model, variables)


def client_batches(federation, client, key, steps):
    """The batches `ClientUpdate` makes of one client, without the masked examples."""
    key, size = rng.fold(key, client.id), federation.config.local_update.batch_size
    for number in range(steps):
        positions, mask = epoch_batch(
            client.index, client.size, step=number, key=key, batch_size=size
        )
        positions = np.asarray(positions)[np.asarray(mask) > 0]
        images = to_float(federation.data.gather(positions))
        labels = np.array(federation.data.labels[positions])
        yield to_torch(images), torch.from_numpy(labels).long()


def round_inputs(federation, rate=0.05):
    return RoundInputs(
        data=federation.data,
        key=federation.key("parity"),
        learning_rate=jnp.float32(rate),
        first_step=jnp.int32(0),
        round_index=jnp.int32(0),
    )


def adam_gradient(before, after, beta1):
    """The gradient behind a step of `optax.adam`, out of the first moments."""
    return jax.tree.map(lambda a, b: (b - beta1 * a) / (1 - beta1), before[0].mu, after[0].mu)
