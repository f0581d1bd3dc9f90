"""The flags of `python -m mosaic_jax.main`: what there is, and how settings are read from them."""

import ast
import dataclasses
import os
from functools import partial
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.table import Table

from mosaic_jax import methods, settings
from mosaic_jax.config import Config
from mosaic_jax.types import UserError, unknown_name


@dataclasses.dataclass(frozen=True)
class Flags:
    """What a command line asks for.

    Attributes:
      config: the checked settings.
      workdir: of the run.
      plan: say what would run instead of running it.
      track: names of trackers, with a comma between them; may be empty.
      distributed: one of several hosts, found in the settings of a scheduler or cloud.
      coordinator: ADDRESS:PORT of the first of several hosts, or None.
      hosts: their number, or None.
      host: which of them this is, from 0, or None.
      hosts_seconds: how long hosts wait for each other.
      words: the command line itself, with what its flag files say in their place.
    """

    config: Config
    workdir: Path
    plan: bool
    track: str
    distributed: bool
    coordinator: str | None
    hosts: int | None
    host: int | None
    hosts_seconds: int
    words: tuple[str, ...]


NAMES = tuple(each.name for each in dataclasses.fields(Flags) if each.name != "words")
"""Names of the flags."""


def _define(argv: list[str]) -> flags.FlagValues:
    """Return the flags, not parsed; overrides of settings are looked for in `argv`.

    They are not the process's own `absl.flags.FLAGS`, which another program may use.
    """
    found = flags.FlagValues()
    text, switch, number = (
        partial(define, flag_values=found)
        for define in (flags.DEFINE_string, flags.DEFINE_bool, flags.DEFINE_integer)
    )
    config_flags.DEFINE_config_file(
        "config",
        help_string="Settings: a config of the list below or a file, with options: digits:severe, "
        "digits:severe,small or my_config.py:small.",
        flag_values=found,
        sys_argv=argv,
    )
    text("workdir", None, "Directory of the run; the same one resumes it.")
    switch("plan", False, "Say what would run and, by two blocks of each stage, how long.")
    text("track", "", "Where figures go, too: tensorboard, wandb or both, with a comma.")
    switch("distributed", False, "One of several hosts, as SLURM, Open MPI or the cloud says.")
    text("coordinator", None, "ADDRESS:PORT of the first of several hosts, where nothing says it.")
    number("hosts", None, "How many hosts there are, with --coordinator.")
    number("host", None, "Which of them this is, from 0, with --coordinator.")
    number("hosts_seconds", 120, "How long hosts wait for each other.")
    return found


def read(argv: list[str]) -> Flags:
    """Return what a command line asks for.

    Args:
      argv: the program's name and its arguments, like `sys.argv`.

    Raises:
      UserError: the flags are wrong, in whatever way.
    """
    words = _with_flag_files(argv)
    for word in words:
        try:
            os.fsencode(word).decode()
        except UnicodeError:
            raise UserError(f"{word!a} is not UTF-8; rename that file or folder") from None
    _check_names(words)
    argv = _with_files(words)
    found = _define(argv)
    rest = _parse(found, argv)
    values = found.flag_values_dict()
    if values["config"] is None:
        raise UserError(
            "--config is missing; for example --config=digits (--config alone lists them)"
        )
    if len(rest) > 1:
        raise UserError(
            f"unexpected argument {rest[1]!r}; settings are given as --config.name=value"
        )
    config = settings.from_config_dict(values["config"].to_dict())
    if config.method in methods.METHODS:
        methods.check_used(config.method, _given(argv))
    given = {name: values[name] for name in NAMES}
    workdir = Path(given["workdir"] or f"runs/{config.data.name}")
    return Flags(**given | {"config": config, "workdir": workdir}, words=tuple(words))


def _with_flag_files(argv: list[str]) -> list[str]:
    """Return the arguments with those of `--flagfile=FILE` in its place."""
    try:
        expanded: list[str] = flags.FlagValues().read_flags_from_files(argv)
    except (flags.Error, UnicodeDecodeError) as error:
        raise UserError(f"--flagfile: {error}") from None
    return expanded


def _parse(found: flags.FlagValues, argv: list[str]) -> list[str]:
    """Set the flags; return the arguments that are none."""
    try:
        rest: list[str] = found(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        raise UserError(" ".join(str(text).split())) from None
    return rest


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
    """Return the settings on the command line, dotted; `--noconfig.NAME` turns one off."""
    given = (_split(argument)[0] for argument in argv[1:] if argument.startswith("-"))
    overrides = (flag.removeprefix("no") for flag in given)
    return [flag.removeprefix("config.") for flag in overrides if flag.startswith("config.")]


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
    defined = _define([])
    for name in NAMES:
        table.add_row(f"--{name}", defined[name].help)
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
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        table.add_row(f"--config={name}", text.partition("\n")[0])
    return table
