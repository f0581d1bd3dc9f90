"""The checks of the accelerator's command pass on equal work and fail on wrong values."""

import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.speed.on_accelerator import __main__ as command
from experiments.speed.on_accelerator import children, many_clients, memory, parity
from experiments.speed.on_accelerator.children import Cut, Failed, Options, Skipped
from experiments.speed.on_accelerator.report import Section, markdown
from mosaic_jax import methods
from mosaic_jax.trees import num_bytes


def first_two(federation, befores=None):
    stages = methods.stages("mosaic", federation)[:2]
    return dict(parity.records(federation, stages, befores))


@pytest.fixture(scope="module")
def reference(make_federation):
    return first_two(make_federation())


@pytest.fixture(scope="module")
def found(make_federation, reference):
    """Return records of the accelerator's forms, from the reference's states."""
    federation = make_federation(**parity.ACCELERATOR | {"parallel.lanes": 3})
    return first_two(federation, {name: kept.before for name, kept in reference.items()})


def test_both_forms_agree_in_every_stage_and_in_the_run(found, reference):
    assert list(reference) == ["local_update", "model_aggregation"]
    for name, kept in reference.items():
        row = parity.of_stage(name, "float32", found[name], kept)
        assert row["passed"]
        assert parity.largest(found[name].first, kept.first)[1] < 1e-4
        assert parity.way_off(found[name].after, kept.after, kept.start) < 1e-3
        assert parity.way_off(kept.after, kept.after, kept.start) == 0
    assert parity.of_run("float32", found, reference)["passed"]


@pytest.mark.parametrize("factor", [1.002, np.nan])
def test_a_wrong_loss_fails(reference, factor):
    kept = reference["local_update"]
    wrong = kept.first | {"loss": np.asarray(kept.first["loss"]) * [1, factor, 1]}
    row = parity.of_stage("local_update", "float32", dataclasses.replace(kept, first=wrong), kept)
    assert not row["passed"]
    assert row["largest difference of a metric"].endswith("(loss)")
    assert row["difference of the way"] == "0.0e+00"
    late = reference | {"local_update": dataclasses.replace(kept, last=wrong | {"loss": np.nan})}
    row = parity.of_run("float32", late, reference)
    assert not row["passed"]
    assert row["largest difference of a metric"] == "nan (local_update: loss)"


def test_a_step_too_long_fails(reference):
    """Losses of a block may not show it; the weights do."""
    kept = reference["local_update"]
    after = jax.tree.map(lambda end, begin: begin + 1.02 * (end - begin), kept.after, kept.start)
    row = parity.of_stage("local_update", "float32", dataclasses.replace(kept, after=after), kept)
    assert not row["passed"]
    assert parity.way_off(after, kept.after, kept.start) == pytest.approx(0.02, rel=1e-3)


def test_the_largest_difference_is_relative_and_leaves_counts_out():
    expected = {"loss": np.array([2.0, 4.0]), "spread": np.array(1e-5), "accuracy": np.array(0.5)}
    other = {"loss": np.array([2.0, 4.4]), "spread": np.array(2e-5), "accuracy": np.array(0.0)}
    assert parity.largest(other, expected) == ("loss", pytest.approx(0.1))
    other["loss"] = expected["loss"]
    assert parity.largest(other, expected) == ("spread", pytest.approx(0.01))


@pytest.mark.parametrize(
    ("took", "exact", "passed", "cell"),
    [
        (120 * 2**20, True, True, "1.20"),
        (160 * 2**20, True, False, "1.60"),
        (120 * 2**20, False, True, "≤ 1.20"),
        (160 * 2**20, False, None, "≤ 1.60"),
        (None, False, None, ""),
    ],
)
def test_memory_is_checked_where_the_device_tells_it(took, exact, passed, cell):
    row = memory.row("meta_model", 100 * 2**20, took, exact)
    assert row.get("passed") is passed
    assert row["measured / plan"] == cell
    assert row["plan, MiB"] == "100.0"


