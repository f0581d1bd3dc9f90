"""The flags of `python -m mosaic_jax.main`: what there is, and how settings are read from them."""

import ast
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.table import Table

from mosaic_jax import checks, methods, settings
from mosaic_jax.config import Config
from mosaic_jax.types import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="Settings file, with options: configs/digits.py:severe or configs/digits.py:small.",
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; the same one resumes it.")
PLAN = flags.DEFINE_bool(
    "plan", False, "Say what would run and, by two blocks of each stage, how long; keep nothing."
)
TRACK = flags.DEFINE_string(
    "track", "", "Where figures go beside metrics.jsonl: tensorboard, wandb or both, with a comma."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One of several hosts, found in SLURM's, Open MPI's or the cloud's settings.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "ADDRESS:PORT of the first of several hosts, where nothing says it."
)
HOSTS = flags.DEFINE_integer("hosts", None, "How many hosts there are, with --coordinator.")
HOST = flags.DEFINE_integer("host", None, "Which of them this is, from 0, with --coordinator.")
HOSTS_SECONDS = flags.DEFINE_integer("hosts_seconds", 120, "How long hosts wait for each other.")


def read(argv: list[str]) -> Config:
    """Flags -> checked settings; every way they can be wrong ends in a `UserError`."""
    _check_names(argv)
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None:
            raise UserError(
                "--config is missing; for example --config=configs/digits.py (--config alone "
                "lists them)"
            )
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        raise UserError(" ".join(str(text).split())) from None
    if len(rest) > 1:
        raise UserError(
            f"unexpected argument {rest[1]!r}; settings are given as --config.name=value"
        )
    config = settings.from_config_dict(CONFIG.value.to_dict())
    if config.method in methods.METHODS:
        methods.check_used(config.method, _given(argv))
    return config


def _given(argv: list[str]) -> list[str]:
    """The settings on the command line, dotted."""
    flags_given = (argument.lstrip("-").partition("=")[0] for argument in argv[1:])
    return [flag.removeprefix("config.") for flag in flags_given if flag.startswith("config.")]


def _check_names(argv: list[str]) -> None:
    """Answer a mistyped config file or setting before the flags library meets it."""
    for argument in argv[1:]:
        flag, _, value = argument.removeprefix("-").removeprefix("-").partition("=")
        file = value.partition(":")[0]
        if flag == "config" and file and not Path(file).is_file():
            known = sorted(str(path) for path in Path("configs").glob("*.py"))
            raise UserError(checks.unknown("config", file, known))
        name = flag.removeprefix("config.")
        if name != flag and name not in settings.names():
            raise UserError(checks.unknown("setting", name, settings.names()))


def tables(flag: str) -> list[Table]:
    """What `--help` and `--config`, given alone, show."""
    return [_flags(), _configs()] if flag == "--help" else [_configs()]


def _flags() -> Table:
    """Every flag with its help."""
    table = Table("flag", "meaning", title="python -m mosaic_jax.main --config=FILE[:OPTIONS] ...")
    for flag in (
        CONFIG,
        WORKDIR,
        PLAN,
        TRACK,
        DISTRIBUTED,
        COORDINATOR,
        HOSTS,
        HOST,
        HOSTS_SECONDS,
    ):
        table.add_row(f"--{flag.name}", flags.FLAGS[flag.name].help)
    table.add_row(
        "--config.NAME=VALUE",
        f"Changes a setting, such as --config.local_update.rounds=20. Sections: {_sections()}; all "
        "settings with defaults and units are in mosaic_jax/config.py.",
    )
    return table


def _sections() -> str:
    return ", ".join(dict.fromkeys(n.split(".")[0] for n in settings.names() if "." in n))


def _configs() -> Table:
    """The config files of this directory, with the first line of each."""
    table = Table("config", "what it runs", title="options: " + ", ".join(settings.OPTIONS))
    for path in sorted(Path("configs").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        table.add_row(f"--config={path}", text.partition("\n")[0])
    return table
