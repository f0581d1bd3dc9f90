"""The one definition of every setting: frozen dataclasses with defaults, units and ranges.

The defaults are the paper's CIFAR-10 settings where it states them, else the reference
implementation's, but for those of the generators, chosen by measurement (docs/decisions.md).
`settings.py` reads what users write and checks it against the types here: a plain `int` is at least
1, a plain `float` is finite and at least 0, other ranges are named below.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal


@dataclass(frozen=True)
class Range:
    """The values that a setting may have.

    Attributes:
      words: the end of the error message that refuses another value.
      holds: whether a value is in the range.
    """

    words: str
    holds: Callable[[Any], bool]


MAY_BE_ZERO = Range("must be at least 0", lambda value: value >= 0)
SEED = Range("must lie in [0, 2**32)", lambda value: 0 <= value < 2**32)  # JAX keeps 32 bits

Count = Annotated[int, MAY_BE_ZERO]
Fraction = Annotated[float, Range("must lie in [0, 1)", lambda value: 0 <= value < 1)]
Positive = Annotated[float, Range("must be greater than 0", lambda value: value > 0)]
Shares = Annotated[
    tuple[float, ...],
    Range("every entry must lie in (0, 1]", lambda shares: all(0 < share <= 1 for share in shares)),
]
BatchNorm = Literal["frozen", "train"]
DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Data:
    """Which images, how many, and how they are augmented."""

    name: str = "digits"
    directory: str | None = None  # where the original files lie; None: the usual places
    image_size: int | None = None  # pixels; None: the data set's own choice
    train_images: int | None = None  # seeded subset; None: all
    test_images: int | None = None
    validation_fraction: Fraction = 0.0  # of each client's images, held out for choosing settings
    crop_padding: Count = 0  # pixels of padding before the random crop; 0: no crop
    flip: bool = False  # random horizontal flip


@dataclass(frozen=True)
class Partition:
    """How the training images are split over the clients (labels only are looked at)."""

    kind: Literal["dirichlet", "dirichlet_balanced", "iid"] = "dirichlet"
    clients: int = 10
    alpha: Positive = 0.1  # Dirichlet concentration: smaller is more heterogeneous
    minimum: int = 10  # images every client of "dirichlet" must end with
    seed: Annotated[int | None, SEED] = None  # None: follows the run's seed


@dataclass(frozen=True)
class Model:
    """The classifier of clients, experts and student."""

    name: str = "resnet18"  # resnet8 | resnet18 | resnet34 | resnet50 | cnn | lenet
    width: int = 64  # channels of the first stage; lenet has its own sizes
    conv: Literal["auto", "native", "gradients"] = "auto"
    dtype: DType = "auto"  # of the arithmetic; auto: bfloat16 on GPU and TPU


@dataclass(frozen=True)
class Submodel:
    """Which share R_i of every hidden layer's channels client i = 1..N holds."""

    rho: Count = 0  # R_i = (1/2)^min(sigma, floor(rho i / N)); 0: all hold the whole model
    sigma: Count = 4
    capacities: Shares = ()  # R_i of each client, in place of rho and sigma
    scheme: Literal["static", "rolling", "random"] = "rolling"  # which channels they are


@dataclass(frozen=True)
class LocalUpdate:
    """Rounds of local training and averaging (FedAvg)."""

    rounds: Count = 300
    clients_per_round: Count = 0  # seeded draw of those who take part in a round; 0: all
    steps: int = 10  # SGD steps a client makes in a round
    batch_size: int = 64
    learning_rate: float = 0.01
    final_learning_rate: float | None = None  # reached by a cosine over the rounds; None: constant
    momentum: Fraction = 0.0
    leave_out_diverged: bool = False  # a client whose round ends in NaN sends nothing, else: stop
    weight_decay: float = 1e-4  # L2, on all parameters


