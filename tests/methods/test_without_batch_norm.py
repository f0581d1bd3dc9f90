"""A model without batch norm runs where none is needed, and is refused elsewhere at once."""

import jax
import pytest

from mosaic_jax import methods
from mosaic_jax.types import UserError
from tests.helpers import Killed, assert_same, lines, run

LENET = {"model.name": "lenet", "method": "fedavg"}


def test_rounds_resume_where_they_were_killed(make_federation, tmp_path):
    federation = make_federation(**LENET | {"run.checkpoint_every": 1})
    assert federation.initial_variables()["batch_stats"] == {}
    whole, _ = run(federation, tmp_path / "whole")
    with pytest.raises(Killed):
        run(federation, tmp_path / "killed", kill_after=1)
    resumed, blocks = run(federation, tmp_path / "killed")
    assert len(blocks) == 1
    assert_same(jax.device_get(resumed["global"]), jax.device_get(whole["global"]))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "fedbn"},
            "method = 'fedbn' needs a model with batch norm, and 'lenet' has none",
        ),
        (
            {"method": "dense"},
            "method = 'dense' needs a model with batch norm, and 'lenet' has none",
        ),
        (
            {"method": "mosaic", "generator_optimization.inversion_threshold": 50},
            "generator_optimization.inversion_threshold needs a model with batch norm, and "
            "'lenet' has none",
        ),
        ({"submodel.rho": 5}, "LeNet has no sub-models"),
    ],
)
def test_what_needs_batch_norm_is_refused(make_federation, changes, message):
    def prepare():
        federation = make_federation(**LENET | changes)
        methods.stages(federation.config.method, federation)

    with pytest.raises(UserError) as error:
        prepare()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
