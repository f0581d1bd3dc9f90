"""FedRS: the logits of absent classes."""

import jax.numpy as jnp
import numpy as np

from mosaic_jax import methods
from mosaic_jax.data.batches import ClientLists
from tests.methods.uneven import SHORT


def test_fedrs_scales_the_logits_of_classes_a_client_lacks(make_federation):
    federation = make_federation(**SHORT | {"fedrs.alpha": 0.25})
    update = methods.fedrs.RestrictedUpdate(federation, 1)
    counts = jnp.array([3.0, 0.0, 1.0])
    client = ClientLists(class_counts=counts, id=0, index=jnp.arange(4), size=4)
    logits = update.adjust_logits(jnp.array([[2.0, 4.0, 6.0]]), client)
    np.testing.assert_array_equal(logits, [[2.0, 1.0, 6.0]])
