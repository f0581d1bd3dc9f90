"""The adversary of a generator, which tells its images from real ones.

The paper's is the client's own classifier with a real/fake head (`adversary = "local"`). The
reference's is a separate DCGAN discriminator ("dcgan"). "projected" looks at images through the
feature maps of the frozen model f0, with small heads of its own (Sauer et al. 2021).
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.federation import Federation
from mosaic_jax.models import Discriminator, FeatureHeads, RealFakeHead
from mosaic_jax.stages.generator_losses import view
from mosaic_jax.types import Array, PyTree, UserError, Variables


class Adversary:
    """Real/fake logits of images, and the loss that trains them.

    What the adversary sees of images are the images or, of a projected one, the maps of f0.
    """

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
        self.heads = FeatureHeads(
            width=self.settings.adversary_width,
            num_classes=federation.dataset.num_classes if self.settings.conditional else 0,
            conv_impl=federation.config.model.conv,
        )

    @property
    def is_local(self) -> bool:
        """Return whether the local model itself is the adversary, as in the paper."""
        return self.settings.adversary == "local"

    @property
    def is_projected(self) -> bool:
        """Return whether the adversary sees the maps of f0 in place of the images."""
        return self.settings.adversary == "projected"

    def init(self, key: Array, frozen: Variables) -> Variables:
        """Draw the first weights; the local adversary starts from the client's model.

        Raises:
          UserError: a projected adversary of a model that sows no maps.
        """
        classifier = self.federation.classifier
        images = jnp.zeros((2, *self.federation.dataset.image_shape))
        if self.is_projected:
            maps = view(classifier.module, frozen, images).maps
            if not maps:
                raise UserError(
                    "generator_optimization.adversary = 'projected' needs a model that sows its "
                    f"feature maps, and {self.federation.config.model.name!r} sows none; see "
                    "docs/guide.md"
                )
            return self.heads.init(key, maps, jnp.zeros(2, int))
        if not self.is_local:
            return self.discriminator.init(key, images)
        features = classifier.apply_eval(frozen, images).features
        head = RealFakeHead().init(key, features)["params"]
        return {
            "params": {"classifier": frozen["params"], "real_fake": head},
            "batch_stats": frozen["batch_stats"],
        }

    def loss(
        self, params: PyTree, statistics: PyTree, real: PyTree, fake: PyTree, labels: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Return the BCE on real and generated images, and the mean scores of both.

        The local adversary also classifies the real images. `labels` [batch] are those of the real
        images and, of a conditional generator, of its images.
        """
        real_logits, class_logits = self.logits(params, statistics, real, labels)
        fake_logits, _ = self.logits(params, statistics, fake, labels)
        loss = jax.nn.softplus(-real_logits).mean() + jax.nn.softplus(fake_logits).mean()
        if class_logits is not None:
            loss += optax.softmax_cross_entropy_with_integer_labels(class_logits, labels).mean()
        diagnostics = {
            "real_score": jax.nn.sigmoid(real_logits).mean(),
            "fake_score": jax.nn.sigmoid(fake_logits).mean(),
        }
        return loss, diagnostics

    def logits(
        self, params: PyTree, statistics: PyTree, seen: PyTree, labels: Array
    ) -> tuple[Array, Array | None]:
        """Return real/fake logits [batch] and, of the local adversary, class logits.

        Args:
          params: of the adversary.
          statistics: of its batch norms, which use batch statistics, separately for real and
            generated batches.
          seen: what it sees of the images.
          labels: their classes [batch], which a projected adversary of a conditional generator
            asks for.
        """
        variables = {"params": params, "batch_stats": statistics}
        verdict: Any
        if self.is_projected:
            verdict, _ = self.heads.apply(variables, seen, labels, mutable=["batch_stats"])
            return verdict, None
        if not self.is_local:
            verdict, _ = self.discriminator.apply(
                variables, seen, train=True, mutable=["batch_stats"]
            )
            return verdict, None
        variables = {"params": params["classifier"], "batch_stats": statistics}
        outputs: Any
        outputs, _ = self.federation.classifier.module.apply(
            variables, seen, train=True, mutable=["batch_stats"]
        )
        head = {"params": params["real_fake"]}
        return cast(Array, RealFakeHead().apply(head, outputs.features)), outputs.logits
