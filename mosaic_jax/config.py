"""The one definition of every setting: frozen dataclasses with defaults, units and checks.

Config files build an `ml_collections.ConfigDict` from `Config` with `make` and change a few lines;
`from_config_dict` turns it back and refuses wrong names, types and combinations with one line that
says what was meant. The defaults are the paper's CIFAR-10 settings where it states them, else the
reference implementation's (docs/method.md lists them).
"""

import dataclasses
import difflib
import types as builtin_types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mosaic_jax.types import UserError

HETEROGENEITY = {"mild": 1.0, "moderate": 0.1, "severe": 0.01}
"""Named levels of label heterogeneity: the Dirichlet concentration alpha."""


@dataclass(frozen=True)
class Data:
    """Which images, how many, and how they are augmented."""

    name: str = "digits"
    directory: str | None = None  # where the original files lie; None: the usual places
    image_size: int | None = None  # pixels; None: the data set's own choice
    train_images: int | None = None  # seeded subset; None: all
    test_images: int | None = None
    validation_fraction: float = 0.0  # of each client's images, held out for choosing settings
    crop_padding: int = 0  # pixels of padding before the random crop; 0: no crop
    flip: bool = False  # random horizontal flip


@dataclass(frozen=True)
class Partition:
    """How the training images are split over the clients (labels only are looked at)."""

    kind: str = "dirichlet"  # dirichlet | dirichlet_balanced | iid
    clients: int = 10
    alpha: float = 0.1  # Dirichlet concentration: smaller is more heterogeneous
    minimum: int = 10  # images every client of "dirichlet" must end with
    seed: int | None = None  # None: follows the run's seed


@dataclass(frozen=True)
class Model:
    """The classifier of clients, experts and student."""

    name: str = "resnet18"  # resnet8 | resnet18 | resnet34 | resnet50 | cnn
    width: int = 64  # channels of the first stage
    conv: str = "auto"  # auto | native | gradients | patches


@dataclass(frozen=True)
class LocalUpdate:
    """Rounds of local training and averaging (FedAvg)."""

    rounds: int = 300
    steps: int = 10  # SGD steps a client makes in a round
    batch_size: int = 64
    learning_rate: float = 0.01
    final_learning_rate: float | None = None  # reached by a cosine over the rounds; None: constant
    momentum: float = 0.0
    weight_decay: float = 1e-4  # L2, on all parameters


@dataclass(frozen=True)
class ModelAggregation:
    """The round whose client models become class-wise experts."""

    steps: int = 10  # local steps of that round
    learning_rate: float = 0.01


@dataclass(frozen=True)
class GeneratorOptimization:
    """Each client's generator and its adversary."""

    steps: int = 2000  # one adversary and one generator step each
    block_steps: int = 100  # steps in one compiled call
    batch_size: int = 64
    latent: int = 100  # dimension of z
    width: int = 64  # channels of the generator's last hidden map
    adversary: str = "dcgan"  # dcgan | local (the local model with a real/fake head)
    adversary_width: int = 64  # channels of the DCGAN discriminator's first map
    learning_rate: float = 2e-3  # of the generator; both fall to 0 along a cosine
    adversary_learning_rate: float = 1e-3
    beta1: float = 0.5
    beta2: float = 0.99
    ema: float = 0.99  # of the uploaded generator's weights
    entropy_weight: float = 0.0
    diversity_weight: float = 1.0
    inversion_weight: float = 0.01
    inversion_threshold: int = 0  # tau: clients with fewer images use the inversion loss
    frozen_every: int = 1  # steps between gradients of the three losses above, scaled up by it
    shift: int = 3  # pixels; the same random shift and brightness on real and fake batches
    brightness: float = 0.2


@dataclass(frozen=True)
class Prototypes:
    """Class prototypes: k-means centres of penultimate features."""

    per_class: int = 10  # k
    images_per_class: int = 64  # images of a class a client computes features of
    iterations: int = 20  # of k-means
    features: str = "experts"  # experts | global: whose features the experts' heads are given


@dataclass(frozen=True)
class MetaModel:
    """The transformer that fuses the experts' logits."""

    steps: int = 150
    batch_size: int = 128
    learning_rate: float = 1e-3
    ema: float = 0.99
    dropout: float = 0.2
    feedforward: int = 2048
    generated: int = 0  # images of each generator that join the prototypes; see stages/meta_model
    expert_embedding: bool = True  # False: the reference's permutation-blind form


@dataclass(frozen=True)
class KnowledgeDistillation:
    """The student learns from the teacher on the ensemble of generators."""

    steps: int = 1500
    block_steps: int = 50  # steps in one compiled call
    images_per_generator: int = 32  # on average; shared out by the clients' numbers of images
    images: str = "generated"  # generated | real (an oracle that no federation could run)
    learning_rate: float = 1e-4  # Adam; falls to 0 along a cosine
    kl_weight: float = 0.8
    ce_weight: float = 0.2
    js_weight: float = 1.0
    temperature: float = 1.0
    batch_norm: str = "frozen"  # frozen | train: statistics the student normalises with


@dataclass(frozen=True)
class FineTuning:
    """Rounds of local training that follow the distillation."""

    rounds: int = 40
    learning_rate: float = 1e-4
    batch_norm: str = "train"  # frozen | train: statistics the clients normalise with


