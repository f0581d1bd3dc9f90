"""From what a user writes to a checked `Config`.

Config files build an `ml_collections.ConfigDict` from the defaults with `make` and change a few
lines; `from_config_dict` turns it back and refuses wrong names, types, values and combinations with
one line that says what was meant.
"""

import dataclasses
import types as builtin_types
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mosaic_jax.checks import check, unknown
from mosaic_jax.config import Config
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
    return list(flatten_dict(dataclasses.asdict(Config()), sep="."))


def from_config_dict(settings: Mapping[str, Any]) -> Config:
    """Settings as checked frozen dataclasses.

    Raises:
      UserError: unknown name, wrong type, value out of range, or settings that contradict.
    """
    config = _build(Config, settings, "")
    check(config)
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
