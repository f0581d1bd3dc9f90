"""Distil the teacher into the student on images of the ensemble of generators."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.speed.pytorch_baseline import data
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


def shuffled(draws: int, batch: int, steps: int, device: torch.device) -> Tensor:
    """Return positions in a pool of `draws` batches for each step, int64 `[steps, batch]`.

    Every pass uses each image once, in a new order. An image keeps its place in the batch, so the
    generators' shares are those of one draw.
    """
    passes = -(-steps // draws)
    numbers = torch.rand(passes, draws, batch, device=device).argsort(1).flatten(0, 1)[:steps]
    return numbers * batch + torch.arange(batch, device=device)


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

    def distil(self, draw: Callable[[], Tensor], steps: int, passes: int) -> None:
        """Take steps on images that are drawn for each, or for a block with several passes.

        Args:
          draw: makes a batch of images `[batch, c, h, w]`.
          steps: whole blocks of the setting `block_steps`.
          passes: over a block's pool; 1: every step draws its images.
        """
        if passes == 1:
            for _ in range(steps):
                images = draw()
                self.step(images, self.ask(images))
            return
        block = self.settings.block_steps
        draws = -(-block // passes)
        for _ in range(steps // block):
            batches = [draw() for _ in range(draws)]
            order = shuffled(draws, len(batches[0]), block, batches[0].device)
            self.steps_on_pool(batches, order)

    def steps_on_pool(self, batches: list[Tensor], order: Tensor) -> list[dict[str, Tensor]]:
        """Ask the teacher about the batches once; take a step for each row of `shuffled`."""
        targets = torch.cat([self.ask(images) for images in batches])
        images = torch.cat(batches).permute(0, 2, 3, 1).contiguous()
        return [self.step(data.take(images, row), targets.index_select(0, row)) for row in order]

    def ask(self, images: Tensor) -> Tensor:
        """Return what the student learns for images `[batch, c, h, w]`, `[batch, classes]`."""
        return self.teacher(images) + self.prior

    def step(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Take one step of Adam on images with their targets; return scalars on the device."""
        settings = self.settings
        decay = cosine_decay(self.steps_made, settings.steps)
        self.optimizer.param_groups[0]["lr"] = settings.learning_rate * decay
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
