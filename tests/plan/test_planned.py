"""The pod plan walks the real method and lists every stage; no test needs the TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import methods
from mosaic_jax.plan import tables
from mosaic_jax.plan.abstract import Record, abstract_federation, walk
from mosaic_jax.plan.chips import CHIPS


@pytest.fixture(scope="module")
def walked(make_federation):
    """A tiny federation, the shapes that its planned method leaves, and what was compiled."""
    federation = make_federation()
    record = Record()
    stages, state = walk(
        abstract_federation(federation, federation.layout.mesh, record), evaluate=False
    )
    return federation, stages, state, record.programs


def layout(tree):
    return jax.tree.map(lambda leaf: (np.shape(leaf), jnp.result_type(leaf)), tree)


def test_planned_method_leaves_what_the_real_one_leaves(walked):
    federation, _, planned_state, _ = walked
    state = {"global": federation.initial_variables()}
    for stage in methods.stages("mosaic", federation):
        carry = stage.start(state)
        if stage.blocks:
            carry, _ = stage.block(state, carry, 0)
        state = stage.finish(state, carry)
    assert layout(planned_state) == layout(state)


def test_every_stage_has_its_programs(walked):
    federation, stages, _, programs = walked
    names = [stage.name for stage in stages]
    assert names == [stage.name for stage in methods.stages("mosaic", federation)]
    assert {each.stage for each in programs if each.phase == "block"} == set(names)
    steps = [each.figures for each in programs if each.phase == "block" and each.name != "copied"]
    assert all(found.flops > 0 and found.held > found.arguments for found in steps)


def test_a_stage_more_and_the_plan_stops_where_it_is_told(walked, make_federation):
    federation, *_ = walked
    record = Record()
    stages, _ = walk(
        abstract_federation(federation, federation.layout.mesh, record),
        "local_update",
        evaluate=False,
    )
    assert [stage.name for stage in stages] == ["local_update"]
    assert {each.stage for each in record.programs} == {"initial_variables", "local_update"}


def test_tables_have_every_stage(walked, capsys):
    federation, stages, _, programs = walked
    plan = tables.TopologyPlan(CHIPS["v5e"], 1, federation.config, stages, programs, ["a note"])
    tables.show(plan, "title")
    lines = capsys.readouterr().out.splitlines()
    assert "- a note" in lines
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    for stage in stages:
        assert sum(row[0] == stage.name for row in rows) >= 2
    [total] = [float(row[-1]) for row in rows if row[0] == "all"]
    parts = [float(row[-1]) for row in rows if len(row) == 4 and row[0] not in ("all", "stage")]
    assert total == pytest.approx(sum(parts), rel=1e-2)
    _, [chips_used, *_, efficiency] = tables.scaling_rows([plan, plan])
    assert (chips_used, efficiency) == ("1", "100.0%")
