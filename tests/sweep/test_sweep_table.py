"""The table and the figure of a sweep."""

from pathlib import Path

from mosaic_jax.run import reader
from mosaic_jax.sweep import table as sweep_table
from mosaic_jax.sweep.table import Cell, Measured


def test_speed_is_of_the_median_round_after_the_first():
    config = {
        "local_update": {"steps": 5, "clients_per_round": 0},
        "partition": {"clients": 8},
    }
    seconds = (60.0, 2.0, 2.0, 30.0)  # compiled in the first, and again after a resume
    lines = [{"stage": "local_update", "block": i, "seconds": s} for i, s in enumerate(seconds)]
    lines.append({"stage": "fine_tuning", "block": 1, "seconds": 0.1})

    def speed(lines, **local):
        settings = config | {"local_update": config["local_update"] | local}
        return sweep_table.client_steps_per_second(
            reader.Run(Path(), settings, lines, finished=True)
        )

    assert speed(lines) == 5 * 8 / 2.0
    assert speed(lines, clients_per_round=3) == 5 * 3 / 2.0
    assert speed(lines[:1]) == 5 * 8 / 60.0
    assert speed([]) is None


def test_rows_are_means_over_seeds():
    found = {
        Cell("mosaic", 0.1, 5, 0): Measured(80.0, 100.0, 2.0**30, 1e6, 10.0, at_least=False),
        Cell("mosaic", 0.1, 5, 1): Measured(90.0, 300.0, 2.0**31, 3e6, 20.0, at_least=True),
        Cell("mosaic", 0.1, 10, 0): Measured(70.0, 1234.0, None, 1e6, None, at_least=False),
    }
    cells = [Cell("mosaic", 0.1, n, seed) for seed in (0, 1) for n in (5, 10, 20)]
    _, five, ten, twenty = sweep_table.rows(cells, found)
    assert five[:5] == ["mosaic", "0.1", "5", "2", "85.0 ± 7.1"]
    assert five[5:] == ["200", "≥ 1,536", "2.0 MB", "≥ 15.0"]
    assert ten == ["mosaic", "0.1", "10", "1", "70.0", "1,234", "-", "1.0 MB", "-"]
    assert twenty == ["mosaic", "0.1", "20", "0", *"-----"]


def test_a_figure_is_drawn_of_whatever_there_is(tmp_path):
    cell = Cell("mosaic", 0.1, 5, 0)
    found = {cell: Measured(80.0, None, None, 1e6, None, at_least=False)}
    for name, known in (("one", found), ("nothing", {})):
        sweep_table.figure([cell, cell._replace(clients=10)], known, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
