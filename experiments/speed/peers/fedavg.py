"""What the workers share: the model, a client's training, the loss, and when a round runs.

Nothing here imports JAX, `mosaic_jax` or a framework. Images are converted once and stay in memory,
and so do each client's batches, in the order in which it learns them.
"""

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.speed.peers.work import Work
from experiments.speed.pytorch_baseline import data, weights
from experiments.speed.pytorch_baseline.classifiers import Classifier, build_classifier

Batch = tuple[Tensor, Tensor]
"""Images `[batch, c, h, w]`, channels-last, and labels `[batch]`."""


def classifier(work: Work) -> Classifier:
    """Return the classifier with its first weights, in eval mode."""
    model = build_classifier(*work.model)
    weights.load(model, work.variables)
    return model


@torch.no_grad()
def set_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state dict into a model in eval mode.

    `load_state_dict` adds a counter to batch norms of a dict without versions, which the
    baseline's do not have.
    """
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[name])


def client_batches(work: Work, client: int) -> list[Batch]:
    """Return the batches of one client's round, converted."""
    return [_batch(work.images[each], work.labels[each]) for each in work.positions[client]]


@torch.no_grad()
def test_loss(work: Work, model: Classifier) -> float:
    """Return the mean cross-entropy of a model in eval mode on the test images."""
    images, labels = _batch(work.test_images, work.test_labels)
    return float(F.cross_entropy(model(images).logits, labels))


def _batch(images: np.ndarray, labels: np.ndarray) -> Batch:
    """Return images and labels as a model takes them."""
    converted = data.to_float(images, torch.device("cpu")).permute(0, 3, 1, 2)
    return converted, torch.from_numpy(labels).long()


def train_client(model: nn.Module, work: Work, batches: Iterable[Batch]) -> None:
    """Make one step of SGD for each batch, from the model's present weights."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        work.learning_rate,
        momentum=work.momentum,
        weight_decay=work.weight_decay,
        fused=True,
    )
    model.train()
    for images, labels in batches:
        loss = F.cross_entropy(model(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


class Rounds:
    """The end of a framework's round: it answers, and waits until the next round is asked for.

    The framework calls `ended` on its own thread. While that call waits, the framework sleeps.
    """

    def __init__(self, requests: BinaryIO, answers: BinaryIO, rounds: int):
        self.requests, self.answers, self.left, self.start = requests, answers, rounds, 0.0

    def ended(self, first: Callable[[], dict[str, Any]]) -> None:
        """Answer the seconds since the request; after the first round, what `first` returns."""
        now = time.perf_counter()
        answer: Any = now - self.start if self.start else first()
        pickle.dump(answer, self.answers)
        self.answers.flush()
        self.left -= 1
        if self.left:
            pickle.load(self.requests)
            self.start = time.perf_counter()


def pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return where requests come from and answers go to; other output goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return sys.stdin.buffer, answers
