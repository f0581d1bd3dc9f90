"""Federations of noise, and a record of how far the PyTorch baseline is from this package."""

import numpy as np
import pytest

from tests.experiments.pytorch.deviations import ABSOLUTE, DEVIATIONS, SETTINGS, TOLERANCE, noisy


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def report():
    yield
    for name, deviation in DEVIATIONS.items():
        print(f"{name} {deviation:.1e}")


@pytest.fixture(scope="session")
def federation(make_federation):
    return noisy(make_federation(**SETTINGS))


@pytest.fixture
def record(request):
    """Return `record(quantity, found, expected)`: it checks the deviation and notes the largest."""

    def check(quantity, found, expected):
        found, expected = np.asarray(found), np.asarray(expected)
        assert found.shape == expected.shape, quantity
        assert np.isfinite(expected).all(), quantity
        difference = np.abs(found - expected).max()
        largest = np.abs(expected).max()
        name = f"{request.node.name}: {quantity.split(' ')[0]}"
        if largest > 100 * ABSOLUTE:
            DEVIATIONS[name] = max(DEVIATIONS.get(name, 0.0), float(difference / largest))
        assert difference <= TOLERANCE * largest + ABSOLUTE, (quantity, difference, largest)

    return check
