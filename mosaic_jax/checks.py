"""Which values settings may have, alone and together; a refusal is one line that says why."""

import dataclasses
import difflib
from typing import Any

from flax.traverse_util import flatten_dict

from mosaic_jax.config import Config, needs_generators
from mosaic_jax.types import UserError

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


def check(config: Config) -> None:
    """Refuse a value out of its range, or settings that contradict.

    Raises:
      UserError: names the setting and what it may be.
    """
    for path, value in flatten_dict(dataclasses.asdict(config), sep=".").items():
        _check_value(path, value)
    _check_clients(config)
    _check_distillation(config)


def unknown(what: str, name: str, known: list[str], prefix: str = "") -> str:
    """The one line that answers a mistyped name: the nearest right one, else all of them."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {prefix + nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
    return f"unknown {what} {prefix + name!r}; {hint}"


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


def _check_clients(config: Config) -> None:
    """What clients hold and do, against their number and each other."""
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
    """Whether distillation has images to learn from, room for them, and a loss."""
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
