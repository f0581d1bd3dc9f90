"""Model aggregation (paper, Figure 1c): client models become class-wise experts.

Expert c is the mean of the client models weighted by how many images of class c each trained on:
theta_c = sum_i n_ic theta_i / sum_i n_ic, batch-norm statistics included. All experts and the
global model are one weighted contraction that streams over the clients. Classes with equal weight
rows have the same expert: only different ones are kept, and `assignment` says whose each class is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.parallel import in_blocks
from mosaic_jax.stages.evaluation import evaluator
from mosaic_jax.stages.federation import Federation, Stage, num_bytes
from mosaic_jax.stages.local_update import round_function, size_weights
from mosaic_jax.types import Array, PyTree, Variables


def expert_weights(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the mixing matrix, and which row each class uses.

    Args:
      counts: images n_ic, [clients, classes].

    Returns:
      Different weight rows, float32 [experts, clients], each summing to 1, and int32 [classes].
      A class nobody holds gets the global mean's row.
    """
    held = counts.sum(axis=0) > 0
    shares = np.where(held, counts, counts.sum(axis=1, keepdims=True)).astype(np.float64)
    shares /= shares.sum(axis=0)
    rows, assignment = np.unique(shares.T.astype(np.float32), axis=0, return_inverse=True)
    return rows, assignment.reshape(-1).astype(np.int32)


def form_experts(federation: Federation) -> Stage:
    """One more round, whose client models give the experts and the next global model.

    Leaves in the state "global", "experts" [experts, ...] and "clients" [clients, ...]: a client's
    own model stays with it and is the frozen classifier of its generator optimisation.
    """
    config = federation.config
    run_round = round_function(federation, config.model_aggregation.steps, keep=True)
    rows, _ = expert_weights(federation.counts)
    weights = jnp.concatenate([size_weights(federation), federation.place(rows.T)], axis=1)
    constants = {
        "learning_rate": np.float32(config.model_aggregation.learning_rate),
        "key": federation.key("model_aggregation"),
        "first_step": np.int32(0),
    }
    shared = {"data": federation.data} | federation.place(constants)
    evaluate = evaluator(federation)
    size = num_bytes(jax.eval_shape(federation.initial_variables))

    def run(variables: Variables) -> tuple[PyTree, PyTree]:
        result = run_round(variables, shared, federation.clients, weights)
        models = {"global": result["global"], "experts": result["others"]}
        return models | {"clients": result["clients"]}, result["metrics"]

    return Stage(
        name="model_aggregation",
        blocks=1,
        start=lambda state: federation.empty(lambda v: run(v)[0], state["global"]),
        block=lambda state, carry, index: run(federation.fresh(state["global"])),
        finish=lambda state, carry: state | carry,
        evaluate=lambda state: {
            f"global_{name}": value for name, value in evaluate(state["global"]).items()
        },
        client_steps=config.model_aggregation.steps * federation.num_clients,
        download=size,
        upload=size + 4 * federation.counts.shape[1],
    )


def expert_logits(federation: Federation) -> Any:
    """`(experts [experts, ...], images) -> logits [batch, experts, classes]`, one batched call.

    The stacked experts are laid over the mesh like clients.
    """

    def one_expert(images: Array, expert: Variables) -> Array:
        return in_blocks(lambda part: federation.outputs(expert, part).logits, images)

    mapped = federation.map(one_expert)

    def logits(experts: Variables, images: Array) -> Array:
        return jnp.swapaxes(mapped(images, experts), 0, 1)

    return logits
