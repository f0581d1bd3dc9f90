"""Collectives are read from compiled programs, each once."""

import json
import subprocess
import sys

from mosaic_jax.plan.hlo import Collective, Module
from tests.helpers import ROOT


def test_collectives_of_eight_devices(subprocess_environment):
    result = subprocess.run(
        [sys.executable, "-m", "tests.parallel.collectives8"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=subprocess_environment,
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


def test_what_a_gpu_starts_counts_by_its_result():
    text = """HloModule program, num_partitions=4

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %a = ((f32[8,4]{1,0}), f32[8,4]{1,0}) all-to-all-start(%p), replica_groups={{0,1,2,3}}
  %b = f32[8,4]{1,0} all-to-all-done(%a)
  %c = ((f32[8,4]{1,0}), f32[2,4]{1,0}) reduce-scatter-start(%b), replica_groups={{0,1,2,3}}
  %d = f32[2,4]{1,0} reduce-scatter-done(%c)
  %e = ((f32[2,4]{1,0}, f32[2,4]{1,0}), (f32[8,4]{1,0}, f32[8,4]{1,0})) all-gather-start(%d, %d)
  ROOT %f = (f32[8,4]{1,0}, f32[8,4]{1,0}) all-gather-done(%e)
}
"""
    sizes = {each.kind: each.bytes for each in Module(text).collectives()}
    assert sizes == {"all-to-all": 128, "reduce-scatter": 128, "all-gather": 256}
