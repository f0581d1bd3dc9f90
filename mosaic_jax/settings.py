"""From what a user writes to a checked `Config`.

A config file builds an `ml_collections.ConfigDict` from the defaults with `make` and changes a few
lines; `get_config` finds and loads it. `from_config_dict` turns it back and refuses wrong names,
types, values and combinations with one line that says what was meant.
"""

import dataclasses
import runpy
import types as builtin_types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mosaic_jax.config import Config, Range, needs_generators
from mosaic_jax.types import UserError, unknown_name

HETEROGENEITY = {"mild": 1.0, "moderate": 0.1, "severe": 0.01}
"""Named levels of label heterogeneity: the Dirichlet concentration alpha."""

OPTIONS = ("small", "narrow", *HETEROGENEITY)
"""Words that may follow a config's name."""

CONFIGS = Path(__file__).parent / "configs"
"""The packaged configs; in a clone of the repository a link to its `configs/`."""

WHOLE = Range("must be at least 1", lambda value: value >= 1)
REAL = Range("must be a finite number, at least 0", lambda value: 0 <= value < float("inf"))
"""What holds for numbers of which `config.py` says nothing else, and for all real numbers."""


def make(
    options: str,
    changes: Mapping[str, Any],
    small: Mapping[str, Any],
    narrow: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """Return a config file's settings: the defaults with `changes` and what its `:options` ask for.

    Args:
      options: comma-separated words behind the file's name: a level of `HETEROGENEITY`; `narrow`
        for clients that hold sub-models; `small` for a form that ends in about a minute on a CPU.
        May be empty.
      changes: dotted setting -> value.
      small: the same, on top, for the `small` form.
      narrow: the same for the `narrow` form, if that is not `small` as well.

    Raises:
      UserError: on an unknown word, naming the nearest.
    """
    config = ConfigDict(_with_placeholders(Config()))
    config.update_from_flattened_dict(dict(changes))
    words = [word for word in options.split(",") if word]
    for word in words:
        if word not in OPTIONS:
            raise UserError(unknown_name("option", word, OPTIONS))
        config.partition.alpha = HETEROGENEITY.get(word, config.partition.alpha)
    if "small" in words:
        config.update_from_flattened_dict(dict(small))
    elif "narrow" in words:
        config.update_from_flattened_dict(dict(narrow or {}))
    if "narrow" in words:
        _narrow(config)
    return config


def _narrow(config: ConfigDict) -> None:
    """Give clients the paper's budgets, first channels of each layer, and room to train alone.

    Rounds after the distillation would put the student together from sub-models and undo it, so
    clients make their steps before the experts are formed (`docs/decisions.md`).
    """
    config.submodel.update(rho=5, sigma=4, scheme="static")
    experts, tuning, local = config.model_aggregation, config.fine_tuning, config.local_update
    experts.steps += tuning.rounds * local.steps
    experts.learning_rate = local.learning_rate
    tuning.rounds = 0


def _with_placeholders(node: Any) -> dict[str, Any]:
    """Return defaults as nested dicts; None becomes its type, so that it can be overridden."""
    hints = get_type_hints(type(node))

    def entry(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return _with_placeholders(value)
        return placeholder(get_args(hints[name])[0]) if value is None else value

    return {
        each.name: entry(each.name, getattr(node, each.name)) for each in dataclasses.fields(node)
    }


def config_files() -> dict[str, Path]:
    """Return the file of every packaged config by its name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.py")) if path.stem != "common"}


def find_config(name: str) -> Path:
    """Return the file of a config.

    Args:
      name: a path, or the name of a packaged config: `digits`, or `configs/digits.py` where the
        working directory has no such file.

    Raises:
      UserError: there is none; names the nearest.
    """
    packaged = config_files()
    paths = {f"configs/{stem}.py": path for stem, path in packaged.items()}
    if (path := Path(name)).is_file():
        return path
    if name in packaged or name in paths:
        return (packaged | paths)[name]
    if path.name == name and not path.suffix:
        raise UserError(unknown_name("config", name, packaged))
    here = map(str, Path("configs").glob("*.py"))
    raise UserError(unknown_name("config", name, sorted({*paths, *here})))


def get_config(name: str, options: str = "") -> ConfigDict:
    """Return the settings of a config, for `from_config_dict`.

    Args:
      name: as for `find_config`.
      options: as for `make`.

    Raises:
      UserError: no such config or option; names the nearest.
    """
    load = runpy.run_path(str(find_config(name)))["get_config"]
    config: ConfigDict = load(options) if options else load()
    return config


def names() -> list[str]:
    """Return the names of all settings, dotted."""
    return list(flatten_dict(dataclasses.asdict(Config()), sep="."))


def changes_results(name: str) -> bool:
    """Return whether a setting changes what a run computes, beyond float rounding.

    Its section says so, in `changes_results`. A run may be resumed with other values of those that
    do not. An unknown setting counts as one that does.

    Args:
      name: of the setting, dotted.
    """
    sections = {each.name: each.default_factory for each in dataclasses.fields(Config)}
    return getattr(sections.get(name.partition(".")[0]), "changes_results", True)


def from_config_dict(settings: Mapping[str, Any]) -> Config:
    """Return settings as checked frozen dataclasses.

    Raises:
      UserError: unknown name, wrong type, value out of range, or settings that contradict.
    """
    config = _build(Config, settings, "")
    _check_clients(config)
    _check_distillation(config)
    return config


def _build(cls: Any, settings: Mapping[str, Any], prefix: str) -> Any:
    """Return a section of settings, or all of them, each checked alone."""
    if not isinstance(settings, Mapping):
        raise UserError(f"setting {prefix[:-1]!r} takes settings of its own, not {settings!r}")
    hints = get_type_hints(cls, include_extras=True)
    known = [each.name for each in dataclasses.fields(cls)]
    for name in settings:
        if name not in known:
            raise UserError(unknown_name("setting", name, known, prefix))
    values = {
        name: _build(hints[name], value, f"{prefix}{name}.")
        if dataclasses.is_dataclass(hints[name])
        else _checked(prefix + name, value, hints[name])
        for name, value in settings.items()
    }
    return cls(**values)


def _checked(path: str, value: Any, hint: Any) -> Any:
    """Return a value of the type that `config.py` gives a setting, if it is in its range."""
    plain, *ranges = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    words = get_args(plain) if get_origin(plain) is Literal else ()
    value = _typed(path, value, str if words else plain)
    if words and value not in words:
        raise UserError(unknown_name(path, value, words))
    if type(value) is int:
        ranges = ranges or [WHOLE]
    elif type(value) is float:
        ranges.append(REAL)
    for allowed in ranges:
        if value is not None and not allowed.holds(value):
            raise UserError(f"{path} = {value}: {allowed.words}")
    return value


def _typed(path: str, value: Any, hint: Any) -> Any:
    """Return the value if its type is right, a whole number as a real one where that is asked."""
    allowed = get_args(hint) if isinstance(hint, builtin_types.UnionType) else (hint,)
    if type(value) in allowed:
        return value
    if type(value) is int and float in allowed:
        return float(value)
    if hint == tuple[float, ...] and isinstance(value, tuple | list):
        return tuple(_typed(f"{path}[{i}]", entry, float) for i, entry in enumerate(value))
    names = " or ".join("nothing" if t is builtin_types.NoneType else t.__name__ for t in allowed)
    raise UserError(f"setting {path!r} takes {names}, not {value!r}")


def _check_clients(config: Config) -> None:
    """Refuse what clients hold and do if it contradicts their number or each other."""
    local, clients, tuning = config.local_update, config.partition.clients, config.fine_tuning
    if local.clients_per_round > clients:
        raise UserError(
            f"local_update.clients_per_round = {local.clients_per_round}, but there are {clients}"
        )
    if local.final_learning_rate is not None and not local.learning_rate:
        raise UserError(
            "local_update.final_learning_rate needs a local_update.learning_rate greater than 0"
        )
    shares = config.submodel.capacities
    if shares and len(shares) != clients:
        raise UserError(f"submodel.capacities has {len(shares)} entries for {clients} clients")
    if shares and config.submodel.rho:
        raise UserError("submodel.capacities and submodel.rho say the same thing; give one of them")
    if not (shares or config.submodel.rho):
        return
    if config.generator_optimization.adversary == "local":
        raise UserError(
            "generator_optimization.adversary = 'local' needs clients that hold the whole model"
        )
    if tuning.rounds and tuning.batch_norm == "frozen":
        raise UserError(
            "fine_tuning.batch_norm = 'frozen' needs clients that hold the whole model; "
            "set fine_tuning.rounds = 0, or take the config's option 'narrow'"
        )


def _check_distillation(config: Config) -> None:
    """Refuse a distillation without images to learn from, room for them, or a loss."""
    generator, distillation = config.generator_optimization, config.knowledge_distillation
    for name, stage in (
        ("generator_optimization", generator),
        ("knowledge_distillation", distillation),
    ):
        if stage.steps % stage.block_steps:
            raise UserError(
                f"{name}.steps = {stage.steps} is not a multiple of "
                f"{name}.block_steps = {stage.block_steps}"
            )
    if generator.adversary == "projected" and generator.frozen_every > 1:
        raise UserError(
            "generator_optimization.frozen_every saves nothing with adversary = 'projected', which "
            "asks the frozen model in every step; set it to 1"
        )
    if distillation.pool_passes > distillation.block_steps:
        raise UserError(
            f"knowledge_distillation.pool_passes = {distillation.pool_passes} makes a pool smaller "
            "than a batch; the most passes are knowledge_distillation.block_steps = "
            f"{distillation.block_steps}"
        )
    if config.method == "mosaic" and needs_generators(config) and not generator.steps:
        raise UserError(
            f"knowledge_distillation.images = {distillation.images!r}, but "
            "generator_optimization.steps is 0"
        )
    if distillation.images == "averaged" and config.parallel.memory_gib:
        raise UserError(
            "knowledge_distillation.images = 'averaged' needs all generators in memory; set "
            "parallel.memory_gib = 0"
        )
    if not (distillation.kl_weight or distillation.ce_weight or distillation.js_weight):
        raise UserError(
            "knowledge_distillation: at least one of kl_weight, ce_weight and "
            "js_weight must be greater than 0"
        )
