"""The client engine on eight devices gives the numbers of one."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.helpers import ROOT, assert_close, assert_same
from tests.parallel.devices8 import one_round, pooled, reduced, split_batch, taught


@pytest.fixture(scope="module")
def eight(tmp_path_factory, subprocess_environment):
    """`eight(name)`: the leaves of one result of `devices8.py`."""
    path = tmp_path_factory.mktemp("devices8") / "results.npz"
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.devices8", str(path)],
        cwd=ROOT,
        env=subprocess_environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    stored = dict(np.load(path))

    def leaves(name):
        own = {key: value for key, value in stored.items() if key.startswith(f"{name}/")}
        assert own
        return [own[f"{name}/{i}"] for i in range(len(own))]

    return leaves


def test_five_clients_on_eight_devices_agree_with_one_device(eight):
    assert_close(eight("5 on 8"), eight("5 on 1"), rtol=1e-5, atol=1e-6)
    assert_close(eight("5 on 8"), jax.tree.leaves(reduced(5, debug=True)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["11 on 4", "11 on 4, 2 lanes", "11 on 8"])
def test_eleven_clients_on_any_devices_agree_with_the_debug_loop(eight, layout):
    assert_close(eight(layout), jax.tree.leaves(reduced(11, debug=True)), rtol=1e-5, atol=1e-6)


def test_eight_devices_twice_are_exactly_equal(eight):
    assert_same(eight("11 on 8"), eight("11 on 8 again"))


def test_a_teacher_fuses_each_devices_images_there(eight):
    logits, exchanges_in_loops = eight("taught on 4")
    assert exchanges_in_loops == 0
    assert_close(logits, taught(1, 2)[0], rtol=1e-4, atol=1e-5)


def test_images_of_a_pool_are_taken_where_they_were_drawn(eight):
    images, targets, exchanges = eight("pooled on 4")
    assert exchanges == 0
    assert_same([images, targets], list(pooled(1)[0]))


def test_what_is_restored_lies_spread_over_the_devices(eight):
    spread, stacks, others = eight("restored on 4")
    assert spread == stacks > 20
    assert others == 0


def test_a_split_batch_stays_where_it_is_in_a_wide_convolution(eight):
    *gradients, gathers = eight("split batch on 4")
    assert gathers == 0
    assert_close(gradients, list(split_batch(1)[0]), rtol=1e-4, atol=1e-4)


def test_pmap_of_vmap_gives_the_numbers_of_map_clients(eight):
    pmapped = eight("16 pmapped")
    kept = jax.tree.leaves(reduced(16, debug=True)[1])
    assert_close(pmapped, kept, rtol=1e-5, atol=1e-6)
    assert_close(eight("16 on 8, 2 lanes")[-len(kept) :], pmapped, rtol=1e-5, atol=1e-6)


def test_a_round_of_local_training_is_the_same_on_eight_devices(eight):
    assert_close(eight("round on 8"), jax.tree.leaves(one_round(1)), rtol=2e-4, atol=2e-5)
