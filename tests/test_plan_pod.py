"""The pod plan: it walks the real method, counts loops as often as they run, and reads collectives.

All on CPU devices; no test needs the TPU compiler.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import chips, plan_pod, plan_tables
from experiments.chips import CHIPS
from experiments.compiled import figures
from experiments.hlo import Collective, Module
from experiments.planned import Record, planned, walk
from mosaic_jax import methods, parallel
from mosaic_jax.data import published

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def walked(make_federation):
    """A tiny federation, the shapes that its planned method leaves, and what was compiled."""
    federation = make_federation()
    record = Record()
    stages, state = walk(planned(federation, federation.mesh, record), evaluate=False)
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
    stages, _ = walk(planned(federation, federation.mesh, record), "local_update", evaluate=False)
    assert [stage.name for stage in stages] == ["local_update"]
    assert {each.stage for each in record.programs} == {"initial_variables", "local_update"}


def test_tables_have_every_stage(walked, capsys):
    federation, stages, _, programs = walked
    plan = plan_tables.Plan(CHIPS["v5e"], 1, federation.config, stages, programs, ["a note"])
    plan_tables.show(plan, "title")
    lines = capsys.readouterr().out.splitlines()
    assert "- a note" in lines
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    for stage in stages:
        assert sum(row[0] == stage.name for row in rows) >= 2
    [total] = [float(row[-1]) for row in rows if row[0] == "all"]
    parts = [float(row[-1]) for row in rows if len(row) == 4 and row[0] not in ("all", "stage")]
    assert total == pytest.approx(sum(parts), rel=1e-2)
    _, [chips_used, *_, efficiency] = plan_tables.scaling_rows([plan, plan])
    assert (chips_used, efficiency) == ("1", "100.0%")


def test_loops_count_as_often_as_they_run():
    size, trips = 32, 5

    def products(x, inner):
        def outer(x, _):
            return jax.lax.fori_loop(0, inner, lambda _, y: y @ x + 1, x), None

        return jax.lax.scan(outer, x, length=trips)[0]

    x, product = jnp.zeros((size, size)), 2 * size**3
    found = figures(jax.jit(lambda x: products(x, 3)).lower(x))
    assert found.exact
    assert found.flops == pytest.approx(trips * 3 * product, rel=0.1)
    assert found.counted_once["flops"] < 2 * product
    unknown = figures(jax.jit(products).lower(x, 3))
    assert not unknown.exact


def test_figures_are_compiled_once(tmp_path, compilations):
    record = Record(tmp_path / "cache")
    mesh = parallel.make_mesh(1)
    for _ in range(2):
        lowered = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.zeros((8, 8)))
        record.compiled("product", lowered, mesh)
        compilations.append("again")
    assert compilations[-2:] == ["again", "again"]
    first, second = (each.figures for each in record.programs)
    assert first == second
    assert first.axes == [None]


def test_collectives_of_eight_devices(subprocess_environment):
    result = subprocess.run(
        [sys.executable, "tests/collectives8.py"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=subprocess_environment | {"PYTHONPATH": str(ROOT)},
    )
    found = {each.kind: each for each in (Collective(**e) for e in json.loads(result.stdout))}
    part = 16 * 32 * 4
    assert {each.devices for each in found.values()} <= {8}
    assert (found["all-reduce"].bytes, found["all-reduce"].times) == (part, 3)
    assert found["all-reduce"].in_loop
    assert (found["all-gather"].bytes, found["all-gather"].times) == (8 * part, 1)
    assert not found["all-gather"].in_loop
    assert found["reduce-scatter"].bytes == part
    assert found["collective-permute"].bytes == part


def test_collectives_that_start_and_end_count_once():
    text = """HloModule program, num_partitions=4

ENTRY %main (p: f32[8,4]) -> f32[32,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %start = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%p), replica_groups=[1,4]<=[4]
  ROOT %done = f32[32,4]{1,0} all-gather-done(%start)
}
"""
    [found] = Module(text).collectives()
    assert (found.kind, found.bytes, found.devices) == ("all-gather", 32 * 4 * 4, 4)


def test_a_collective_beside_other_work_counts_once():
    text = """HloModule program, num_partitions=4

