"""From what a user writes to a checked `Config`.

Config files build an `ml_collections.ConfigDict` from the defaults with `make` and change a few
lines; `from_config_dict` turns it back and refuses wrong names, types, values and combinations with
one line that says what was meant.
"""

import dataclasses
import difflib
import types as builtin_types
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mosaic_jax.config import Config, needs_generators
from mosaic_jax.types import UserError

HETEROGENEITY = {"mild": 1.0, "moderate": 0.1, "severe": 0.01}
"""Named levels of label heterogeneity: the Dirichlet concentration alpha."""

OPTIONS = ("small", "narrow", *HETEROGENEITY)
"""Words that may follow a config file's name."""

FULL = {
    "local_update.learning_rate": 0.05,
    "local_update.final_learning_rate": 0.005,
    "knowledge_distillation.class_prior": True,
    "knowledge_distillation.learning_rate": 1e-3,
    "knowledge_distillation.batch_norm": "train",
    "fine_tuning.rounds": 10,
    "fine_tuning.batch_norm": "frozen",
}
"""What the full forms of the published sets for accelerators have in common."""

SMALL = {
    "data.train_images": 1000,
    "data.test_images": 200,
    "partition.clients": 5,
    "model.name": "cnn",
    "model.width": 8,
    "local_update.rounds": 4,
    "local_update.learning_rate": 0.1,
    "model_aggregation.learning_rate": 0.1,
    "generator_optimization.steps": 40,
    "generator_optimization.block_steps": 20,
    "generator_optimization.batch_size": 16,
    "generator_optimization.width": 8,
    "generator_optimization.adversary_width": 8,
    "prototypes.per_class": 4,
    "meta_model.steps": 10,
    "meta_model.batch_size": 8,
    "meta_model.width_per_class": 2,
    "meta_model.heads": 1,
    "meta_model.feedforward": 64,
    "knowledge_distillation.steps": 8,
    "knowledge_distillation.block_steps": 4,
    "knowledge_distillation.images_per_generator": 4,
    "knowledge_distillation.learning_rate": 3e-3,
    "fine_tuning.rounds": 1,
}
"""The `small` form of the published sets: whether everything runs, not how well."""

