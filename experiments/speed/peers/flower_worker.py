"""Run FedAvg in Flower's simulation, a round when told to.

The app is that of Flower's message API: a server app with the strategy FedAvg, and a client app. On
Ray every client takes one CPU, and as many clients run at once as there are cores. The strategy
evaluates the global model on the server after every round. That call waits for the next request.
"""

import contextlib
import os
import pickle
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "300",  # a busy machine takes long
}

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from experiments.speed.peers import flower_client
from experiments.speed.peers.fedavg import Rounds, classifier, pipes, set_state, test_loss
from experiments.speed.peers.work import Work


def server_app(work: Work, rounds: Rounds) -> ServerApp:
    """Return the server app: FedAvg of all clients, without evaluation by clients."""
    app, model = ServerApp(), classifier(work)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        def first() -> dict[str, Any]:
            set_state(model, arrays.to_torch_state_dict())
            return {"loss": test_loss(work, model), "settings": settings(work)}

        if server_round > 0:
            rounds.ended(first)
        return None

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=len(work.positions))
        start = ArrayRecord(model.state_dict())
        strategy.start(grid, start, num_rounds=work.rounds, evaluate_fn=evaluate)

    return app


def settings(work: Work) -> str:
    """Return what the reader of a figure should know."""
    return (
        f"flwr {version('flwr')}, ray {version('ray')}, torch {torch.__version__}; Ray backend, "
        f"one CPU and one thread a client, {work.cores} clients at once, data and model in memory"
    )


def main() -> None:
    """Read the work, and run its rounds."""
    requests, answers = pipes()
    work: Work = pickle.load(requests)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        path = Path(folder, "work.pickle")
        path.write_bytes(pickle.dumps(work))
        os.environ[flower_client.WORK] = str(path)
        run_simulation(
            server_app(work, Rounds(requests, answers, work.rounds)),
            flower_client.app,
            num_supernodes=len(work.positions),
            backend_config={
                # Without an address Ray asks the network for this machine's, and may wait for it.
                "init_args": {"num_cpus": work.cores, "_node_ip_address": "127.0.0.1"},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )


if __name__ == "__main__":
    main()
