"""One whole run of Mosaic, in several blocks a stage."""

import pytest

from tests.helpers import BLOCKS, ROUNDS, run


@pytest.fixture(scope="session")
def federation(make_federation):
    return make_federation(**BLOCKS)


@pytest.fixture(scope="session")
def whole(federation, tmp_path_factory):
    """Return the work directory, the last state and the blocks of a whole run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    state, blocks = run(federation, workdir)
    return workdir, state, blocks


@pytest.fixture(scope="session")
def rounds(make_federation):
    return make_federation(**ROUNDS)


@pytest.fixture(scope="session")
def whole_rounds(rounds, tmp_path_factory):
    """Return the same of a run that has rounds alone."""
    workdir = tmp_path_factory.mktemp("rounds") / "run"
    state, blocks = run(rounds, workdir)
    return workdir, state, blocks
