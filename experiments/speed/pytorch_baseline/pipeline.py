"""Run Mosaic from the first round to the last, and each of its stages as a unit of work.

This is a plain program. It draws its own batches and noise and keeps the results of each stage.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from experiments.speed.pytorch_baseline import data, distillation, local_update, prototypes, teacher
from experiments.speed.pytorch_baseline.classifiers import (
    Classifier,
    build_classifier,
    without_statistics,
)
from experiments.speed.pytorch_baseline.evaluation import evaluate
from experiments.speed.pytorch_baseline.generator_optimization import (
    SETTLING,
    ClientGenerator,
    cosine_decay,
)
from experiments.speed.pytorch_baseline.generators import Discriminator, Generator
from experiments.speed.pytorch_baseline.teacher import MetaModel
from mosaic_jax.config import Config


def refuse_what_is_not_built(config: Config) -> None:
    """Stop on settings whose work would not be the same.

    Raises:
      ValueError: naming the setting.
    """
    generators = config.generator_optimization
    built = {
        "model.name": (config.model.name, ("resnet8", "resnet18", "cnn", "lenet")),
        "model_aggregation.global_expert": (config.model_aggregation.global_expert, (False,)),
        "prototypes.features": (config.prototypes.features, ("experts",)),
        "knowledge_distillation.images": (config.knowledge_distillation.images, ("generated",)),
        "generator_optimization.adversary": (generators.adversary, ("dcgan",)),
        "generator_optimization.conditional": (generators.conditional, (False,)),
        "generator_optimization.upsampling": (generators.upsampling, ("transposed",)),
        "generator_optimization.inversion_threshold": (generators.inversion_threshold, (0,)),
    }
    for name, (value, known) in built.items():
        if value not in known:
            raise ValueError(f"the PyTorch baseline has no {name} = {value!r}, only {known}")


@dataclass(frozen=True)
class Work:
    """The settings and data of both sides, as NumPy arrays.

    Attributes:
      config: all settings.
      train_images: uint8 [n, h, w, c], with int labels [n]; likewise the test set.
      indices: positions of each client's training images.
      counts: images of each class, [clients, classes].
      local_shards: positions in the test set that follow each client's classes.
      mean, std: per channel, for the classifier.
    """

    config: Config
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    indices: list[np.ndarray]
    counts: np.ndarray
    local_shards: list[np.ndarray]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Mosaic:
    """The stages in order; `run` runs them all.

    Args:
      work: settings and data.
      device: holds all tensors.
      chunk: images a model in eval mode is given at a time.
    """

    def __init__(self, work: Work, device: torch.device, chunk: int):
        refuse_what_is_not_built(work.config)
        self.work, self.config, self.device, self.chunk = work, work.config, device, chunk
        self.images = data.to_float(work.train_images, device)
        self.framed = data.frame(self.images, self.config.data.crop_padding)
        self.labels = torch.from_numpy(work.train_labels).long().to(device)
        self.test_images = data.to_float(work.test_images, device)
        self.test_labels = torch.from_numpy(work.test_labels).long().to(device)
        self.index = [torch.from_numpy(index).long().to(device) for index in work.indices]
        self.sizes = work.counts.sum(1)
        self.model = build_classifier(
            self.config.model.name,
            work.counts.shape[1],
            self.config.model.width,
            work.mean,
            work.std,
            work.train_images.shape[1],
        ).to(device)
        self.first = [tensor.clone() for tensor in local_update.tensors(self.model)]
        self.server = self.first
        self.clients: list[local_update.State] = []

    def classifier(self, state: local_update.State) -> Classifier:
        """Return a new classifier with these tensors."""
        model = copy.deepcopy(self.model)  # draws no first weights: that takes time at width 64
        torch._foreach_copy_(local_update.tensors(model), state)
        return model

    def batches(self, client: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `steps` augmented batches of a client."""
        augment, size = self.config.data, self.config.local_update.batch_size
        for positions in islice(data.epochs(self.index[client], size), steps):
            images = data.augmented(self.framed, positions, augment.crop_padding, augment.flip)
            yield images, self.labels.index_select(0, positions)

    def local_round(
        self, learning_rate: float, steps: int, batch_norm: str = "train", keep: bool = False
    ) -> None:
        """Run a FedAvg round from and to `server`; if kept, `clients` become its models."""
        self.server, kept, _ = local_update.federated_round(
            self.model,
            self.server,
            [self.batches(client, steps) for client in range(len(self.index))],
            self.sizes / self.sizes.sum(),
            self.config.local_update,
            learning_rate,
            batch_norm,
            keep,
        )
        self.clients = kept or self.clients

    def vmapped_round(self, learning_rate: float, steps: int) -> local_update.State:
        """Run the round with all clients stacked, on full batches drawn with replacement."""
        size = self.config.local_update.batch_size

        def batch() -> tuple[Tensor, Tensor]:
            draws = [torch.randint(len(index), (size,), device=self.device) for index in self.index]
            chosen = [index[draw] for index, draw in zip(self.index, draws, strict=True)]
            images = torch.stack([data.take(self.images, positions) for positions in chosen])
            return images, self.labels[torch.stack(chosen)]

        model = without_statistics(self.model)
        return local_update.vmapped_round(
            model,
            [parameter.detach() for parameter in model.parameters()],
            (batch() for _ in range(steps)),
            self.sizes / self.sizes.sum(),
            self.config.local_update,
            learning_rate,
        )

    def warm_up(self) -> None:
        """Run the rounds before the experts form; their learning rate falls along a cosine."""
        settings = self.config.local_update
        first, last = settings.learning_rate, settings.final_learning_rate
        last = first if last is None else last
        for index in range(settings.rounds):
            rate = last + (first - last) * cosine_decay(index, settings.rounds)
            self.local_round(rate, settings.steps)

    def form_experts(self) -> None:
        """Run one more round and mix its client models into class experts."""
        settings = self.config.model_aggregation
        self.local_round(settings.learning_rate, settings.steps, keep=True)
        rows, assignment = local_update.expert_weights(self.work.counts)
        states = local_update.class_experts(self.clients, torch.from_numpy(rows).to(self.device))
        self.experts = [self.classifier(state).requires_grad_(False) for state in states]
        self.assignment = torch.from_numpy(assignment).long().to(self.device)

    def start_generators(self) -> None:
        """Make new generators and adversaries of all clients, beside their frozen models."""
        settings = self.config.generator_optimization
        height, _, channels = self.work.train_images.shape[1:]
        self.training = [
            ClientGenerator(
                Generator(height, channels, settings.width, settings.latent).to(self.device),
                Discriminator(height, channels, settings.adversary_width).to(self.device),
                self.classifier(state),
                settings,
            )
            for state in self.clients
        ]

    def train_generators(self) -> None:
        """Train the generators, one client after the other, and upload them."""
        settings, device = self.config.generator_optimization, self.device
        batch, self.generators = settings.batch_size, []
        for client, index in zip(self.training, self.index, strict=True):
            for _ in range(settings.steps):
                client.step(
                    torch.randn(batch, settings.latent, device=device),
                    data.take(
                        self.images, index[torch.randint(len(index), (batch,), device=device)]
                    ),
                    data.corners(batch, settings.shift, device),
                    torch.rand(batch, 1, 1, 1, device=device) * 2 - 1,
                )
            noise = torch.randn(SETTLING, batch, settings.latent, device=device)
            self.generators.append(client.upload(noise))

    def collect_prototypes(self) -> None:
        """Collect the prototypes of all clients, in the features of each expert."""
        torch._foreach_copy_(local_update.tensors(self.model), self.server)
        labels, parts = self.work.train_labels, []
        for index in self.work.indices:
            classes = [
                (int(label), torch.from_numpy(index[labels[index] == label]).long().to(self.device))
                for label in np.unique(labels[index])
            ]
            parts.append(
                prototypes.client_prototypes(
                    self.model, self.experts, self.images, classes, self.config.prototypes
                )
            )
        features, of_class, valid = zip(*parts, strict=True)
        mask = torch.cat(valid)
        self.prototypes = torch.cat(features, 1)[:, mask], torch.cat(of_class)[mask]

    def train_meta(self) -> Tensor:
        """Train the meta model on the prototypes; return its losses `[steps]`."""
        settings, (features, labels) = self.config.meta_model, self.prototypes
        classes = self.work.counts.shape[1]
        meta = MetaModel(
            classes, classes, settings.feedforward, settings.dropout, settings.expert_embedding
        ).to(self.device)
        tokens = teacher.prototype_logits(self.experts, features, self.assignment)
        examples = torch.arange(len(labels), device=self.device)
        chosen = islice(data.epochs(examples, settings.batch_size), settings.steps)
        losses = teacher.train_meta(
            meta, ((tokens.index_select(0, p), labels.index_select(0, p)) for p in chosen), settings
        )
        self.teacher = teacher.Teacher(self.experts, meta, self.assignment, self.chunk)
        return losses

    def student(self) -> distillation.Student:
        """Return a student with the server's weights, before its first step."""
        settings = self.config.knowledge_distillation
        prior = np.zeros((1, self.work.counts.shape[1]), np.float32)
        if settings.class_prior:
            prior = distillation.class_prior(self.work.counts, self._shares())
        added = torch.from_numpy(prior).to(self.device)
        return distillation.Student(self.classifier(self.server), self.teacher, added, settings)

    def distil(self, student: distillation.Student, steps: int) -> None:
        """Take steps of the student on generated images, on pools of them if set."""
        student.distil(self.generated, steps, self.config.knowledge_distillation.pool_passes)

    def generated(self) -> Tensor:
        """Generate one batch by the ensemble of generators, shared out by n_i."""
        latent = self.config.generator_optimization.latent
        noise = [torch.randn(n, latent, device=self.device) for n in self._shares().tolist()]
        return distillation.draw(self.generators, noise)

    def _shares(self) -> np.ndarray:
        settings = self.config.knowledge_distillation
        return distillation.shares(self.sizes, settings.images_per_generator * len(self.sizes))

    def fine_tune(self, student: Classifier) -> None:
        """Run the rounds of local training that follow the distillation."""
        settings = self.config.fine_tuning
        self.server = [tensor.clone() for tensor in local_update.tensors(student.eval())]
        for _ in range(settings.rounds):
            steps = self.config.local_update.steps
            self.local_round(settings.learning_rate, steps, settings.batch_norm)

    def evaluate(self) -> dict[str, float]:
        """Return the accuracy of the server's model on the test images."""
        torch._foreach_copy_(local_update.tensors(self.model), self.server)
        return evaluate(
            lambda images: self.model(images).logits,
            self.test_images,
            self.test_labels,
            self.work.local_shards,
            self.chunk,
        )

    def run(self) -> dict[str, float]:
        """Run all stages from the first model on; return the fine-tuned student's accuracy."""
        self.server = [tensor.clone() for tensor in self.first]
        self.warm_up()
        self.form_experts()
        self.start_generators()
        self.train_generators()
        self.collect_prototypes()
        self.train_meta()
        student = self.student()
        self.distil(student, self.config.knowledge_distillation.steps)
        self.fine_tune(student.model)
        return self.evaluate()
