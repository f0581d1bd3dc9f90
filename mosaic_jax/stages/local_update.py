"""Local update (paper, Figure 1a): clients train the received model on their own data.

One client's training is `local_update`; a round maps it over all clients and averages the results
by number of images (FedAvg), batch-norm statistics included. Mosaic uses rounds before its experts
form and, with a smaller learning rate, after the distillation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mosaic_jax import rng
from mosaic_jax.data.clients import crop_and_flip, epoch_batch, to_float
from mosaic_jax.stages.evaluation import evaluator
from mosaic_jax.stages.federation import Federation, Stage, State, num_bytes
from mosaic_jax.types import Array, PyTree, Variables

Round = Callable[..., PyTree]


def local_update(
    federation: Federation,
    variables: Variables,
    data: PyTree,
    client: PyTree,
    learning_rate: Array | float,
    key: Array,
    first_step: Array | int,
    steps: int,
) -> tuple[Variables, dict[str, Array]]:
    """`steps` SGD steps of ONE client on cross-entropy.

    Args:
      federation: model and settings.
      variables: the received model.
      data: images and labels all clients index into.
      client: one client's packed lists.
      learning_rate: scalar.
      key: the stage's key; the client's stream depends on it, the client and the step alone.
      first_step: steps the client made before, so that epochs go on across rounds.
      steps: number of steps.

    Returns:
      The trained variables, and the loss and accuracy on the batches it saw.
    """
    settings, augment = federation.config.local_update, federation.config.data
    optimizer = optax.chain(
        optax.add_decayed_weights(settings.weight_decay),
        optax.sgd(learning_rate, momentum=settings.momentum or None),
    )
    client_key = rng.fold(key, client["id"])

    def step(carry: PyTree, number: Array) -> tuple[PyTree, PyTree]:
        variables, optimizer_state = carry
        positions, mask = epoch_batch(client, number, client_key, settings.batch_size)
        images = to_float(data["images"][positions])
        images = crop_and_flip(
            images, rng.fold(client_key, number, 1), augment.crop_padding, augment.flip
        )
        labels = data["labels"][positions]
        gradient, (statistics, sums) = jax.grad(_loss, argnums=1, has_aux=True)(
            federation, variables["params"], variables["batch_stats"], images, labels, mask
        )
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, "batch_stats": statistics}, optimizer_state), sums

    start = (variables, optimizer.init(variables["params"]))
    (variables, _), sums = jax.lax.scan(step, start, first_step + jnp.arange(steps))
    totals = jax.tree.map(jnp.sum, sums)
    return variables, {
        "loss": totals["loss"] / totals["count"],
        "accuracy": totals["correct"] / totals["count"],
    }


def _loss(
    federation: Federation,
    params: PyTree,
    statistics: PyTree,
    images: Array,
    labels: Array,
    mask: Array,
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    outputs, updated = federation.model.apply(
        {"params": params, "batch_stats": statistics},
        images,
        train=True,
        mask=mask,
        mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels) * mask
    correct = (outputs.logits.argmax(-1) == labels) * mask
    sums = {"loss": losses.sum(), "correct": correct.sum(), "count": mask.sum()}
    return losses.sum() / mask.sum(), (updated["batch_stats"], sums)


def round_function(federation: Federation, steps: int, keep: bool = False) -> Round:
    """Compile one round; the same function serves every round and learning rate.

    Args:
      federation: model, clients and layout.
      steps: SGD steps of each client.
      keep: whether the clients' models outlive the round, rather than their sums only.

    Returns:
      `round(variables, data, clients, weights, learning_rate, key, first_step)`, which takes
      `variables` over (they are donated) and gives a dict: "global", the first weighted sum of the
      clients' models, "others", the sums of the other columns of weights [clients, sums],
      "metrics" [clients] and, if kept, "clients".
    """

    def one_client(shared: PyTree, client: PyTree) -> tuple[Variables, PyTree]:
        variables, metrics = local_update(
            federation,
            shared["variables"],
            shared["data"],
            client,
            shared["learning_rate"],
            shared["key"],
            shared["first_step"],
            steps,
        )
        return variables, {"metrics": metrics} | ({"clients": variables} if keep else {})

    reduce = federation.reduce(one_client)

    def one_round(
        variables: Variables,
        data: PyTree,
        clients: PyTree,
        weights: Array,
        learning_rate: Array,
        key: Array,
        first_step: Array,
    ) -> PyTree:
        shared = {
            "variables": variables,
            "data": data,
            "learning_rate": learning_rate,
            "key": key,
            "first_step": first_step,
        }
        sums, kept = reduce(shared, clients, weights)
        return kept | {
            "global": jax.tree.map(lambda leaf: leaf[0], sums),
            "others": jax.tree.map(lambda leaf: leaf[1:], sums),
        }

    return federation.jit(one_round, donate_argnums=0)


def warm_up(federation: Federation, run_round: Round) -> Stage:
    """The rounds of `local_update`, their learning rate constant or falling along a cosine."""
    settings = federation.config.local_update
    rate, last = settings.learning_rate, settings.final_learning_rate
    schedule = optax.cosine_decay_schedule(
        rate, max(settings.rounds, 1), alpha=1.0 if last is None else last / rate
    )
    return rounds(federation, run_round, "local_update", settings.rounds, schedule)


def size_weights(federation: Federation) -> Array:
    """FedAvg's weights n_i / sum_i n_i, [clients, 1]."""
    sizes = federation.counts.sum(axis=1, keepdims=True)
    return jnp.asarray(sizes / sizes.sum(), jnp.float32)


def rounds(
    federation: Federation,
    run_round: Round,
    name: str,
    count: int,
    learning_rate: float | optax.Schedule,
    model: str = "global",
) -> Stage:
    """`count` FedAvg rounds as a stage, from `state[model]` to `state["global"]`.

    `learning_rate` is a number or a function of the round.
    """
    steps = federation.config.local_update.steps
    evaluate = evaluator(federation)
    size = num_bytes(jax.eval_shape(federation.initial_variables))
    weights = size_weights(federation)
    schedule = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    first_key = federation.key(name)

    def block(state: State, variables: Variables, index: int) -> tuple[Variables, PyTree]:
        result = run_round(
            variables,
            federation.data,
            federation.clients,
            weights,
            jnp.float32(schedule(index)),
            first_key,
            jnp.int32(index * steps),
        )
        return result["global"], result["metrics"]

    def finish(state: State, variables: Variables) -> State:
        return state | {"global": variables}

    return Stage(
        name=name,
        blocks=count,
        start=lambda state: federation.fresh(state[model]),
        block=block,
        finish=finish,
        evaluate=lambda state: evaluate(state["global"]),
        client_steps=steps * federation.num_clients,
        download=count * size,
        upload=count * size,
    )
