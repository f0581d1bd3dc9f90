"""One whole run of Mosaic, in several blocks a stage."""

import pytest

from tests.helpers import BLOCKS, run


@pytest.fixture(scope="session")
def federation(make_federation):
    return make_federation(**BLOCKS)


@pytest.fixture(scope="session")
def whole(federation, tmp_path_factory):
    """Return the work directory, the last state and the blocks of a whole run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    state, blocks = run(federation, workdir)
    return workdir, state, blocks