@dataclass(frozen=True)
class FedProx:
    """FedProx's own setting."""

    mu: float = 0.01  # weight of half the squared distance from the received model


@dataclass(frozen=True)
class FedRS:
    """FedRS's own setting."""

    alpha: float = 0.5  # factor of the logits of classes a client does not hold; 1: FedAvg


@dataclass(frozen=True)
class FedGen:
    """FedGen's own setting."""

    weight: float = 10.0  # of the generator's terms in a client's loss in round 0; falls by 2% each


@dataclass(frozen=True)
class ServerDistillation:
    """DENSE, FedFTG and DFRD: the server's generator and its global model, after every round."""

    iterations: int = 10  # turns of generator and global model in a round
    batch_size: int = 64
    generator_learning_rate: float = 2e-4  # Adam, betas 0.5 and 0.999
    learning_rate: float = 0.01  # SGD, of the global model
    weight_decay: float = 1e-4
    temperature: Positive = 10.0
    adversarial_weight: float = 1.0  # of the disagreement the generator looks for
    diversity_weight: float = 1.0  # of the mode-seeking term of FedFTG and DFRD


@dataclass(frozen=True)
class ModelAggregation:
    """The round whose client models become class-wise experts."""

    steps: int = 10  # local steps of that round
    learning_rate: float = 0.01
    # what class-wise weights average; auto: by need
    expert_mode: Literal["auto", "parameters", "logits"] = "auto"
    global_expert: bool = False  # one expert more: the mean of all clients, each weighted by n_i


@dataclass(frozen=True)
class GeneratorOptimization:
    """Each client's generator and its adversary."""

    steps: Count = 2000  # one adversary and one generator step each
    block_steps: int = 100  # steps in one compiled call
    batch_size: int = 64
    latent: int = 100  # dimension of z
    width: int = 64  # channels of the generator's last hidden map
    upsampling: Literal["transposed", "nearest"] = "transposed"  # nearest: repeat, then 3x3
    conditional: bool = False  # an image's class is drawn from its client's and goes in with z
    # local: the local model with a real/fake head; projected: heads on the frozen model's maps
    adversary: Literal["dcgan", "local", "projected"] = "dcgan"
    adversary_width: int = 64  # channels of dcgan's first map, or of every map of the heads
    learning_rate: float = 2e-3  # of the generator; both fall to 0 along a cosine
    adversary_learning_rate: float = 1e-3
    beta1: Fraction = 0.5
    beta2: Fraction = 0.99
    ema: Fraction = 0.99  # of the uploaded generator's weights
    entropy_weight: float = 0.0
    diversity_weight: float = 1.0
    inversion_weight: float = 0.01
    class_weight: float = 0.5  # of f0's cross-entropy on the class drawn, if conditional
    inversion_threshold: Count = 0  # tau: clients with fewer images use the inversion loss
    frozen_every: int = 1  # steps between gradients of the four losses above, scaled up by it
    shift: Count = 3  # pixels; the same random shift and brightness on real and fake batches
    brightness: float = 0.2
    # of generated from real images, over the real ones' variance; beyond it: unusable
    max_distance: Positive = 0.5
    unusable: Literal["leave_out", "stop", "use"] = "leave_out"  # what happens to such a generator


@dataclass(frozen=True)
class Prototypes:
    """Class prototypes: k-means centres of penultimate features."""

    per_class: int = 10  # k
    images_per_class: int = 64  # images of a class a client computes features of
    iterations: int = 20  # of k-means
    features: Literal["experts", "global"] = "experts"  # whose features experts' heads get


@dataclass(frozen=True)
class MetaModel:
    """The transformer that fuses the experts' logits."""

    steps: int = 150
    batch_size: int = 128
    learning_rate: float = 1e-3
    ema: Fraction = 0.99
    dropout: Fraction = 0.2
    width_per_class: int = 10  # the model's width is this times the number of classes
    heads: Count = 0  # of attention; 0: as many as classes
    feedforward: int = 2048
    expert_embedding: bool = True  # False: the reference's permutation-blind form


