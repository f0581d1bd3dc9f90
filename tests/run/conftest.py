"""Whole runs, in several blocks a stage: of Mosaic, and of rounds alone."""

import pytest

from tests.helpers import BLOCKS, ROUNDS, run


@pytest.fixture(scope="session")
def federation(make_federation):
    return make_federation(**BLOCKS)


@pytest.fixture(scope="session")
def rounds(make_federation):
    return make_federation(**ROUNDS)


@pytest.fixture(scope="session")
def whole_of(tmp_path_factory):
    """Return `whole_of(federation)`: work directory, last state and blocks of a whole run."""

    def make(federation):
        workdir = tmp_path_factory.mktemp("whole") / "run"
        return workdir, *run(federation, workdir)

    return make


@pytest.fixture(scope="session")
def whole(whole_of, federation):
    return whole_of(federation)


@pytest.fixture(scope="session")
def whole_rounds(whole_of, rounds):
    return whole_of(rounds)
