"""Local update (paper, Figure 1a): clients train the received model on their own data.

One client's training is `ClientUpdate`; a round maps it over all clients and averages the results
by number of images (FedAvg), batch-norm statistics included. Mosaic uses rounds before its experts
form and, with a smaller learning rate, after the distillation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax import rng
from mosaic_jax.data.clients import crop_and_flip, epoch_batch, to_float
from mosaic_jax.stages.evaluation import evaluator
from mosaic_jax.stages.federation import Federation, Stage, State, num_bytes
from mosaic_jax.types import Array, PyTree, Variables

Round = Callable[[Variables, PyTree, PyTree, Array], PyTree]


class ClientUpdate:
    """SGD steps of ONE client on cross-entropy.

    Args:
      federation: model and settings.
      steps: number of steps.
      batch_norm: "train": batch statistics, and the client's own running ones go into the average;
        "frozen": the received statistics, which stay as they are.
    """

    def __init__(self, federation: Federation, steps: int, batch_norm: str = "train"):
        self.federation, self.steps, self.batch_norm = federation, steps, batch_norm
        self.settings = federation.config.local_update

    def __call__(self, shared: PyTree, client: PyTree) -> tuple[Variables, dict[str, Array]]:
        """Train the received model.

        Args:
          shared: "variables", the received model; "data" all clients index into; "learning_rate";
            "key" of the stage, on which, with the client and the step, the client's stream depends;
            "first_step", steps made before, so that epochs go on across rounds.
          client: its packed lists.

        Returns:
          The trained variables, and the loss and accuracy on the batches it saw.
        """
        received = shared["variables"]
        start = (received, self.optimizer(shared).init(received["params"]))
        numbers = shared["first_step"] + jnp.arange(self.steps)
        (variables, _), sums = jax.lax.scan(
            lambda carry, number: self.step(shared, client, carry, number), start, numbers
        )
        totals = jax.tree.map(jnp.sum, sums)
        return variables, {
            "loss": totals["loss"] / totals["count"],
            "accuracy": totals["correct"] / totals["count"],
        }

    def optimizer(self, shared: PyTree) -> optax.GradientTransformation:
        """SGD with L2 on all parameters."""
        return optax.chain(
            optax.add_decayed_weights(self.settings.weight_decay),
            optax.sgd(shared["learning_rate"], momentum=self.settings.momentum or None),
        )

    def step(
        self, shared: PyTree, client: PyTree, carry: PyTree, number: Array
    ) -> tuple[PyTree, dict[str, Array]]:
        """One step on the next batch of the client's epoch."""
        (variables, state), augment = carry, self.federation.config.data
        key, data = rng.fold(shared["key"], client["id"]), shared["data"]
        positions, mask = epoch_batch(client, number, key, self.settings.batch_size)
        images = to_float(data["images"][positions])
        images = crop_and_flip(images, rng.fold(key, number, 1), augment.crop_padding, augment.flip)
        gradient, (statistics, sums) = jax.grad(self.loss, has_aux=True)(
            variables["params"], variables["batch_stats"], images, data["labels"][positions], mask
        )
        updates, state = self.optimizer(shared).update(gradient, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, "batch_stats": statistics}, state), sums

    def loss(
        self, params: PyTree, statistics: PyTree, images: Array, labels: Array, mask: Array
    ) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        """Mean cross-entropy of the unmasked images; new statistics and sums over the batch."""
        outputs, updated = self.federation.model.apply(
            {"params": params, "batch_stats": statistics},
            images,
            train=self.batch_norm == "train",
            mask=mask,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels) * mask
        correct = (outputs.logits.argmax(-1) == labels) * mask
        sums = {"loss": losses.sum(), "correct": correct.sum(), "count": mask.sum()}
        statistics = updated.get("batch_stats", statistics)
        return losses.sum() / mask.sum(), (statistics, sums)


def round_function(
    federation: Federation, steps: int, *, keep: bool = False, batch_norm: str = "train"
) -> Round:
    """Compile one round; the same function serves every round and learning rate.

    Args:
      federation: model, clients and layout.
      steps: SGD steps of each client.
      keep: whether the clients' models outlive the round, rather than their sums only.
      batch_norm: of `ClientUpdate`.

    Returns:
      `round(variables, shared, clients, weights)`, which takes `variables` over (they are donated);
      `shared` is all else that `ClientUpdate` is given. It gives a dict: "global", the first
      weighted sum of the clients' models, "others", the sums of the other columns of weights
      [clients, sums], "metrics" [clients] and, if kept, "clients".
    """
    update = ClientUpdate(federation, steps, batch_norm)

    def one_client(shared: PyTree, client: PyTree) -> tuple[Variables, PyTree]:
        variables, metrics = update(shared, client)
        return variables, {"metrics": metrics} | ({"clients": variables} if keep else {})

    reduce = federation.reduce(one_client)

    def one_round(
        variables: Variables, shared: PyTree, clients: PyTree, weights: Array
    ) -> dict[str, PyTree]:
        sums, kept = reduce(shared | {"variables": variables}, clients, weights)
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
    return federation.place((sizes / sizes.sum()).astype(np.float32))


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
    rates = [np.float32(schedule(index)) for index in range(count)]
    key = federation.place(federation.key(name))

    def block(state: State, variables: Variables, index: int) -> tuple[Variables, PyTree]:
        numbers = {"learning_rate": rates[index], "first_step": np.int32(index * steps)}
        shared = {"data": federation.data, "key": key} | federation.place(numbers)
        result = run_round(variables, shared, federation.clients, weights)
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
