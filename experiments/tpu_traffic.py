"""What the TPU compiler says of a local step: HBM traffic and operations a client-step.

    pip install '.[tpu]'
    python -m experiments.tpu_traffic --width 64 --clients 16 --dtypes float32 bfloat16

The program's own local step of all clients of one chip, vmapped, is compiled ahead of time for a
chip that need not be there. Figures are the compiler's cost analysis of the compiled program.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from configs.base import get_config
from experiments import branches
from mosaic_jax import main
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.local_update import ClientUpdate


def local_step(federation: Federation, device: Any) -> jax.stages.Compiled:
    """One SGD step of all clients at once, compiled for the device."""
    update, clients = ClientUpdate(federation, 1), federation.num_clients
    where = SingleDeviceSharding(device)
    variables = jax.eval_shape(federation.initial_variables)
    shared = {"data": federation.data, "learning_rate": jnp.float32(0), "key": jax.random.key(0)}

    def shapes(tree: Any, *lead: int) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype, sharding=where),
            tree,
        )

    def step(shared: Any, clients: Any, variables: Any, number: Any) -> Any:
        def one(client: Any, variables: Any) -> Any:
            state = update.optimizer(shared).init(variables["params"])
            (variables, _), sums = update.step(shared, client, (variables, state), number)
            return variables, sums

        return jax.vmap(one)(clients, variables)

    return (
        jax.jit(step, donate_argnums=2)
        .lower(
            shapes(shared),
            shapes(federation.clients),
            shapes(variables, clients),
            shapes(jnp.int32(0)),
        )
        .compile()
    )


def row(arguments: argparse.Namespace, conv: str, dtype: str) -> list[str]:
    """One form and precision."""
    device = topologies.get_topology_desc(arguments.topology, "tpu").devices[0]
    changes = {
        "data.train_images": 64 * arguments.clients,
        "partition.kind": "iid",
        "partition.clients": arguments.clients,
        "model.width": arguments.width,
        "model.conv": conv,
        "model.dtype": dtype,
    }
    federation = main.prepare(branches.config(get_config, "", 0, changes, dict(arguments.set)))
    compiled = local_step(federation, device)
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    figures = [cost["bytes accessed"], cost["flops"]]
    each = [f"{figure / arguments.clients / 1e9:.2f}" for figure in figures]
    return [conv, dtype, *each, f"{held / 2**30:.2f}"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2", help="the compiler's name of a slice")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--clients", type=int, default=16, help="of one chip")
    parser.add_argument("--convs", nargs="+", default=["native", "gradients"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", type=branches.assignment
    )
    arguments = parser.parse_args()
    head = ["convolution", "dtype", "GB a client-step", "GFLOP a client-step", "GiB held"]
    rows = [row(arguments, conv, dtype) for conv in arguments.convs for dtype in arguments.dtypes]
    print(branches.markdown([head, *rows]))
