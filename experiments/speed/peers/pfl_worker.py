"""Run FedAvg in pfl-research's simulated backend, a round when told to.

There is one process a core, with one thread each, as `torch.distributed.run` starts them: small
models gain less from a second thread. The processes share the clients out and add up what they have
learnt. A callback after every round waits for the next request, in the first process for the pipe
and in the others for the first.
"""

import pickle
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from experiments.speed.peers.fedavg import (
    Rounds,
    classifier,
    client_batches,
    pipes,
    test_loss,
)
from experiments.speed.peers.work import Work


class Classifier(nn.Module):
    """The baseline's classifier with the two functions that pfl asks for."""

    def __init__(self, work: Work):
        super().__init__()
        self.classifier = classifier(work)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return F.cross_entropy(self.classifier(images).logits, labels)

    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Weighted]:
        """Return the loss, for the evaluation that pfl makes in its first round only."""
        with torch.no_grad():
            return {"loss": Weighted(float(self.loss(images, labels)) * len(labels), len(labels))}


class Model(PyTorchModel):
    """A model whose batch statistics are averaged like its weights, and not only its weights."""

    def __init__(self, module: Classifier, work: Work):
        statistics = {n: b for n, b in module.named_buffers() if "running_" in n}
        super().__init__(
            module,
            lambda parameters, lr: torch.optim.SGD(
                parameters,
                lr,
                momentum=work.momentum,
                weight_decay=work.weight_decay,
                fused=True,
            ),
            torch.optim.SGD([*module.parameters(), *statistics.values()], lr=1.0, fused=True),
        )
        self._variable_map |= statistics

    def do_multiple_epochs_of(self, *args: Any, **kwargs: Any) -> Any:
        """Train in train mode; outside, the statistics are to be those that are averaged."""
        self.pytorch_model.train()
        result = super().do_multiple_epochs_of(*args, **kwargs)
        self.pytorch_model.eval()
        return result


class Wait(TrainingProcessCallback):
    """The end of a round; only the first process has the pipes."""

    def __init__(self, work: Work, rounds: Rounds | None):
        self.work, self.rounds = work, rounds

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Model, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Answer and wait; stop never."""

        def first() -> dict[str, Any]:
            loss = test_loss(self.work, model.pytorch_model.classifier)
            return {"loss": loss, "settings": settings(self.work)}

        if self.rounds is not None:
            self.rounds.ended(first)
        torch.distributed.barrier()
        return False, Metrics()


def settings(work: Work) -> str:
    """Return what the reader of a figure should know."""
    return (
        f"pfl {version('pfl')}, torch {torch.__version__}; simulated backend, "
        f"{torch.distributed.get_world_size()} processes of {torch.get_num_threads()} thread, "
        "data in memory, no evaluation"
    )


def run(work: Work, rounds: Rounds | None) -> None:
    """Run all rounds in this process."""
    users: dict[int, list[Tensor]] = {
        client: [torch.cat(parts) for parts in zip(*client_batches(work, client), strict=True)]
        for client in range(len(work.positions))
    }
    clients, steps, batch = work.positions.shape
    sampler = get_user_sampler("minimize_reuse", list(users))
    training = FederatedDataset(lambda user: Dataset(users[user], user_id=str(user)), sampler)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds,
            train_cohort_size=clients,
            val_cohort_size=None,
        ),
        SimulatedBackend(training, None, postprocessors=[WeightByDatapoints()]),
        Model(Classifier(work), work),
        NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=steps,
            local_learning_rate=work.learning_rate,
            local_batch_size=batch,
        ),
        callbacks=[Wait(work, rounds)],
        send_metrics_to_platform=False,
    )


def main() -> None:
    """Read the work in the first process, send it to the others, and run."""
    torch.set_num_threads(1)
    is_first = torch.distributed.get_rank() == 0
    requests, answers = pipes()
    shared: list[Any] = [pickle.load(requests) if is_first else None]
    torch.distributed.broadcast_object_list(shared)
    (work,) = shared
    run(work, Rounds(requests, answers, work.rounds) if is_first else None)


if __name__ == "__main__":
    main()