def test_the_plans_programs_of_blocks_run_alone(make_federation):
    """Each is compiled once, and results of a round on ones are whole models again."""
    federation = make_federation(**{"parallel.devices": 1})
    ((stage, program),) = memory.blocks(federation, "local_update")
    assert stage == "local_update"
    model = federation.classifier.abstract_variables()
    lists = federation.clients.lists
    assert memory.held_bytes(program) > num_bytes((federation.data, lists, model))
    state = program(*memory.ones(program)).state.model
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, model)
    assert memory.measured(program, jax.devices()[0]) == (None, False)


def test_a_program_runs_on_ones():
    program = jax.jit(lambda tree, key: (tree["a"] + tree["b"], key)).lower(
        {"a": np.zeros((2, 3), np.float32), "b": np.int32(5)}, jax.random.key(0)
    )
    compiled = program.compile()
    total, key = compiled(*memory.ones(compiled))
    np.testing.assert_array_equal(total, np.full((2, 3), 2.0))
    assert jax.random.key_data(key).tolist() == jax.random.key_data(jax.random.key(1)).tolist()


def test_a_cell_of_clients_counts_their_steps():
    sizes = many_clients.SMALL | {"images": 4, "repeats": 1}
    row = many_clients.cell(sizes, 2, "cnn", 4, 1)
    assert row["lanes"] == "1"
    assert row["type"] == "float32"
    assert float(row["client-steps a second"].split(" ")[0]) > 0


def test_a_child_sees_its_devices_and_its_rows_come_as_they_are(tmp_path):
    options = Options(tmp_path).on_cpu(3)
    (facts,) = children.rows("probe", options, time.monotonic() + 300)
    assert facts["platform"] == "cpu"
    assert facts["device"] == "cpu x 3"


def test_a_child_is_cut_at_its_deadline_and_an_error_is_its_last_line(tmp_path):
    options = Options(tmp_path).on_cpu(1)
    with pytest.raises(Cut):
        next(children.rows("parity", options, time.monotonic(), dtype=""))
    with pytest.raises(Failed, match=r"TypeError: .*unexpected keyword argument 'wrong'"):
        next(children.rows("many_clients", options, time.monotonic() + 300, wrong=1))


def test_without_an_accelerator_one_line_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert command.main(["--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: JAX finds no accelerator here, only a CPU; --small tries the command on it"
    ]


def test_a_section_that_fails_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    class Rows:
        def __init__(self, error, *rows):
            self.error, self.given = error, rows

        def rows(self, options, deadline):
            yield from self.given
            if self.error is not None:
                raise self.error

    checks = [{"part": "a", "passed": True}, {"part": "b", "passed": False}]
    outcomes = {
        "parity": (Rows(None, *checks), "1 of 2 checks passed, in 0 s.", True),
        "memory": (Rows(Cut(), checks[0]), "Cut after 9 s, its share of the time.", True),
        "many_clients": (Rows(Cut()), "Cut after 9 s, its share of the time.", False),
        "beside_pytorch": (Rows(Skipped("no PyTorch")), "Skipped: no PyTorch.", False),
        "other": (Rows(Failed("Boom: 1")), "Ended with an error: Boom: 1", True),
    }
    for name, (module, line, bad) in outcomes.items():
        monkeypatch.setitem(command.SECTIONS, name, module)
        section = Section(name, name)
        assert len(list(command.run_section(section, Options(tmp_path), 9.0))) == len(module.given)
        assert section.line == line
        assert command.is_bad(section) is bad
        assert line in markdown({}, [section])


def test_the_reports_table_shows_what_failed():
    rows = [{"part": "a", "off": "1", "passed": True}, {"part": "b", "off": "2", "passed": False}]
    lines = markdown({"device": "x"}, [Section("parity", "Parity", rows=rows)]).splitlines()
    table = list(itertools.dropwhile(lambda line: not line.startswith("|"), lines))
    assert table[0] == "| part | off | check |"
    assert table[2:] == ["| a | 1 | pass |", "| b | 2 | FAIL |"]
    assert "- device: x" in lines
