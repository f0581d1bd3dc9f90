"""Train the generators in several ways, all else equal, and judge their images.

    python -m experiments.accuracy.generators --config cifar10_cpu --seeds 100
    python -m experiments.accuracy.generators --recipes dcgan projected --set local_update.rounds=12

The runs of a level and seed share all stages before the generators. Accuracies are those of the
held-out tenth of the clients' images, as settings are chosen by them, without acceptance, and all
generators are used. Columns:

- Frechet distance of a generator's images from its client's, in the features of a judge: the same
  classifier, trained on all training images in one place, which no federation could do. Over the
  clients, the mean weighted by their images, the smallest client and the largest.
- overlap, in percent: how much of the class shares that the judge sees in the images are the
  client's.
- own view, in percent: share of images that the client's own model puts into the class that was
  asked for (conditional generators only).
- taught: accuracy on real images of a small network that learns the judge's answers to generated
  images only.
- distilled, fine-tuned: the student's accuracy.
- core-seconds: of the training of one generator, wall time times cores.

Every run resumes; started again, the command only judges and prints. The clients' figures are in
`ROOT/clients.csv`, the pictures in each run's report.
"""

import sys
from pathlib import Path

import joblib
import numpy as np

from experiments.accuracy.branches import HELD_OUT, adopt_stages, shared_stages, write_tables
from experiments.accuracy.image_quality import Judge, draw_images, taught
from mosaic_jax.configs import common
from mosaic_jax.run.load_run import LoadedRun, load_run
from mosaic_jax.run.reader import load
from mosaic_jax.run.results import DISTILLED_STUDENT, GLOBAL_MODEL, TUNED_STUDENT
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.launch import GetConfig, Settings
from mosaic_jax.sweep.text import markdown_table, mean_and_std_text

SECTION = "generator_optimization"


def recipe(**changes: object) -> Settings:
    """Return settings of the section."""
    return {f"{SECTION}.{name}": value for name, value in changes.items()}


DCGAN = recipe(
    adversary="dcgan",
    conditional=False,
    upsampling="transposed",
    diversity_weight=1.0,
    inversion_threshold=0,
    inversion_weight=0.01,
)
"""The reference's generators, as the PyTorch baseline has them."""

PROJECTED: Settings = {
    **common.COLOUR_GENERATORS,
    **recipe(adversary_width=32, frozen_every=1),
}
RECIPES: dict[str, Settings] = {
    "projected": PROJECTED,
    "dcgan": {**DCGAN, **recipe(adversary_width=16, frozen_every=4)},
    "projected, transposed convolutions": {**PROJECTED, **recipe(upsampling="transposed")},
    "projected, unconditional": {**PROJECTED, **recipe(conditional=False)},
    "projected, no inversion loss": {**PROJECTED, **recipe(inversion_weight=0.0)},
    "projected, no class loss": {**PROJECTED, **recipe(class_weight=0.0)},
    "dcgan, conditional, nearest, class and inversion losses": {
        **PROJECTED,
        **recipe(adversary="dcgan", adversary_width=16),
    },
}
"""Ways to train generators: name, and the settings that are its own."""

EVERY: Settings = {**HELD_OUT, **recipe(unusable="use")}
"""Settings of every run: bad images have to show in the student."""

JUDGE: Settings = {
    "data.validation_fraction": 0.0,
    "method": "fedavg",
    "partition.kind": "iid",
    "partition.clients": 1,
    "local_update.steps": 20,
    "local_update.clients_per_round": 0,
    "acceptance.rule": "always",
}
COLUMNS = (
    "Frechet",
    "smallest client",
    "largest client",
    "overlap",
    "own view",
    "taught",
    "distilled",
    "fine-tuned",
    "distilled − global",
    "core-seconds",
)
"""Columns of the table, see the module."""


def slug(name: str) -> str:
    """Turn a recipe's name into a folder's."""
    return "-".join(name.replace(",", "").split())


def judge_of(get_config: GetConfig, root: Path, level: str, seed: int, changes: Settings) -> Judge:
    """Train the judge in one place, unless it is there; it judges on this level's clients."""
    config = launch.configure(get_config, level, seed, changes, HELD_OUT, JUDGE)
    launch.run_to_end(config, root / f"{level}-{seed}-judge")
    own = launch.configure(get_config, level, seed, changes, HELD_OUT)
    trained = load_run(root / f"{level}-{seed}-judge")
    return Judge(launch.load_federation(own), trained.student)


