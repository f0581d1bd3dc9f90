"""Find a config, change its settings and run it to its end.

The client sweep, the method table, the plan of a slice and the experiments share these functions.
"""

import argparse
import ast
import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ml_collections import ConfigDict

from mosaic_jax import compat, settings
from mosaic_jax.config import Config
from mosaic_jax.federation import load_federation
from mosaic_jax.run import experiment
from mosaic_jax.run.reader import load
from mosaic_jax.run.results import (
    ACCEPTED_MODEL,
    AVERAGED_MODEL,
    DISTILLED_STUDENT,
    GLOBAL_MODEL,
    TUNED_STUDENT,
    result_rows,
)
from mosaic_jax.types import UserError, unknown_name

Settings = Mapping[str, Any]
"""`{"section.setting": value}`."""

GetConfig = Callable[[str], ConfigDict]
"""A config file's function: from its options to its settings."""

FINAL_ROWS = (
    TUNED_STUDENT.label,
    ACCEPTED_MODEL.label,
    DISTILLED_STUDENT.label,
    f"{GLOBAL_MODEL.label}, last round",
    AVERAGED_MODEL.label,
)
"""Labels of the model a method ends with; the first one in a run's result table counts."""


def get_config(name: str) -> GetConfig:
    """Return the `get_config` function of a config, packaged or a file.

    Raises:
      UserError: see `settings.find_config`.
    """
    settings.find_config(name)  # a wrong name is answered now
    return lambda options: settings.get_config(name, options)


def configure(get_config: GetConfig, options: str, seed: int, *changes: Settings) -> Config:
    """Return the checked config of one run.

    Args:
      get_config: the config file's function.
      options: the words that follow the file's name, such as `severe,small`.
      seed: of the run.
      changes: settings that replace the file's; later ones win.

    Raises:
      UserError: a setting is wrong, see `from_config_dict`.
    """
    config = get_config(options)
    config.seed, known = seed, settings.names()
    for name, value in (pair for change in changes for pair in change.items()):
        if name not in known:
            raise UserError(unknown_name("setting", name, known))
        try:
            config.update_from_flattened_dict({name: value})
        except TypeError as error:
            raise UserError(f"{name}: {error}") from None
    return settings.from_config_dict(config.to_dict())


def run_command(config: str, changes: Settings, *flags: str) -> list[str]:
    """Return the command line of one run in a process of its own.

    Args:
      config: a config's name or path, with `:options` behind it if there are any.
      changes: overrides, one `--config.NAME=VALUE` each.
      flags: other flags of `mosaic_jax.main`.

    Raises:
      UserError: a setting is None, which no command line says.
    """
    if nothing := [name for name, value in changes.items() if value is None]:
        raise UserError(f"{nothing[0]}: no process can be given None; take a config without it")
    overrides = [f"--config.{name}={value}" for name, value in changes.items()]
    program = [sys.executable, "-m", "mosaic_jax.main"]
    return [*program, f"--config={config}", *overrides, *flags]


def run_to_end(config: Config, workdir: Path, split: str = "test") -> dict[str, float]:
    """Run a config in this process unless it has ended; return its `accuracies`."""
    if not (workdir / "summary.json").exists():
        experiment.run(load_federation(config), workdir, print_progress)
    return accuracies(workdir, split)


def accuracies(workdir: Path, split: str = "test") -> dict[str, float]:
    """Return a run's accuracies in percent, by the labels of its result table.

    Args:
      workdir: of the run.
      split: "test", "local_test" or, where images are held out, "validation".
    """
    return {row.label: 100 * getattr(row, split) for row in result_rows(load(workdir))}


def final_accuracy(rows: Mapping[str, float]) -> float:
    """Return the accuracy of the model a method ends with, out of a run's `accuracies`."""
    return next(rows[label] for label in FINAL_ROWS if label in rows)


def print_progress(stage: object, done: int, seconds: float, figures: Mapping[str, Any]) -> None:
    """Print one line for each evaluation."""
    found = {name: value for name, value in figures.items() if name.endswith("_accuracy")}
    if found:
        print(getattr(stage, "name", stage), done, found, flush=True)


def command_parser(doc: str | None, program: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose help is a module's docstring as it stands.

    From now on the process prints UTF-8, and ends with one line at an error that the user can mend.
    """
    compat.print_utf8()
    sys.excepthook = _one_line
    layout = argparse.RawTextHelpFormatter
    return argparse.ArgumentParser(program, description=doc, formatter_class=layout)


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what nothing has caught: a `UserError` without its traceback."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def cell_parser(doc: str | None, root: str, levels: list[str]) -> argparse.ArgumentParser:
    """Return a parser with levels of heterogeneity, seeds, settings and the folder of the runs."""
    parser = command_parser(doc)
    parser.add_argument("--levels", nargs="+", default=levels)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path(root))
    add_settings(parser)
    return parser


def add_settings(
    parser: argparse.ArgumentParser, flag: str = "--set", text: str = "other settings"
) -> None:
    """Add a flag that takes `NAME=VALUE` pairs."""
    parser.add_argument(
        flag, nargs="*", default=[], metavar="NAME=VALUE", type=assignment, help=text
    )


def assignment(text: str) -> tuple[str, Any]:
    """Parse `NAME=VALUE`; the value is Python or JSON, and a word needs no quotation marks.

    Raises:
      ValueError: there is no equals sign.
    """
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(text)
    for parse in (ast.literal_eval, json.loads):
        with contextlib.suppress(ValueError, SyntaxError):
            return name, parse(value)
    return name, value


def add_config(parser: argparse.ArgumentParser, default: str = "digits") -> None:
    """Add `--config NAME`, whose value becomes the file's `get_config`."""
    parser.add_argument(
        "--config",
        default=default,
        type=_config_argument,
        help="name of a packaged config, or a file",
    )


def _config_argument(name: str) -> GetConfig:
    try:
        return get_config(name)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
