"""Generator optimisation (paper, Figure 1b): each client trains a light generator of its own data.

The generator is uploaded once; nothing else of this stage leaves the client. All clients train at
the same time or, where `parallel.memory_gib` has no room for that, in waves of neighbours, one to
its end after the other, and the uploads lie in the work directory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import parallel, stacks
from mosaic_jax.stages.client_generator import CARRY, LOSS_WEIGHTS, ClientGenerator
from mosaic_jax.stages.federation import Federation, num_bytes
from mosaic_jax.stages.generator_ensemble import sampler
from mosaic_jax.stages.model_aggregation import client_models
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.types import PyTree, UserError, Variables

SAMPLES = 8
"""Images of a client that are kept for the report."""

SAMPLED_CLIENTS = 100
"""Clients of which they are kept, the first."""


class Generators:
    """All clients' generators, `block_steps` steps of each of a wave in one compiled call."""

    def __init__(self, federation: Federation):
        self.federation, self.settings = federation, federation.config.generator_optimization
        self.client = ClientGenerator(federation)
        constants = {
            "key": federation.key("generator_optimization"),
            "learning_rate": np.float32(self.settings.learning_rate),
            "adversary_learning_rate": np.float32(self.settings.adversary_learning_rate),
            "loss_weights": {
                name: np.float32(getattr(self.settings, name)) for name in LOSS_WEIGHTS
            },
        }
        self.shared = {"data": federation.data} | federation.place(constants)
        self.size = federation.at_a_time(self.bytes_each())
        self.waves = -(-federation.num_clients // self.size)
        self.blocks = self.settings.steps // self.settings.block_steps
        self.models = client_models(federation)
        self.checked: set[int] = set()  # waves whose uploads need not be read again
        self.start_all = federation.jit(_spread(federation, federation.map(self.client.start)))
        self.block_all = federation.jit(
            _spread(federation, _paired(federation.map(self.client.block))), donate_argnums=2
        )
        self.upload_all = federation.jit(_spread(federation, jax.vmap(self.client.upload)))

    def bytes_each(self) -> int:
        """Bytes that one client takes while it trains: its model and all that it carries."""
        model = self.federation.shapes(self.federation.model)
        one = jax.eval_shape(lambda clients: stacks.rows(clients, 0), self.federation.clients)
        carry = jax.eval_shape(self.client.start, self.shared, one | {"frozen": model})
        return num_bytes(model) + num_bytes(carry)

    def members(self, wave: int) -> np.ndarray:
        """The clients of a wave; the last wave is filled up with the last client."""
        last = self.federation.num_clients - 1
        return np.minimum(np.arange(wave * self.size, (wave + 1) * self.size), last)

    def lists(self, wave: int) -> PyTree:
        """The packed lists of a wave's clients."""
        return parallel.chosen(self.federation.clients, self.members(wave))

    def start(self, state: State, wave: int = 0) -> PyTree:
        """What a wave of clients carries before its first step."""
        frozen = self.models(state, self.members(wave))
        carry = self.start_all(self.shared, self.lists(wave) | {"frozen": frozen})
        if self.waves == 1:
            return carry
        return carry | {"frozen": frozen, "uploaded": np.zeros(self.waves, np.uint32)}

    def block(self, state: State, carry: PyTree, index: int) -> tuple[PyTree, PyTree]:
        """A block of a wave's steps; the wave's last one uploads."""
        wave, number = divmod(index, self.blocks)
        if wave and not number:
            carry = self.start(state, wave) | {"uploaded": carry["uploaded"]}
        frozen = state["clients"] if self.waves == 1 else carry["frozen"]
        first = np.int32(number * self.settings.block_steps)
        shared = self.shared | {"first_step": self.federation.place(first)}
        training = {name: part for name, part in carry.items() if name in CARRY}
        after, metrics = self.block_all(shared, self.lists(wave) | {"frozen": frozen}, training)
        if self.waves == 1:
            return after, metrics
        uploaded = np.array(carry["uploaded"])
        if number + 1 == self.blocks:
            uploaded[wave] = self.send(after, wave)
        clients = np.unique(self.members(wave))
        metrics = {name: values[: len(clients)] for name, values in metrics.items()}
        return after | {"frozen": frozen, "uploaded": uploaded}, metrics | {"clients": clients}

    def send(self, carry: PyTree, wave: int) -> int:
        """Put a wave's uploads into the work directory; their checksum."""
        start, uploads = wave * self.size, self.uploads()
        stacks.write(uploads, start, parallel.to_host(self.upload_all(carry)))
        self.checked.add(wave)
        return stacks.checksum(uploads, start, self.size)

    def finish(self, state: State, carry: PyTree) -> State:
        """Leaves "generators" [clients, ...] in the state."""
        if self.waves == 1:
            return state | {"generators": self.upload_all(carry)}
        uploads = self.uploads()
        for wave, crc in enumerate(np.asarray(carry["uploaded"])):
            if crc and wave not in self.checked:
                if stacks.checksum(uploads, wave * self.size, self.size) != crc:
                    raise UserError(
                        f"{self.directory()} is damaged or gone; delete the run's checkpoints of "
                        "generator_optimization to train the generators anew"
                    )
                self.checked.add(wave)
        return state | {"generators": uploads}

    def upload(self) -> Variables:
        """Shapes of what a client sends."""
        z = jnp.zeros((1, self.settings.latent))
        return cast(Variables, jax.eval_shape(self.client.generator.init, jax.random.key(0), z))

    def uploads(self) -> PyTree:
        """The uploads of all clients in the work directory.

        Raises:
          UserError: there is none.
        """
        return stacks.create(self.directory(), self.upload(), self.federation.num_clients)

    def directory(self) -> Path:
        """Where they lie."""
        if self.federation.spill is None:
            raise UserError("parallel.memory_gib needs a work directory")
        return self.federation.spill / "generators"

    def samples(self, state: State) -> dict[str, np.ndarray]:
        """Some generated and some real images of the first clients, for the eye."""
        federation = self.federation
        clients = np.arange(min(SAMPLED_CLIENTS, federation.num_clients))
        chosen = parallel.chosen(state["generators"], clients)
        if stacks.on_disk(state["generators"]):
            chosen = federation.place(chosen)
        numbers = federation.place({"key": federation.key("samples"), "clients": clients})
        draw = federation.jit(sampler(federation, SAMPLES))
        images = parallel.to_host(draw(chosen, numbers["key"], numbers["clients"]))
        real = np.stack([np.resize(federation.indices[client], SAMPLES) for client in clients])
        return {
            "generated": np.rint((images + 1) * 127.5).astype(np.uint8),
            "real": federation.dataset.train_images[real],
        }


def check_room(federation: Federation, together: int) -> None:
    """Check that so many uploads have room at a time, if they lie in the work directory.

    Raises:
      UserError: they have not; says how many have.
    """
    room = federation.config.parallel.memory_gib * 2**30
    if not room:
        return
    generators = Generators(federation)
    most = int(room // num_bytes(generators.upload()))
    if generators.waves > 1 and together > most:
        raise UserError(
            f"a block of the distillation asks {together} generators, but parallel.memory_gib has "
            f"room for {most}; lower knowledge_distillation.block_steps or generators_per_step"
        )


def train(federation: Federation) -> Stage:
    """The whole stage."""
    generators = Generators(federation)
    return Stage(
        name="generator_optimization",
        blocks=generators.waves * generators.blocks,
        start=generators.start,
        block=generators.block,
        finish=generators.finish,
        exhibits={"samples": generators.samples},
        stacks=CARRY | {"frozen"},
        client_steps=generators.settings.block_steps * generators.size,
        upload=num_bytes(generators.upload()),
    )


def _spread(federation: Federation, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The same, its results [clients, ...] spread over the devices."""
    return lambda *args: federation.spread(function(*args))


def _paired(mapped: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Clients and what they carry as separate arguments, so that only the latter is donated."""
    return lambda shared, clients, carry: mapped(shared, (clients, carry))
