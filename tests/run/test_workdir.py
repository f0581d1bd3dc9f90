"""A work directory is refused to other settings, other files and a second program."""

import dataclasses

import pytest

from mosaic_jax.config import Config
from mosaic_jax.run import experiment, workdir
from mosaic_jax.types import UserError
from tests.helpers import BLOCKS, Killed, run


def test_another_config_is_refused_naming_the_setting(make_federation, whole):
    other = make_federation(**BLOCKS | {"partition.alpha": 0.7})
    with pytest.raises(UserError, match=r"partition\.alpha.*--workdir"):
        run(other, whole[0])


def test_the_way_to_go_on_with_a_run_names_every_setting(tmp_path):
    workdir.create_or_check(tmp_path / "run", Config(seed=3))
    partition = dataclasses.replace(Config().partition, seed=5, alpha=0.5)
    with pytest.raises(UserError) as found:
        workdir.create_or_check(tmp_path / "run", Config(partition=partition))
    said = "by --config.partition.alpha=0.1 without --config.partition.seed by --config.seed=3"
    assert str(found.value).endswith(said)
    other = Config(method="fedavg", seed=3, partition=partition)
    with pytest.raises(UserError, match=r"and 3 more\); choose another --workdir$"):
        workdir.create_or_check(tmp_path / "run", dataclasses.replace(other, seed=4))


def test_a_folder_with_other_things_in_it_is_refused(federation, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no run"):
        run(federation, tmp_path)


def test_a_second_program_is_kept_out(federation, tmp_path):
    def watch(*_):
        with pytest.raises(UserError, match=f"another program is running in {tmp_path / 'run'}"):
            run(federation, tmp_path / "run")
        raise Killed

    with pytest.raises(Killed):
        experiment.run(federation, tmp_path / "run", watch)
    run(federation, tmp_path / "run")  # the first has ended


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_config_of_a_run_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is not a config"):
        workdir.create_or_check(tmp_path, Config())