def run_cell(
    get_config: GetConfig,
    root: Path,
    level: str,
    seed: int,
    recipes: list[str],
    changes: Settings,
) -> list[dict[str, float]]:
    """Run some recipes of a level and seed; return the row of each."""
    judge, rows = judge_of(get_config, root, level, seed, changes), []
    for name in recipes:
        workdir = root / f"{level}-{seed}-{slug(name)}"
        if name != recipes[0]:
            first = root / f"{level}-{seed}-{slug(recipes[0])}"
            adopt_stages(first, workdir, shared_stages(RECIPES[name]))
        config = launch.configure(get_config, level, seed, changes, EVERY, RECIPES[name])
        launch.run_to_end(config, workdir)
        clients = judge_run(judge, load_run(workdir))
        write_clients(root / "clients.csv", [level, seed, name], clients)
        rows.append(figures(workdir, judge, clients))
    return rows


def judge_run(judge: Judge, run: LoadedRun) -> dict[str, np.ndarray]:
    """Judge the generators of a run; also return its images' worth to a student, "taught" []."""
    generated = draw_images(run.federation, run.state["generators"])
    found = judge.clients(generated)
    found["taught"] = np.array(taught(judge, generated))
    return found


def figures(workdir: Path, judge: Judge, clients: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the row of a run."""
    run, sizes = load(workdir), judge.federation.clients.sizes
    lines, shares = run.lines_of(SECTION), sizes / sizes.sum()
    frechet, match = clients["frechet"], lines[-1].get("class_match")
    accuracies = {
        name: 100 * (model.evaluations(run)[-1].validation or 0.0)
        for name, model in (
            ("global", GLOBAL_MODEL),
            ("distilled", DISTILLED_STUDENT),
            ("fine-tuned", TUNED_STUDENT),
        )
    }
    seconds = sum(line["seconds"] for line in lines)
    own_view = {} if match is None else {"own view": 100 * float(shares @ np.array(match))}
    return own_view | {
        "Frechet": float(shares @ frechet),
        "smallest client": float(frechet[sizes.argmin()]),
        "largest client": float(frechet[sizes.argmax()]),
        "overlap": 100 * float(shares @ clients["overlap"]),
        "taught": float(clients["taught"]),
        "distilled": accuracies["distilled"],
        "fine-tuned": accuracies["fine-tuned"],
        "distilled − global": accuracies["distilled"] - accuracies["global"],
        "core-seconds": seconds * joblib.cpu_count() / len(sizes),
    }


def write_clients(path: Path, names: list[object], clients: dict[str, np.ndarray]) -> None:
    """Add the clients' figures of a run to a file of comma-separated values."""
    if not path.exists():
        path.write_text("level,seed,recipe,client,frechet,overlap\n", encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        for client, pair in enumerate(zip(clients["frechet"], clients["overlap"], strict=True)):
            text = [*names[:2], f'"{names[2]}"', client, *(f"{value:.3f}" for value in pair)]
            file.write(",".join(map(str, text)) + "\n")


def table(level: str, recipes: list[str], seeds: list[list[dict[str, float]]]) -> str:
    """Return a Markdown table: a row a recipe, mean and standard deviation over seeds."""
    lines = [[level, *COLUMNS]]
    for name, rows in zip(recipes, zip(*seeds, strict=True), strict=True):
        columns = [[row[column] for row in rows if column in row] for column in COLUMNS]
        lines.append([name, *(mean_and_std_text(column) if column else "-" for column in columns)])
    return markdown_table(lines)


def main(argv: list[str]) -> None:
    """Run all recipes, print their tables and write them to `ROOT/table.md`."""
    parser = launch.cell_parser(__doc__, "runs/generators", ["moderate"])
    parser.set_defaults(seeds=[100, 101, 102])
    launch.add_config(parser, "fashion_mnist")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    arguments = parser.parse_args(argv)
    (arguments.root / "clients.csv").unlink(missing_ok=True)
    config, root, recipes = arguments.config, arguments.root, arguments.recipes
    write_tables(
        arguments,
        lambda level, seed: run_cell(config, root, level, seed, recipes, dict(arguments.set)),
        lambda level, cells: table(level, recipes, cells),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