CHOICES = {
    "partition.kind": ("dirichlet", "dirichlet_balanced", "iid"),
    "model.conv": ("auto", "native", "gradients"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "submodel.scheme": ("static", "rolling", "random"),
    "model_aggregation.expert_mode": ("auto", "parameters", "logits"),
    "generator_optimization.adversary": ("dcgan", "local"),
    "prototypes.features": ("experts", "global"),
    "knowledge_distillation.images": ("generated", "averaged", "real"),
    "knowledge_distillation.teacher": ("meta", "own", "uniform"),
    "knowledge_distillation.batch_norm": ("frozen", "train"),
    "fine_tuning.batch_norm": ("frozen", "train"),
}
"""Settings that take one of a few words. (Data sets, models and methods are registries.)"""

MAY_BE_ZERO = {
    "meta_model.heads",
    "seed",
    "partition.seed",
    "submodel.rho",
    "submodel.sigma",
    "local_update.rounds",
    "local_update.clients_per_round",
    "generator_optimization.steps",
    "knowledge_distillation.steps",
    "knowledge_distillation.generators_per_step",
    "fine_tuning.rounds",
    "generator_optimization.inversion_threshold",
    "generator_optimization.shift",
    "data.crop_padding",
    "parallel.lanes",
    "parallel.devices",
}
"""Whole numbers that may be 0; all others are at least 1."""

FRACTIONS = {  # in [0, 1)
    "data.validation_fraction",
    "local_update.momentum",
    "generator_optimization.beta1",
    "generator_optimization.beta2",
    "generator_optimization.ema",
    "meta_model.ema",
    "meta_model.dropout",
}
POSITIVE = {
    "partition.alpha",
    "knowledge_distillation.temperature",
    "server_distillation.temperature",
}


def make(
    options: str,
    changes: Mapping[str, Any],
    small: Mapping[str, Any],
    narrow: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """A config file's settings: the defaults with `changes`, and what its `:options` ask for.

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
            raise UserError(unknown("option", word, list(OPTIONS)))
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
    """Defaults as nested dicts; what is None says its type, so that it can be overridden."""
    hints = get_type_hints(type(node))

    def entry(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return _with_placeholders(value)
        return placeholder(get_args(hints[name])[0]) if value is None else value

    return {name: entry(name, getattr(node, name)) for name in hints}


def names() -> list[str]:
    """All settings, dotted."""
    return list(flat(dataclasses.asdict(Config())))


def unknown(what: str, name: str, known: list[str], prefix: str = "") -> str:
    """The one line that answers a mistyped name: the nearest right one, else all of them."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {prefix + nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
    return f"unknown {what} {prefix + name!r}; {hint}"


def from_config_dict(settings: Mapping[str, Any]) -> Config:
    """Settings as checked frozen dataclasses.

    Raises:
      UserError: unknown name, wrong type, value out of range, or settings that contradict.
    """
    config = _build(Config, settings, "")
    for path, value in flat(dataclasses.asdict(config)).items():
        _check_value(path, value)
    _check_together(config)
    return config


def _build(cls: Any, settings: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(settings, Mapping):
        raise UserError(f"setting {prefix[:-1]!r} takes settings of its own, not {settings!r}")
    hints = get_type_hints(cls)
    for name in settings:
        if name not in hints:
            raise UserError(unknown("setting", name, list(hints), prefix))
    values = {
        name: _build(hints[name], value, f"{prefix}{name}.")
        if dataclasses.is_dataclass(hints[name])
        else _typed(prefix + name, value, hints[name])
        for name, value in settings.items()
    }
    return cls(**values)


def _typed(path: str, value: Any, hint: Any) -> Any:
    allowed = get_args(hint) if isinstance(hint, builtin_types.UnionType) else (hint,)
    if type(value) in allowed:
        return value
    if type(value) is int and float in allowed:
        return float(value)
    if hint == tuple[float, ...] and isinstance(value, tuple | list):
        return tuple(_typed(f"{path}[{i}]", entry, float) for i, entry in enumerate(value))
    names = " or ".join("nothing" if t is builtin_types.NoneType else t.__name__ for t in allowed)
    raise UserError(f"setting {path!r} takes {names}, not {value!r}")


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    pairs: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping)
        pairs |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return pairs


def _check_value(path: str, value: Any) -> None:
    if path in CHOICES and value not in CHOICES[path]:
        raise UserError(unknown(path, value, list(CHOICES[path])))
    if type(value) is int and value < (0 if path in MAY_BE_ZERO else 1):
        raise UserError(f"{path} = {value}: must be at least {0 if path in MAY_BE_ZERO else 1}")
    if type(value) is tuple and not all(0 < entry <= 1 for entry in value):
        raise UserError(f"{path} = {value}: every entry must lie in (0, 1]")
    if type(value) is float:
        if path in FRACTIONS and not 0 <= value < 1:
            raise UserError(f"{path} = {value}: must lie in [0, 1)")
        if path in POSITIVE and not value > 0:
            raise UserError(f"{path} = {value}: must be greater than 0")
        if not (0 <= value < float("inf")):
            raise UserError(f"{path} = {value}: must be a finite number, at least 0")


def _check_together(config: Config) -> None:
    local, clients = config.local_update, config.partition.clients
    if local.clients_per_round > clients:
        raise UserError(
            f"local_update.clients_per_round = {local.clients_per_round}, but there are {clients}"
        )
    shares = config.submodel.capacities
    if shares and len(shares) != clients:
        raise UserError(f"submodel.capacities has {len(shares)} entries for {clients} clients")
    if shares and config.submodel.rho:
        raise UserError("submodel.capacities and submodel.rho say the same thing; give one of them")
    if config.generator_optimization.adversary == "local" and (shares or config.submodel.rho):
        raise UserError(
            "generator_optimization.adversary = 'local' needs clients that hold the whole model"
        )
    tuning = config.fine_tuning
    if tuning.rounds and tuning.batch_norm == "frozen" and (shares or config.submodel.rho):
        raise UserError(
            "fine_tuning.batch_norm = 'frozen' needs clients that hold the whole model; "
            "set fine_tuning.rounds = 0, or take the config's option 'narrow'"
        )
    if local.final_learning_rate is not None and not local.learning_rate:
        raise UserError(
            "local_update.final_learning_rate needs a local_update.learning_rate greater than 0"
        )
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
