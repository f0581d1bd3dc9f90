"""Distil the teacher into the student on images of the ensemble of generators."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.speed.pytorch_baseline.classifiers import Classifier
from experiments.speed.pytorch_baseline.generator_optimization import cosine_decay
from experiments.speed.pytorch_baseline.generators import Generator
from mosaic_jax.config import KnowledgeDistillation


def shares(sizes: np.ndarray, batch: int) -> np.ndarray:
    """Return the images per generator in a batch: one, and a share of the rest by n_i."""
    exact = sizes / sizes.sum() * (batch - len(sizes))
    counts = np.floor(exact).astype(int)
    left = batch - len(sizes) - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts + 1


def class_prior(counts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return the log class shares of each image's client, float32 `[batch, classes]`.

    Args:
      counts: images n_ic `[clients, classes]`; one more image is divided evenly among the classes.
      images: of each generator in a batch, `[clients]`.
    """
    smooth = counts + 1 / counts.shape[1]
    shares = np.log(smooth / smooth.sum(1, keepdims=True)).astype(np.float32)
    return shares.repeat(images, axis=0)


@torch.no_grad()
def draw(generators: Sequence[Generator], noise: Sequence[Tensor]) -> Tensor:
    """Generate images, one for each noise vector `[images, latent]` of each generator."""
    return torch.cat([generator(z) for generator, z in zip(generators, noise, strict=True)])


def distillation_loss(student: Tensor, teacher: Tensor, settings: KnowledgeDistillation) -> Tensor:
    """Return KL + CE + JS of student logits against teacher logits, both `[batch, classes]`."""
    log_s = F.log_softmax(student / settings.temperature, 1)
    log_t = F.log_softmax(teacher / settings.temperature, 1)
    log_m = torch.logaddexp(log_s, log_t) - math.log(2)
    js = 0.5 * (_kl(log_t, log_m) + _kl(log_s, log_m))
    ce = F.cross_entropy(student, teacher.argmax(1))
    return (
        settings.kl_weight * _kl(log_t, log_s) + settings.ce_weight * ce + settings.js_weight * js
    )


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q), mean over the batch."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


class Student:
    """The student and Adam's moments.

    Args:
      model: the student, with the global model's weights.
      teacher: images to logits, without autograd.
      prior: added to the teacher's logits, `[batch or 1, classes]`.
      settings: of the stage.
    """

    def __init__(
        self,
        model: Classifier,
        teacher: Callable[[Tensor], Tensor],
        prior: Tensor,
        settings: KnowledgeDistillation,
    ):
        self.model = model.train(settings.batch_norm == "train")
        self.teacher, self.prior, self.settings = teacher, prior, settings
        self.optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate, fused=True)
        self.steps_made = 0

    def step(self, images: Tensor) -> dict[str, Tensor]:
        """Take one step of Adam on images `[batch, c, h, w]`; return scalars on the device."""
        settings = self.settings
        decay = cosine_decay(self.steps_made, settings.steps)
        self.optimizer.param_groups[0]["lr"] = settings.learning_rate * decay
        target = self.teacher(images) + self.prior
        logits = self.model(images).logits
        loss = distillation_loss(logits, target, settings)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps_made += 1
        probabilities = target.softmax(1)
        mean = probabilities.mean(0)
        return {
            "loss": loss.detach(),
            "agreement": (logits.detach().argmax(1) == target.argmax(1)).float().mean(),
            "teacher_certainty": probabilities.amax(1).mean(),
            "teacher_classes": torch.special.entr(mean).sum().exp(),
        }