%first (p: f32[8,4]) -> f32[32,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %a = f32[32,4]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4]
}

%second (q: f32[8,4]) -> f32[32,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %b = f32[32,4]{1,0} all-gather(%q), channel_id=3, replica_groups=[1,4]<=[4]
}

ENTRY %main (r: f32[8,4]) -> f32[32,4] {
  %r = f32[8,4]{1,0} parameter(0)
  %c = f32[32,4]{1,0} fusion(%r), kind=kCustom, calls=%first
  %s = f32[8,4]{1,0} all-reduce(%r), channel_id=1, replica_groups=[1,4]<=[4]
  %t = f32[8,4]{1,0} all-reduce(%s), channel_id=1, replica_groups=[1,4]<=[4]
  ROOT %d = f32[32,4]{1,0} fusion(%t), kind=kCustom, calls=%second
}
"""
    kinds = sorted(each.kind for each in Module(text).collectives())
    assert kinds == ["all-gather", "all-reduce", "all-reduce"]


def test_ring_formula_by_hand():
    chip = chips.Chip(1e12, 1e9, 16e9, 50e9, {})
    summed = Collective("all-reduce", 10**9, 4)
    assert chips.ring_seconds(summed, chip) == pytest.approx(2 * 3 / 4 * 1 / 100)
    gathered = Collective("all-gather", 10**9, 4)
    assert chips.ring_seconds(gathered, chip) == pytest.approx(3 / 4 * 1 / 100)
    shifted = Collective("collective-permute", 10**9, 4)
    assert chips.ring_seconds(shifted, chip) == pytest.approx(1 / 50)
    assert chips.ring_seconds(Collective("all-reduce", 10**9, 1), chip) == 0


def test_every_published_set_can_be_planned():
    assert plan_pod.IMAGES.keys() == published.SETS.keys()
    arguments = plan_pod.parse(["--set", "data.train_images=1000"])
    config, _ = plan_pod.settings_of(arguments, 4, "float32", None)
    dataset = plan_pod.dataset(config)
    assert dataset.train_images.shape == (1000, 32, 32, 3)
    assert set(np.bincount(dataset.train_labels)) == {10}
    assert len(dataset.test_labels) == 10_000


def test_a_split_that_cannot_be_is_said():
    arguments = plan_pod.parse([])
    config, notes = plan_pod.settings_of(arguments, 4096, "bfloat16", 8)
    assert (config.partition.kind, config.model.conv) == ("iid", "native")
    assert (config.model.dtype, config.parallel.lanes) == ("bfloat16", 8)
    assert len(notes) == 1
    assert "partition.kind = iid" in notes[0]
    few, notes = plan_pod.settings_of(arguments, 10, "bfloat16", None)
    assert (few.partition.kind, notes) == ("dirichlet", [])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--config=configs/cifar101.py"], "unknown config 'configs/cifar101.py'; did you mean"),
        (["--config=configs/cifar100.py:sevre"], "did you mean 'severe'?"),
        (["--set", "model.wdith=8"], "did you mean 'model.width'?"),
        (["--set", "model.width=wide"], "'width'"),
        (["--dtypes", "float16"], "unknown model.dtype"),
        (["--topology=v9:2x2"], "unknown chip 'v9'; known: v5e, v5p, v6e"),
        (["--chips", "3"], "--chips 3: plans are of 1, 4, 16, 64, 256 chips"),
        (["--until", "local_updates"], "did you mean 'local_update'?"),
    ],
)
def test_errors_are_one_line(words, line, capsys):
    assert plan_pod.main(words) == plan_pod.USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert line in error


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_no_compiler_is_one_line(capsys):
    assert plan_pod.main(["--topology=v5e:2x2"]) == plan_pod.USER_ERROR
    assert capsys.readouterr().err == "error: libtpu is not installed; pip install '.[tpu]'\n"
