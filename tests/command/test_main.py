"""The command line as a user meets it: plans, runs, stops and resumes."""

import re
import time

from tests.command.program import small, start


def test_a_plan_says_what_would_run_and_runs_nothing(tmp_path):
    """Every stage that has blocks is measured, by two of them."""
    done = small(tmp_path, "--plan", "--config.submodel.rho=2", "--config.fine_tuning.rounds=0")
    assert done.returncode == 0, done.stderr
    measured = re.findall(r"^(\w+): about .*, (\d+) blocks of ", done.stdout, re.MULTILINE)
    assert measured == [
        ("local_update", "4"),
        ("model_aggregation", "1"),
        ("generator_optimization", "2"),
        ("prototypes", "1"),
        ("meta_model", "1"),
        ("knowledge_distillation", "2"),
    ]
    text = " ".join(done.stdout.split())
    for fact in (
        "mosaic on synthetic, alpha 0.1, seed 0",
        "all 5 │ 500",
        "cnn of width 8",
        "1 client(s) at a time on each",
        "local_update 4, model_aggregation 1, generator_optimization 2",
        "a client receives",
        "in all about",
    ):
        assert fact in text, text
    assert not (tmp_path / "run").exists()


def test_a_run_stops_when_told_resumes_and_refuses_another_config(tmp_path):
    process = start("--config=configs/base.py:small", f"--workdir={tmp_path / 'run'}")
    record = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (record.exists() and record.read_text()):
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 143
    assert errors == "stopped after saving; the same command resumes\n"
    done = record.read_text()
    first = small(tmp_path)
    assert record.read_text().startswith(done)
    assert first.returncode == 0, first.stderr
    for label in ("MoE teacher", "uniform ensemble", "student after fine-tuning"):
        assert label in first.stdout
    for name in ("class_histogram", "curves", "generator_health", "generator_samples"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 1000
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    second = small(tmp_path)
    assert second.returncode == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    other = small(tmp_path, "--config.seed=1")
    assert other.returncode == 2
    assert re.fullmatch(r"error: .*seed: 0 there, 1 here.*\n", other.stderr)


def test_clients_of_one_image_fewer_than_a_batch_run_to_the_end(tmp_path):
    done = small(
        tmp_path,
        "--config.partition.kind=iid",
        "--config.partition.clients=20",
        "--config.data.train_images=30",
        "--config.knowledge_distillation.images_per_generator=2",
    )
    assert done.returncode == 0, done.stderr
    assert "student after fine-tuning" in done.stdout
