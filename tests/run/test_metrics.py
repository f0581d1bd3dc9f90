"""Metrics that are not finite name the client."""

import numpy as np
import pytest

from mosaic_jax.run.metrics import check_clients, check_finite
from mosaic_jax.types import UserError


def test_a_metric_that_is_not_finite_names_the_client_and_not_its_place():
    figures = {"loss": np.array([1.0, np.nan]), "clients": np.array([2, 5])}
    with pytest.raises(UserError, match="loss of client 5 is not finite"):
        check_finite("local_update", 0, figures)
    gone = figures | {"diverged": np.array([0.0, 1.0])}
    with pytest.raises(UserError, match="client 5 diverged in stage local_update, block 3"):
        check_clients("local_update", 3, gone, leave_out=False)
    assert check_clients("local_update", 3, gone, leave_out=True) is gone
