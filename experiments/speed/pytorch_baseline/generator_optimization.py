"""Train one client's generator: DCGAN against a discriminator and the frozen classifier."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.speed.pytorch_baseline.data import crop
from experiments.speed.pytorch_baseline.generators import Discriminator, Generator
from mosaic_jax.config import GeneratorOptimization

SETTLING = 40
"""Batches that recompute the batch statistics of the uploaded generator."""


def diversity_loss(logits: Tensor) -> Tensor:
    """Return sum_c p_c log p_c, where p is the mean softmax of the logits `[batch, classes]`."""
    log_p = F.log_softmax(logits, 1).logsumexp(0) - math.log(len(logits))
    return (log_p.exp() * log_p).sum()


def entropy_loss(logits: Tensor) -> Tensor:
    """Return the mean entropy of the softmax of the logits `[batch, classes]`."""
    log_p = F.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1).mean()


def cosine_decay(step: int, steps: int) -> float:
    """Return a factor that falls from 1 at step 0 to 0 at step `steps`."""
    return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))


class ClientGenerator:
    """The training of one client's generator.

    Args:
      generator, discriminator: with their first weights.
      frozen: the client's classifier f0, in eval mode.
      settings: those of the DCGAN adversary without the inversion loss.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        frozen: nn.Module,
        settings: GeneratorOptimization,
    ):
        self.settings, self.steps_made = settings, 0
        self.generator = generator.train()
        self.discriminator = discriminator.train()
        self.frozen = frozen.requires_grad_(False)
        betas = (settings.beta1, settings.beta2)
        self.optimizer = torch.optim.Adam(generator.parameters(), 0.0, betas, fused=True)
        self.adversary_optimizer = torch.optim.Adam(
            discriminator.parameters(), 0.0, betas, fused=True
        )
        self.weights = [p.detach() for p in generator.parameters()]
        self.average = [torch.zeros_like(weight) for weight in self.weights]

    def step(
        self, z: Tensor, real: Tensor, corners: Tensor, brightness: Tensor
    ) -> dict[str, Tensor]:
        """Take a discriminator step and a generator step on the same generated batch.

        Args:
          z: noise `[batch, latent]`.
          real: images `[batch, c, h, w]`.
          corners: of the random shift, `[batch, 2]`, the same for real and generated images.
          brightness: in [-1, 1], `[batch, 1, 1, 1]`, likewise.

        Returns:
          Losses and diagnostics as scalars on the device.
        """
        settings, step = self.settings, self.steps_made
        decay = cosine_decay(step, settings.steps)
        self.optimizer.param_groups[0]["lr"] = settings.learning_rate * decay
        self.adversary_optimizer.param_groups[0]["lr"] = settings.adversary_learning_rate * decay

        def augment(images: Tensor) -> Tensor:
            shifted = crop(images, corners, settings.shift) if settings.shift else images
            return shifted + settings.brightness * brightness

        fake = self.generator(z)
        diagnostics = self._adversary_step(augment(real), augment(fake.detach()))
        # Only the gradient of the images is needed now, not that of the discriminator's weights.
        self.discriminator.requires_grad_(False)
        loss = F.softplus(-self.discriminator(augment(fake))).mean()
        if step % settings.frozen_every == 0:
            loss = loss + settings.frozen_every * self._frozen_loss(fake)
        self.optimizer.zero_grad()
        loss.backward()
        self.discriminator.requires_grad_(True)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, self.weights, 1 - settings.ema)
        self.steps_made += 1
        pixel_std = fake.detach().std(0, correction=0).mean()
        return diagnostics | {"generator_loss": loss.detach(), "spread": pixel_std}

    def _adversary_step(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        real_logits, fake_logits = self.discriminator(real), self.discriminator(fake)
        loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
        self.adversary_optimizer.zero_grad()
        loss.backward()
        self.adversary_optimizer.step()
        return {
            "adversary_loss": loss.detach(),
            "real_score": real_logits.detach().sigmoid().mean(),
            "fake_score": fake_logits.detach().sigmoid().mean(),
        }

    def _frozen_loss(self, fake: Tensor) -> Tensor:
        """Return entropy and diversity loss under f0; compute nothing if both are off."""
        settings, loss = self.settings, torch.zeros((), device=fake.device)
        if settings.entropy_weight or settings.diversity_weight:
            logits = self.frozen(fake).logits
            if settings.entropy_weight:
                loss = loss + settings.entropy_weight * entropy_loss(logits)
            if settings.diversity_weight:
                loss = loss + settings.diversity_weight * diversity_loss(logits)
        return loss

    @torch.no_grad()
    def upload(self, noise: Tensor) -> Generator:
        """End the training; return the averaged weights with batch statistics of their own.

        Args:
          noise: `[SETTLING, batch, latent]`.
        """
        bias = 1 - self.settings.ema**self.steps_made
        torch._foreach_copy_(self.weights, torch._foreach_div(self.average, bias))
        for z in noise:
            self.generator(z)
        return self.generator.eval().requires_grad_(False)
