"""What the timing experiments count and in which order they run; never how long anything takes."""

import jax
import numpy as np
import pytest

from experiments.speed.timed_units import STAGES, units
from experiments.speed.uneven_clients import masked
from mosaic_jax.data.batches import batches_per_epoch, epoch_batch


def test_runs_alternate_and_the_first_of_each_does_not_count(monkeypatch):
    from experiments.speed import timed_units

    monkeypatch.setattr(timed_units, "REST", 0.0)
    calls = []

    def run(name):
        calls.append(name)
        return float(len(calls))

    times = timed_units.alternate({name: lambda n=name: run(n) for name in "AB"}, 3)
    assert "".join(calls) == "ABABABAB"
    assert times == {"A": [3.0, 5.0, 7.0], "B": [4.0, 6.0, 8.0]}


def test_masked_share_is_that_of_the_masks(make_federation):
    federation = make_federation(**{"partition.alpha": 0.1, "local_update.batch_size": 48})
    shares = []
    for i in range(federation.num_clients):
        client = jax.tree.map(lambda leaf, i=i: leaf[i], federation.clients.lists)
        steps = range(int(batches_per_epoch(client.size, 48)))
        masks = [
            epoch_batch(client.index, client.size, step=step, key=jax.random.key(0), batch_size=48)[
                1
            ]
            for step in steps
        ]
        shares.append(np.mean(masks))
    assert masked(federation) == pytest.approx(1 - np.mean(shares))
    assert masked(federation) > 0.1


def test_every_unit_of_the_comparison_runs(make_federation):
    found, _ = units(make_federation())
    assert set(found) == set(STAGES)
    assert all(unit.seconds() > 0 for unit in found.values())
