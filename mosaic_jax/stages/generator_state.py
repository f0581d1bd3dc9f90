"""What the training of one client's generator reads and carries."""

from flax import struct

from mosaic_jax.data.batches import ClientLists
from mosaic_jax.types import Array, PyTree, TrainingImages, Variables

LOSS_WEIGHTS = ("class_weight", "entropy_weight", "diversity_weight", "inversion_weight")


class GeneratorInputs(struct.PyTreeNode):
    """Input that all clients share.

    Attributes:
      adversary_learning_rate: float32 [].
      data: the images that clients index into.
      key: key of the stage; client and step are folded in.
      learning_rate: the generator's, float32 [].
      loss_weights: of `LOSS_WEIGHTS`, float32 [] each.
      first_step: int32 [], steps made in earlier blocks.
    """

    adversary_learning_rate: Array
    data: TrainingImages
    key: Array
    learning_rate: Array
    loss_weights: dict[str, Array]
    first_step: Array | int = 0


class GeneratorClient(struct.PyTreeNode):
    """One client's input: its packed lists and its frozen model f0."""

    frozen: Variables
    lists: ClientLists


class GeneratorState(struct.PyTreeNode):
    """Carry of one client's training; all of it stays with the client but the upload.

    Attributes:
      adversary: variables of the adversary.
      adversary_optimizer: Adam's state.
      average: state of the exponential moving average of the generator's weights.
      distance: of generated from real images after the last block, float32 [].
      frozen: f0, where there are several waves; it then rests here between blocks.
      generator: variables of the generator.
      generator_optimizer: Adam's state.
      ema_batch_stats: batch statistics of the average weights; of the first weights before the end.
    """

    adversary: Variables
    adversary_optimizer: PyTree
    average: PyTree
    distance: Array
    frozen: Variables | None
    generator: Variables
    generator_optimizer: PyTree
    ema_batch_stats: PyTree


class Batch(struct.PyTreeNode):
    """The images of one step, in [-1, 1].

    Attributes:
      fake: generated images [batch, h, w, c].
      key: of their augmentation.
      labels: int [batch], of the real images and, of a conditional generator, of its images.
      real: real images [batch, h, w, c].
    """

    fake: Array
    key: Array
    labels: Array
    real: Array
