"""The client app of `flower_worker.py`; Flower's actors import it, each in a process of its own."""

import functools
import os
import pickle
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from experiments.speed.peers.fedavg import (
    Batch,
    classifier,
    client_batches,
    set_state,
    train_client,
)
from experiments.speed.peers.work import Work
from experiments.speed.pytorch_baseline.classifiers import Classifier

WORK = "MOSAIC_PEER_WORK"
"""Environment variable with the path of the pickled work."""

app = ClientApp()


@functools.cache
def held() -> tuple[Work, Classifier]:
    """Return the work and a model, read once by each actor; an actor has one thread."""
    torch.set_num_threads(1)
    work: Work = pickle.loads(Path(os.environ[WORK]).read_bytes())
    return work, classifier(work)


@functools.cache
def batches(client: int) -> list[Batch]:
    """Return a client's batches; an actor converts them once."""
    return client_batches(held()[0], client)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model on the client's batches and send it back."""
    work, model = held()
    own = batches(int(context.node_config["partition-id"]))
    set_state(model, message.content["arrays"].to_torch_state_dict())
    train_client(model, work, own)
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": sum(len(labels) for _, labels in own)}),
        }
    )
    return Message(content=content, reply_to=message)