@dataclass(frozen=True)
class KnowledgeDistillation:
    """The student learns from the teacher on the ensemble of generators."""

    steps: Count = 1500
    block_steps: int = 50  # steps in one compiled call
    # over a pool of images that a block draws and the teacher labels once; 1: new ones every step
    pool_passes: int = 1
    images_per_generator: int = 32  # on average; shared out by the clients' numbers of images
    generators_per_step: Count = 0  # seeded draw, a divisor of the clients; 0: all, at most 256
    # averaged: of one generator, the clients' mean weights; real: an oracle no federation could run
    images: Literal["generated", "averaged", "real"] = "generated"
    # meta: the mixture of experts; own: each class by its own expert; uniform: the experts' mean
    teacher: Literal["meta", "own", "uniform"] = "meta"
    class_prior: bool = False  # teacher's answers times the class shares of the generator's client
    learning_rate: float = 1e-4  # Adam; falls to 0 along a cosine
    kl_weight: float = 0.8
    ce_weight: float = 0.2
    js_weight: float = 1.0
    temperature: Positive = 1.0
    batch_norm: BatchNorm = "frozen"  # statistics the student normalises with


@dataclass(frozen=True)
class Acceptance:
    """Whether the distilled student replaces the global model."""

    # held_out: if it is right on as many of the clients' held-out images; always: unasked
    rule: Literal["held_out", "always"] = "always"


@dataclass(frozen=True)
class FineTuning:
    """Rounds of local training that follow the distillation."""

    rounds: Count = 40
    learning_rate: float = 1e-4
    batch_norm: BatchNorm = "train"  # statistics the clients normalise with


@dataclass(frozen=True)
class Parallel:
    """How clients are laid out; changes speed and float rounding, never the method."""

    changes_results: ClassVar[bool] = False

    lanes: Count = 0  # clients vmapped at a time on a device; 0: 1 on CPU, else all of a device's
    devices: Count = 0  # devices used; 0: all
    memory_gib: float = 0.0  # of clients' models and generators at a time; 0: all of them
    debug: bool = False  # plain Python loop over clients, the truth all modes are tested against


@dataclass(frozen=True)
class Run:
    """What is written, and when."""

    changes_results: ClassVar[bool] = False

    evaluate_every: int = 10  # blocks of a stage between evaluations; always at a stage's end
    checkpoint_every: int = 10  # blocks of a stage between checkpoints; always at a stage's end


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: Annotated[int, SEED] = 0
    method: str = "mosaic"  # a name in `methods.METHODS`
    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    model: Model = field(default_factory=Model)
    submodel: Submodel = field(default_factory=Submodel)
    local_update: LocalUpdate = field(default_factory=LocalUpdate)
    fedprox: FedProx = field(default_factory=FedProx)
    fedrs: FedRS = field(default_factory=FedRS)
    fedgen: FedGen = field(default_factory=FedGen)
    server_distillation: ServerDistillation = field(default_factory=ServerDistillation)
    model_aggregation: ModelAggregation = field(default_factory=ModelAggregation)
    generator_optimization: GeneratorOptimization = field(default_factory=GeneratorOptimization)
    prototypes: Prototypes = field(default_factory=Prototypes)
    meta_model: MetaModel = field(default_factory=MetaModel)
    knowledge_distillation: KnowledgeDistillation = field(default_factory=KnowledgeDistillation)
    acceptance: Acceptance = field(default_factory=Acceptance)
    fine_tuning: FineTuning = field(default_factory=FineTuning)
    parallel: Parallel = field(default_factory=Parallel)
    run: Run = field(default_factory=Run)


def needs_generators(config: Config) -> bool:
    """Return whether the distillation draws images of the clients' generators."""
    distillation = config.knowledge_distillation
    return distillation.steps > 0 and distillation.images != "real"
