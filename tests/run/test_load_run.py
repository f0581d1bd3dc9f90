"""A run loaded again has the models it ended with, and says what it lacks."""

import json
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import export

import mosaic_jax
from mosaic_jax import load_run
from mosaic_jax.run import experiment
from mosaic_jax.types import UserError


@pytest.fixture(scope="module")
def whole(make_federation, tmp_path_factory):
    """A work directory, the state its run ended with, and the run loaded again."""
    workdir = tmp_path_factory.mktemp("loaded") / "run"
    return workdir, experiment.run(make_federation(), workdir), load_run(workdir)


def test_all_that_the_stages_left_is_there(whole):
    _, state, run = whole
    assert run.stages[0] == "local_update"
    assert run.stages[-1] == "fine_tuning"
    assert set(run.state) == set(state)
    jax.tree.map(np.testing.assert_array_equal, run.state, state)
    jax.tree.map(np.testing.assert_array_equal, run.student, state["student"])


def test_its_models_answer_as_the_record_says(whole):
    workdir, _, run = whole
    summary = json.loads((workdir / "summary.json").read_text())
    tests = run.federation.dataset

    def accuracy(logits):
        return (logits.argmax(-1) == tests.test_labels).mean()

    assert accuracy(run.classify(tests.test_images)) == summary["fine_tuning"]["test_accuracy"]
    teacher = run.teacher(tests.test_images)
    assert accuracy(teacher) == pytest.approx(summary["meta_model"]["teacher_test_accuracy"])
    answers = np.load(workdir / "answers_meta_model.npz")
    assert run.experts(tests.test_images).shape == (60, 10, 10)
    found = run.experts(tests.test_images).argmax(-1)
    assert (found == answers["experts"]).mean() > 0.99  # rounding may decide between two logits


def test_generators_draw_what_a_seed_says(whole):
    run = whole[2]
    drawn = run.draw(1, 4)
    assert drawn.shape == (4, 16, 16, 1)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn, run.draw(1, 4))
    assert (drawn != run.draw(1, 4, seed=1)).any()
    assert (drawn != run.draw(2, 4)).any()


def test_the_student_is_exported_by_names(whole, tmp_path):
    run = whole[2]
    run.save_student(tmp_path / "student.npz")
    arrays = np.load(tmp_path / "student.npz")
    np.testing.assert_array_equal(
        arrays["params/head/kernel"], run.student["params"]["head"]["kernel"]
    )
    assert len(arrays) == len(jax.tree.leaves(run.student))


def test_the_student_is_exported_as_a_checkpoint(whole, tmp_path):
    run = whole[2]
    run.save_student(tmp_path / "student")
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "student", run.student)
    jax.tree.map(np.testing.assert_array_equal, found, run.student)


@pytest.mark.parametrize("images", [1, 7, 60])
def test_the_student_is_exported_as_a_program(whole, tmp_path, images):
    run = whole[2]
    run.export_student(tmp_path / "student.stablehlo")
    program = export.deserialize(bytearray((tmp_path / "student.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    given = run.federation.dataset.test_images[:images]
    np.testing.assert_allclose(program.call(given), run.classify(given), rtol=1e-4, atol=1e-4)


def test_an_export_that_cannot_be_written_is_an_answer(whole, tmp_path):
    run = whole[2]
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "file").touch()
    for write in (run.save_student, run.export_student):
        with pytest.raises(UserError, match=r"cannot write .*student"):
            write(tmp_path / "student")
    with pytest.raises(UserError, match=r"cannot write .*student\.npz"):
        run.save_student(tmp_path / "no_such" / "student.npz")


def test_a_run_that_was_stopped_has_what_it_had(make_federation, tmp_path):
    asked = iter([False, False, False, True])
    with pytest.raises(experiment.Stopped):
        experiment.run(make_federation(), tmp_path / "run", is_asked_to_stop=lambda: next(asked))
    run = load_run(tmp_path / "run")
    assert run.stages == ("local_update", "model_aggregation")
    assert run.classify(run.federation.dataset.test_images).shape == (60, 10)
    with pytest.raises(
        UserError, match="the run has no 'generators'; it has come to local_update, "
    ):
        run.draw(0, 1)
    with pytest.raises(UserError, match="the run has no 'meta'"):
        run.teacher(run.federation.dataset.test_images)


def test_what_cannot_be_loaded_or_asked_is_an_answer(whole, tmp_path):
    run = whole[2]
    with pytest.raises(UserError, match="holds no run"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        load_run(tmp_path / "no_such")
    (tmp_path / "config.json").write_text('{"seed": 0,')
    with pytest.raises(UserError, match=r"config\.json is damaged: Expecting"):
        load_run(tmp_path)
    with pytest.raises(
        UserError, match=r"images are uint8 \[n, 16, 16, 1\], not float32 \[2, 16, 16, 1\]"
    ):
        run.classify(np.zeros((2, 16, 16, 1), np.float32))
    with pytest.raises(UserError, match="there are no images"):
        run.classify(np.zeros((0, 16, 16, 1), np.uint8))
    with pytest.raises(UserError, match="there are clients 0 to 2"):
        run.draw(3, 1)
    with pytest.raises(AttributeError, match="no attribute 'lod_run'"):
        mosaic_jax.lod_run  # noqa: B018


def test_the_library_leaves_flags_of_the_users_own_program_alone():
    program = "from absl import flags; flags.DEFINE_string('workdir', '', ''); "
    program += "from mosaic_jax import load_run; load_run; print(list(flags.FLAGS))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "coordinator" not in ran.stdout
