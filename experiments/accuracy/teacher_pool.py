"""Measure what it costs the student to use each generated image and its answer several times.

    python -m experiments.accuracy.teacher_pool --seeds 100 101 102
    python -m experiments.accuracy.teacher_pool --config fashion_mnist --set local_update.rounds=12

A pool is `PASSES` or `PASSESxBLOCK_STEPS`, the settings `pool_passes` and `block_steps` of
`knowledge_distillation`. A block draws its images once, so with more steps in a block a pool holds
more images. The runs of a level and seed share all stages before the distillation. All make
the same number of distillation steps.

Settings are chosen by this table, so it gives accuracy in percent on the held-out tenth of the
clients' images: mean and sample standard deviation over the seeds, and the same for the difference
from the first pool, taken seed by seed. The last column is the stage's median time of a step, over
that of the first pool in the same seed.

Every run resumes; started again, the command only prints. Cells are independent: to run them side
by side, start the command once for each, with one level and one seed.
"""

import argparse
import re
import sys
from pathlib import Path
from statistics import median

from experiments.accuracy.branches import HELD_OUT, adopt_stages, shared_stages, write_tables
from mosaic_jax.run.reader import load
from mosaic_jax.run.results import DISTILLED_STUDENT, TEACHER, TUNED_STUDENT
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.launch import GetConfig, Settings
from mosaic_jax.sweep.text import markdown_table, mean_and_std_text

STAGE = "knowledge_distillation"
MODELS = {"teacher": TEACHER, "distilled": DISTILLED_STUDENT, "fine-tuned": TUNED_STUDENT}
"""Columns of the table, and the models whose accuracy they give."""


def pool_settings(text: str) -> Settings:
    """Read a pool, `PASSES` or `PASSESxBLOCK_STEPS`, as settings.

    Raises:
      ArgumentTypeError: it is neither.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither PASSES nor PASSESxBLOCK_STEPS")
    names = ("pool_passes", "block_steps")
    found = zip(names, match.groups(), strict=True)
    return {f"{STAGE}.{name}": int(value) for name, value in found if value}


def run_cell(
    get_config: GetConfig, root: Path, level: str, seed: int, pools: list[str], changes: Settings
) -> list[dict[str, float]]:
    """Run all pools of a level and seed; return held-out accuracies and seconds of each."""
    rows = []
    for pool in pools:
        own, workdir = pool_settings(pool), root / f"{level}-{seed}-{pool}"
        if pool != pools[0]:
            adopt_stages(root / f"{level}-{seed}-{pools[0]}", workdir, shared_stages(own))
        config = launch.configure(get_config, level, seed, changes, HELD_OUT, own)
        launch.run_to_end(config, workdir)
        rows.append(figures(workdir))
    return rows


def figures(workdir: Path) -> dict[str, float]:
    """Return a run's held-out accuracies in percent, and the stage's seconds a step."""
    run = load(workdir)
    found: dict[str, float] = {}
    for name, model in MODELS.items():
        validation = model.evaluations(run)[-1].validation
        assert validation is not None
        found[name] = 100 * validation
    seconds = [line["seconds"] for line in run.lines_of(STAGE)]
    return found | {"step": median(seconds) / run.block_steps(STAGE)}


def table(level: str, pools: list[str], seeds: list[list[dict[str, float]]]) -> str:
    """Return a Markdown table: a row a pool, mean and standard deviation over seeds."""
    lines = [[level, *MODELS, "change, distilled", "change, fine-tuned", "time of a step"]]
    for pool, rows in zip(pools, zip(*seeds, strict=True), strict=True):
        cells = [mean_and_std_text([row[name] for row in rows]) for name in MODELS]
        pairs = [(row, seed[0]) for row, seed in zip(rows, seeds, strict=True)]
        for name in ("distilled", "fine-tuned"):
            cells.append(mean_and_std_text([row[name] - base[name] for row, base in pairs]))
        ratio = median(row["step"] / base["step"] for row, base in pairs)
        lines.append([pool, *cells, f"{ratio:.2f}"])
    return markdown_table(lines)


def main(argv: list[str]) -> None:
    """Run all pools, print their tables and write them to `ROOT/table.md`."""
    parser = launch.cell_parser(__doc__, "runs/teacher_pool", ["moderate", "severe"])
    parser.set_defaults(seeds=[100, 101, 102])
    launch.add_config(parser)
    parser.add_argument("--pools", nargs="+", default=["1", "2", "4", "8"], metavar="POOL")
    arguments = parser.parse_args(argv)
    for pool in arguments.pools:
        pool_settings(pool)
    config, root, pools = arguments.config, arguments.root, arguments.pools
    write_tables(
        arguments,
        lambda level, seed: run_cell(config, root, level, seed, pools, dict(arguments.set)),
        lambda level, cells: table(level, pools, cells),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