@dataclass(frozen=True)
class Parallel:
    """How clients are laid out; changes speed and float rounding, never the method."""

    lanes: int = 0  # clients vmapped at a time on a device; 0: 1 on CPU, else all of a device's
    devices: int = 0  # devices used; 0: all
    debug: bool = False  # plain Python loop over clients, the truth all modes are tested against


@dataclass(frozen=True)
class Run:
    """What is written, and when."""

    evaluate_every: int = 10  # blocks of a stage between evaluations; always at a stage's end
    checkpoint_every: int = 10  # blocks of a stage between checkpoints; always at a stage's end


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: int = 0
    method: str = "mosaic"  # mosaic | fedavg
    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    model: Model = field(default_factory=Model)
    local_update: LocalUpdate = field(default_factory=LocalUpdate)
    model_aggregation: ModelAggregation = field(default_factory=ModelAggregation)
    generator_optimization: GeneratorOptimization = field(default_factory=GeneratorOptimization)
    prototypes: Prototypes = field(default_factory=Prototypes)
    meta_model: MetaModel = field(default_factory=MetaModel)
    knowledge_distillation: KnowledgeDistillation = field(default_factory=KnowledgeDistillation)
    fine_tuning: FineTuning = field(default_factory=FineTuning)
    parallel: Parallel = field(default_factory=Parallel)
    run: Run = field(default_factory=Run)


CHOICES = {
    "partition.kind": ("dirichlet", "dirichlet_balanced", "iid"),
    "model.conv": ("auto", "native", "gradients", "patches"),
    "generator_optimization.adversary": ("dcgan", "local"),
    "prototypes.features": ("experts", "global"),
    "knowledge_distillation.images": ("generated", "real"),
    "knowledge_distillation.batch_norm": ("frozen", "train"),
    "fine_tuning.batch_norm": ("frozen", "train"),
}
"""Settings that take one of a few words. (Data sets, models and methods are registries.)"""

MAY_BE_ZERO = {
    "seed",
    "partition.seed",
    "local_update.rounds",
    "generator_optimization.steps",
    "meta_model.generated",
    "knowledge_distillation.steps",
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
POSITIVE = {"partition.alpha", "knowledge_distillation.temperature"}


def make(options: str, changes: Mapping[str, Any], small: Mapping[str, Any]) -> ConfigDict:
    """A config file's settings: the defaults with `changes`, and what its `:options` ask for.

    Args:
      options: comma-separated words behind the file's name: a level of `HETEROGENEITY`, and
        `small` for a form that ends in about a minute on a CPU. May be empty.
      changes: dotted setting -> value.
      small: the same, on top, for the `small` form.

    Raises:
      UserError: on an unknown word, naming the nearest.
    """
    config = ConfigDict(_with_placeholders(Config()))
    config.update_from_flattened_dict(dict(changes))
    for option in filter(None, options.split(",")):
        if option == "small":
            config.update_from_flattened_dict(dict(small))
        elif option in HETEROGENEITY:
            config.partition.alpha = HETEROGENEITY[option]
        else:
            raise UserError(unknown("option", option, ["small", *HETEROGENEITY]))
    return config


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
    return [name for name, _ in _flatten(Config(), "")]


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
    for path, value in _flatten(config, ""):
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
    names = " or ".join("nothing" if t is builtin_types.NoneType else t.__name__ for t in allowed)
    raise UserError(f"setting {path!r} takes {names}, not {value!r}")


def _flatten(node: Any, prefix: str) -> list[tuple[str, Any]]:
    if not dataclasses.is_dataclass(node):
        return [(prefix.rstrip("."), node)]
    return [
        pair
        for entry in dataclasses.fields(node)
        for pair in _flatten(getattr(node, entry.name), f"{prefix}{entry.name}.")
    ]


def _check_value(path: str, value: Any) -> None:
    if path in CHOICES and value not in CHOICES[path]:
        raise UserError(unknown(path, value, list(CHOICES[path])))
    if type(value) is int and value < (0 if path in MAY_BE_ZERO else 1):
        raise UserError(f"{path} = {value}: must be at least {0 if path in MAY_BE_ZERO else 1}")
    if type(value) is float:
        if path in FRACTIONS and not 0 <= value < 1:
            raise UserError(f"{path} = {value}: must lie in [0, 1)")
        if path in POSITIVE and not value > 0:
            raise UserError(f"{path} = {value}: must be greater than 0")
        if not (0 <= value < float("inf")):
            raise UserError(f"{path} = {value}: must be a finite number, at least 0")


def _check_together(config: Config) -> None:
    local = config.local_update
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
            "generated images are asked for (knowledge_distillation.images, meta_model.generated), "
            "but generator_optimization.steps is 0"
        )
    if not (distillation.kl_weight or distillation.ce_weight or distillation.js_weight):
        raise UserError(
            "knowledge_distillation: at least one of kl_weight, ce_weight and "
            "js_weight must be greater than 0"
        )


def needs_generators(config: Config) -> bool:
    """Whether any stage draws generated images."""
    distillation = config.knowledge_distillation
    distils = distillation.steps > 0 and distillation.images == "generated"
    return distils or config.meta_model.generated > 0
