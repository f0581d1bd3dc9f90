"""The adversary of a generator: a DCGAN discriminator, or the local model itself.

The paper's adversary is the client's own classifier with a real/fake head (`adversary = "local"`);
the reference, and the default here, is a separate discriminator.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.federation import Federation
from mosaic_jax.models import Discriminator, RealFakeHead
from mosaic_jax.types import Array, PyTree, Variables


class Adversary:
    """Real/fake logits of images, and the loss that trains them."""

    def __init__(self, federation: Federation):
        self.federation = federation
        self.settings = federation.config.generator_optimization
        height, _, channels = federation.dataset.image_shape
        self.discriminator = Discriminator(
            image_size=height,
            channels=channels,
            width=self.settings.adversary_width,
            conv_impl=federation.config.model.conv,
            dtype=federation.config.model.dtype,
        )

    @property
    def is_local(self) -> bool:
        """Return whether the local model itself is the adversary, as in the paper."""
        return self.settings.adversary == "local"

    def init(self, key: Array, frozen: Variables) -> Variables:
        """Draw the first weights; the local adversary starts from the client's model."""
        images = jnp.zeros((1, *self.federation.dataset.image_shape))
        if not self.is_local:
            return self.discriminator.init(key, images)
        features = self.federation.classifier.apply_eval(frozen, images).features
        head = RealFakeHead().init(key, features)["params"]
        return {
            "params": {"classifier": frozen["params"], "real_fake": head},
            "batch_stats": frozen["batch_stats"],
        }

    def loss(
        self, params: PyTree, statistics: PyTree, real: Array, fake: Array, labels: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Return the BCE on real and generated images, and the mean scores of both.

        The local adversary also classifies the real images.
        """
        real_logits, class_logits = self.logits(params, statistics, real)
        fake_logits, _ = self.logits(params, statistics, fake)
        loss = jax.nn.softplus(-real_logits).mean() + jax.nn.softplus(fake_logits).mean()
        if class_logits is not None:
            loss += optax.softmax_cross_entropy_with_integer_labels(class_logits, labels).mean()
        diagnostics = {
            "real_score": jax.nn.sigmoid(real_logits).mean(),
            "fake_score": jax.nn.sigmoid(fake_logits).mean(),
        }
        return loss, diagnostics

    def logits(
        self, params: PyTree, statistics: PyTree, images: Array
    ) -> tuple[Array, Array | None]:
        """Return real/fake logits [batch] and, of the local adversary, class logits.

        Batch norms use batch statistics, separately for real and generated batches.
        """
        if not self.is_local:
            variables = {"params": params, "batch_stats": statistics}
            verdict: Any
            verdict, _ = self.discriminator.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
            return verdict, None
        variables = {"params": params["classifier"], "batch_stats": statistics}
        outputs: Any
        outputs, _ = self.federation.classifier.module.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        head = {"params": params["real_fake"]}
        return cast(Array, RealFakeHead().apply(head, outputs.features)), outputs.logits
