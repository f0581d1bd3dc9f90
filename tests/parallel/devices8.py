"""A client function and its layouts; as a script, the same on eight devices.

    python -m tests.parallel.devices8 results.npz

`test_eight_devices.py` runs it in a process of its own: a process settles on its devices once.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax import parallel, rng, trees
from mosaic_jax.models import winograd
from mosaic_jax.models.convolution import convolve
from mosaic_jax.plan.hlo import Module
from mosaic_jax.run import experiment
from mosaic_jax.stages import generator_optimization, image_pool, meta_model, teacher
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.rounds import Rounds
from tests.helpers import tiny_federation

ROUND = {"partition.clients": 5, "data.image_size": 8, "local_update.steps": 2}
KEY = jax.random.key(7)


def train(shared, client):
    """A few steps of a nonlinear model of ONE client, from its own random start.

    Divides by the norm of the data: NaN for a client of zeros.
    """
    x = client["x"] / jnp.sqrt((client["x"] ** 2).sum())
    key = rng.fold(shared["key"], client["id"])
    start = shared["model"] + 0.1 * jax.random.normal(key, shared["model"].shape)

    def loss(model):
        return (jnp.tanh(x @ model) ** 2).sum() + jnp.cos(model).sum()

    model = jax.lax.fori_loop(0, 5, lambda _, m: m - 0.1 * jax.grad(loss)(m), start)
    return {"model": model, "sizes": {"one": jnp.float32(1)}}, {"loss": loss(model), "end": model}


def inputs(clients):
    """What all share, the stacked clients, and weights [clients, 2] that sum to one."""
    generator = np.random.default_rng(1)
    x = jnp.asarray(generator.standard_normal((16, 6, 4)) + 2, jnp.float32)[:clients]
    weights = generator.uniform(0.1, 1, (16, 2))[:clients]
    shared = {"key": KEY, "model": jnp.linspace(-1, 1, 4)}
    stacked = {"id": jnp.arange(clients), "x": x}
    return shared, stacked, jnp.asarray(weights / weights.sum(0), jnp.float32)


def reduced(clients, devices=1, lanes=0, debug=False):
    """Sums and kept results of one layout."""
    mesh = parallel.make_mesh(devices)
    function = parallel.reduce_clients(train, mesh, lanes, debug=debug)
    return (function if debug else jax.jit(function))(*inputs(clients))


def pmapped(clients, lanes):
    """The kept results from `pmap` over devices of `vmap` over lanes."""
    shared, stacked, _ = inputs(clients)
    grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, lanes, *leaf.shape[1:]), stacked)
    inner = jax.vmap(train, in_axes=(None, 0))
    _, kept = jax.pmap(inner, in_axes=(None, 0))(shared, grouped)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), kept)


def one_round(devices, lanes=1):
    """One real round of local training of five clients: global model and metrics."""
    layout = {"parallel.devices": devices, "parallel.lanes": lanes}
    federation = tiny_federation(**ROUND, **layout)
    stage = Rounds(federation, ClientUpdate(federation, 2), "local_update", 1, 0.05).stage()
    state = {"global": federation.initial_variables()}
    carry, metrics = stage.block(state, stage.start(state), 0)
    return carry.model, {"loss": metrics["loss"], "accuracy": metrics["accuracy"]}


def split_batch(devices):
    """Gradients of a wide convolution whose images lie on several devices, and gathers of these."""
    mesh = parallel.make_mesh(devices)
    x = jax.random.normal(KEY, (64, 8, 8, 64))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 64, 64)) / 24
    assert winograd.suits(x, kernel, 1, 1)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, 1, 1, "gradients")))

    places = NamedSharding(mesh, P(parallel.AXIS)), NamedSharding(mesh, P())
    arguments = jax.device_put((x, kernel), places)
    program = jax.jit(jax.grad(loss, (0, 1)), out_shardings=places).lower(*arguments).compile()
    return program(*arguments), program.as_text().count("all-gather")


def taught(devices, together):
    """A teacher of random experts on 16 images, so many fused at a time, and gathers in loops."""
    federation = tiny_federation(**ROUND, **{"parallel.devices": devices})
    models = jax.jit(jax.vmap(federation.classifier.module.init, (0, None)))
    images = jax.random.uniform(KEY, (16, *federation.dataset.image_shape), minval=-1)
    experts = models(jax.random.split(KEY, 10), images[:1])
    meta = {"params": meta_model.MetaTraining(federation).start().params}
    variables = federation.layout.put_replicated(teacher.Teacher(experts, meta))
    everything = teacher.ATTENTION_BYTES
    teacher.ATTENTION_BYTES = 4 * 10**3 * together
    try:
        fused = teacher.teacher_logits(federation)
    finally:
        teacher.ATTENTION_BYTES = everything
    program = jax.jit(fused).lower(variables, images).compile()
    found = Module(program.as_text()).collectives()
    return program(variables, images), sum(each.in_loop for each in found)


def pooled(devices):
    """Five steps' images and targets of a pool of three draws, and how often devices exchange."""
    layout = parallel.Layout(parallel.make_mesh(devices))

    def draw(number):
        images = jax.random.normal(rng.fold(KEY, number), (16, 4, 4, 1))
        images = jax.lax.with_sharding_constraint(images, layout.data_parallel)
        return images, jnp.tanh(images).sum((1, 2))

    def taken():
        pool = image_pool.fill(draw, 3, layout)
        rows = image_pool.shuffled(KEY, 3, 16, 5)
        return jax.lax.map(lambda row: image_pool.take(pool, row, (4, 4, 1)), rows)

    where = NamedSharding(layout.mesh, P(None, parallel.AXIS))
    program = jax.jit(taken, out_shardings=where).lower().compile()
    return program(), len(Module(program.as_text()).collectives())


def spread_at_a_restore(devices):
    """Of what generators carry: leaves a restored run spreads, the stacks, and what is no stack."""
    layout = {"partition.clients": 4, "parallel.devices": devices, "data.image_size": 16}
    federation = tiny_federation(**ROUND | layout)
    clients = jax.vmap(lambda _: federation.initial_variables())(jnp.arange(4))
    stage = generator_optimization.stage(federation)
    carry = experiment._abstract_carry(
        stage, {"client_models": federation.layout.shard_clients(clients)}, federation
    )
    spread, stacks, others = 0, 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        is_spread = leaf.sharding.spec == P(parallel.AXIS)
        is_stack = trees.entry(path) in stage.stacks
        spread, stacks, others = spread + is_spread, stacks + is_stack, others + (not is_stack)
    return spread, stacks, others


def results():
    """Every layout under the name of its test."""
    assert len(jax.devices()) == 8
    return {
        "5 on 1": reduced(5, 1),
        "5 on 8": reduced(5, 8),
        "11 on 4": reduced(11, 4),
        "11 on 4, 2 lanes": reduced(11, 4, 2),
        "11 on 8": reduced(11, 8),
        "11 on 8 again": reduced(11, 8),
        "16 on 8, 2 lanes": reduced(16, 8, 2),
        "16 pmapped": ({}, pmapped(16, 2)),
        "round on 8": one_round(8),
        "split batch on 4": split_batch(4),
        "taught on 4": taught(4, 2),
        "pooled on 4": pooled(4),
        "restored on 4": spread_at_a_restore(4),
    }


if __name__ == "__main__":
    leaves = {
        f"{name}/{i}": np.asarray(leaf)
        for name, tree in results().items()
        for i, leaf in enumerate(jax.tree.leaves(tree))
    }
    np.savez(sys.argv[1], **leaves)
