"""The flags of `python -m mosaic_jax.main`: what there is, and how settings are read from them."""

import ast

from absl import flags
from ml_collections import config_flags
from rich.table import Table

from mosaic_jax import methods, settings
from mosaic_jax.config import Config
from mosaic_jax.types import UserError, unknown_name

CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="Settings: a config of the list below or a file, with options: digits:severe, "
    "digits:severe,small or my_config.py:small.",
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
ALL = (CONFIG, WORKDIR, PLAN, TRACK, DISTRIBUTED, COORDINATOR, HOSTS, HOST, HOSTS_SECONDS)


def read(argv: list[str]) -> Config:
    """Return the checked settings that the flags ask for.

    Raises:
      UserError: the flags are wrong, in whatever way.
    """
    _check_names(argv)
    rest = _parse(_with_files(argv))
    if CONFIG.value is None:
        raise UserError(
            "--config is missing; for example --config=digits (--config alone lists them)"
        )
    if len(rest) > 1:
        raise UserError(
            f"unexpected argument {rest[1]!r}; settings are given as --config.name=value"
        )
    config = settings.from_config_dict(CONFIG.value.to_dict())
    if config.method in methods.METHODS:
        methods.check_used(config.method, _given(argv))
    return config


def _parse(argv: list[str]) -> list[str]:
    """Set the flags; return the arguments that are none."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        raise UserError(" ".join(str(text).split())) from None


def _with_files(argv: list[str]) -> list[str]:
    """Return the arguments with the file of the config in place of its name."""
    found = list(argv)
    for i, argument in enumerate(argv[1:], 1):
        flag, equals, value = _split(argument)
        if flag == "config" and equals:
            found[i] = f"--config={_with_file(value)}"
        elif flag == "config" and i + 1 < len(argv):
            found[i + 1] = _with_file(argv[i + 1])
    return found


def _with_file(value: str) -> str:
    name, colon, options = value.partition(":")
    return f"{settings.find_config(name)}{colon}{options}" if name else value


def _split(argument: str) -> tuple[str, str, str]:
    """Return a flag's name, its equals sign if it has one, and its value."""
    return argument.removeprefix("-").removeprefix("-").partition("=")


def _given(argv: list[str]) -> list[str]:
    """Return the settings on the command line, dotted."""
    given = (_split(argument)[0] for argument in argv[1:])
    return [flag.removeprefix("config.") for flag in given if flag.startswith("config.")]


def _check_names(argv: list[str]) -> None:
    """Answer a mistyped setting before the flags library meets it."""
    for name in _given(argv):
        if name not in settings.names():
            raise UserError(unknown_name("setting", name, settings.names()))


def tables(flag: str) -> list[Table]:
    """Return what `--help` and `--config`, given alone, show."""
    return [_flags(), _configs()] if flag == "--help" else [_configs()]


def _flags() -> Table:
    """Return a table of every flag with its help."""
    table = Table("flag", "meaning", title="python -m mosaic_jax.main --config=NAME[:OPTIONS] ...")
    for flag in ALL:
        table.add_row(f"--{flag.name}", flags.FLAGS[flag.name].help)
    sections = dict.fromkeys(name.split(".")[0] for name in settings.names() if "." in name)
    table.add_row(
        "--config.NAME=VALUE",
        f"Changes a setting, such as --config.local_update.rounds=20. Sections: "
        f"{', '.join(sections)}; all settings with defaults and units are in mosaic_jax/config.py.",
    )
    return table


def _configs() -> Table:
    """Return a table of the packaged configs, with the first line of each."""
    options = "options, as in digits:severe,small: " + ", ".join(settings.OPTIONS)
    table = Table("config", "what it runs", title=options)
    for name, path in settings.config_files().items():
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        table.add_row(f"--config={name}", text.partition("\n")[0])
    return table
