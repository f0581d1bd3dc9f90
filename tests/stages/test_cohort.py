"""Participation: who takes part in a round, and what it sends."""

import numpy as np

from mosaic_jax.stages import cohort, rounds
from mosaic_jax.stages.local_update import ClientUpdate

FOUR = {"partition.clients": 4}


def test_who_takes_part_is_drawn_by_the_seed_and_covers_everybody(make_federation):
    federation = make_federation(**FOUR | {"local_update.clients_per_round": 2})
    drawn = [tuple(cohort.participants(federation, t)) for t in range(12)]
    assert drawn == [tuple(cohort.participants(federation, t)) for t in range(12)]
    assert all(len(set(each)) == 2 for each in drawn)
    assert set(np.concatenate(drawn)) == {0, 1, 2, 3}
    stage = rounds.Rounds(federation, ClientUpdate(federation, 1), "", 12, 0.1).stage()
    size = cohort.submodel_bytes(federation)[0]
    np.testing.assert_array_equal(
        stage.upload / size, np.bincount(np.concatenate(drawn), minlength=4)
    )


def test_everybody_takes_part_unless_told_otherwise(make_federation):
    federation = make_federation(**FOUR)
    assert list(cohort.participants(federation, 3)) == [0, 1, 2, 3]
