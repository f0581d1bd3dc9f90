"""Generator optimisation (paper, Figure 1b): each client trains a light generator of its own data.

The generator is uploaded once; nothing else of this stage leaves the client. Clients train in waves
of neighbours: one wave of all clients or, where `parallel.memory_gib` has no room for that, several
one after the other, whose uploads are offloaded to the work directory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import jax
import numpy as np
from flax import struct

from mosaic_jax import trees
from mosaic_jax.federation import Federation
from mosaic_jax.parallel import offload, take_clients
from mosaic_jax.stages import generator_judgement
from mosaic_jax.stages.client_generator import ClientGenerator
from mosaic_jax.stages.generator_ensemble import sampler, upload_shapes
from mosaic_jax.stages.generator_judgement import FAR
from mosaic_jax.stages.generator_state import (
    LOSS_WEIGHTS,
    GeneratorClient,
    GeneratorInputs,
    GeneratorState,
)
from mosaic_jax.stages.model_aggregation import client_models
from mosaic_jax.stages.stage import Metrics, Stage, State
from mosaic_jax.types import PyTree, UserError, Variables

SAMPLES = 8
"""Images of a client that are kept for the report."""

SAMPLED_CLIENTS = 100
"""Clients of which images are kept, the first."""


class WaveState(struct.PyTreeNode):
    """Carry of the stage.

    Attributes:
      training: of the wave's clients, [wave size, ...].
      distances: of all clients' images, float32 [waves, wave size], `FAR` for one to come; None if
        a single wave holds all clients.
      uploaded: checksums of the waves' uploads on disk, uint32 [waves], 0 for one to come; None if
        a single wave holds all clients.
    """

    training: GeneratorState
    distances: np.ndarray | None = None
    uploaded: np.ndarray | None = None


class OffloadedUploads:
    """The uploads of all clients in the work directory, written and checked wave by wave."""

    def __init__(self, federation: Federation, wave_size: int):
        self.federation, self.wave_size = federation, wave_size
        self.checked: dict[int, int] = {}  # waves whose uploads were seen whole, with checksums

    def read(self, checksums: np.ndarray) -> Variables:
        """Return the stack [clients, ...] on disk.

        Raises:
          UserError: the uploads of a wave are not those of its checksum, or there is no directory.
        """
        stack = self._stack()
        for wave, crc in enumerate(checksums):
            if crc and self.checked.get(wave) != crc:
                if offload.checksum(stack, wave * self.wave_size, self.wave_size) != crc:
                    raise UserError(
                        f"{self.directory()} is damaged or gone; delete the run's checkpoints of "
                        "generator_optimization to train the generators anew"
                    )
                self.checked[wave] = int(crc)
        return stack

    def write(self, wave: int, uploads: PyTree) -> int:
        """Write the uploads of a wave; return their checksum."""
        stack, start = self._stack(), wave * self.wave_size
        offload.write(stack, start, uploads)
        self.checked[wave] = offload.checksum(stack, start, self.wave_size)
        return self.checked[wave]

    def directory(self) -> Path:
        """Return where they lie.

        Raises:
          UserError: there is no work directory.
        """
        if self.federation.layout.offload_dir is None:
            raise UserError("parallel.memory_gib needs a work directory")
        return self.federation.layout.offload_dir / "generators"

    def _stack(self) -> Variables:
        shapes, clients = upload_shapes(self.federation), self.federation.num_clients
        return cast(Variables, offload.create(self.directory(), shapes, clients))


class Generators:
    """All clients' generators, `block_steps` steps of each of a wave in one compiled call."""

    def __init__(self, federation: Federation):
        self.federation, self.settings = federation, federation.config.generator_optimization
        layout, self.client = federation.layout, ClientGenerator(federation)
        self.inputs = generator_inputs(federation)
        self.wave_size = wave_size(federation)
        self.waves = -(-federation.num_clients // self.wave_size)
        self.blocks = self.settings.steps // self.settings.block_steps
        self.client_models = client_models(federation)
        self.offloaded = OffloadedUploads(federation, self.wave_size) if self.waves > 1 else None
        self.start_all = layout.jit(_sharded(federation, layout.map_clients(self.client.start)))
        block = layout.map_clients(self.client.block)
        # Clients and carry are separate arguments, so that only the carry is donated.
        self.block_all = layout.jit(
            _sharded(federation, lambda inputs, clients, carry: block(inputs, (clients, carry))),
            donate_argnums=2,
        )
        self.upload_all = layout.jit(_sharded(federation, jax.vmap(self.client.upload)))

    def members(self, wave: int) -> np.ndarray:
        """Return the clients of a wave; the last wave is filled up with the last client."""
        ids = np.arange(wave * self.wave_size, (wave + 1) * self.wave_size)
        return np.minimum(ids, self.federation.num_clients - 1)

    def clients(self, wave: int, frozen: Variables) -> GeneratorClient:
        """Return the input of a wave's clients."""
        lists = take_clients(self.federation.clients.lists, self.members(wave))
        return GeneratorClient(frozen, lists)

    def start(self, state: State) -> WaveState:
        """Start the first wave."""
        if self.offloaded is None:
            return WaveState(self.start_wave(state, 0))
        distances = np.full((self.waves, self.wave_size), FAR, np.float32)
        return WaveState(self.start_wave(state, 0), distances, np.zeros(self.waves, np.uint32))

    def start_wave(self, state: State, wave: int) -> GeneratorState:
        """Start the training of a wave's clients."""
        frozen = self.client_models(state, self.members(wave))
        training = self.start_all(self.inputs, self.clients(wave, frozen))
        if self.offloaded is not None:
            training = training.replace(frozen=frozen)
        return cast(GeneratorState, training)

    def block(self, state: State, carry: WaveState, index: int) -> tuple[WaveState, Metrics]:
        """Run one block of a wave's steps; the wave's last block uploads."""
        wave, block = divmod(index, self.blocks)
        if wave and not block:
            carry = carry.replace(training=self.start_wave(state, wave))
        kept = carry.training.frozen  # apart from what is donated, as the next block needs it
        frozen = self.client_models(state, self.members(wave)) if kept is None else kept
        first = np.int32(block * self.settings.block_steps)
        inputs = self.inputs.replace(first_step=self.federation.layout.put_replicated(first))
        training, metrics = self.block_all(
            inputs, self.clients(wave, frozen), carry.training.replace(frozen=None)
        )
        after = carry.replace(training=training.replace(frozen=kept))
        if self.offloaded is None:
            return after, metrics
        if block + 1 == self.blocks:
            after = self.upload(after, wave)
        clients = np.unique(self.members(wave))
        metrics = trees.take(metrics, slice(None, len(clients)))
        return after, metrics | {"clients": clients}

    def upload(self, carry: WaveState, wave: int) -> WaveState:
        """Offload a wave's uploads; keep their checksum and distances."""
        assert self.offloaded is not None
        to_host = self.federation.layout.to_host
        distances, uploaded = np.array(carry.distances), np.array(carry.uploaded)
        uploaded[wave] = self.offloaded.write(wave, to_host(self.upload_all(carry.training)))
        distances[wave] = to_host(carry.training.distance)
        return carry.replace(distances=distances, uploaded=uploaded)

    def finish(self, state: State, carry: WaveState) -> State:
        """Leave "generators" and their images' "distances" [clients, ...] in the state."""
        if self.offloaded is None:
            distances, generators = carry.training.distance, self.upload_all(carry.training)
            return state | {"distances": distances, "generators": generators}
        generators = self.offloaded.read(np.asarray(carry.uploaded))
        every = np.asarray(carry.distances).ravel()[: self.federation.num_clients]
        return state | {"distances": every, "generators": generators}

    def inspect(self, metrics: Metrics, index: int) -> None:
        """Warn of unusable generators, see `generator_judgement.inspect`."""
        is_last = (index + 1) % self.blocks == 0
        generator_judgement.inspect(metrics, is_last, self.settings)

    def samples(self, state: State) -> dict[str, np.ndarray]:
        """Return generated and real images of the first clients, uint8 [clients, SAMPLES, ...]."""
        federation, layout = self.federation, self.federation.layout
        ids = np.arange(min(SAMPLED_CLIENTS, federation.num_clients))
        generators = take_clients(state["generators"], ids)
        if offload.is_offloaded(state["generators"]):
            generators = layout.put_replicated(generators)
        key, client_ids = layout.put_replicated((federation.key("samples"), ids))
        draw = layout.jit(sampler(federation, SAMPLES))
        images = layout.to_host(draw(generators, key, client_ids))
        real = np.stack([np.resize(federation.clients.indices[client], SAMPLES) for client in ids])
        return {
            "generated": np.rint((images + 1) * 127.5).astype(np.uint8),
            "real": federation.dataset.train_images[real],
        }


def generator_inputs(federation: Federation) -> GeneratorInputs:
    """Make the input that all clients share."""
    settings = federation.config.generator_optimization
    weights = {name: np.float32(getattr(settings, name)) for name in LOSS_WEIGHTS}
    constants = federation.layout.put_replicated(
        {
            "key": federation.key("generator_optimization"),
            "learning_rate": np.float32(settings.learning_rate),
            "adversary_learning_rate": np.float32(settings.adversary_learning_rate),
            "loss_weights": weights,
        }
    )
    return GeneratorInputs(data=federation.data, **constants)


def wave_size(federation: Federation) -> int:
    """Return how many clients train at a time: all, or as many as `parallel.memory_gib` holds."""
    model = federation.classifier.abstract_variables()
    one = jax.eval_shape(lambda lists: trees.take(lists, 0), federation.clients.lists)
    client = GeneratorClient(model, one)
    training = jax.eval_shape(
        ClientGenerator(federation).start, generator_inputs(federation), client
    )
    each = trees.num_bytes(model) + trees.num_bytes(training)
    return federation.layout.clients_per_wave(federation.num_clients, each)


def check_room(federation: Federation, generators: int) -> None:
    """Check that `generators` uploads fit into memory at a time, if they are offloaded.

    Raises:
      UserError: they do not; names the number that does.
    """
    room = federation.layout.memory_gib * 2**30
    if not room or wave_size(federation) == federation.num_clients:
        return
    most = int(room // trees.num_bytes(upload_shapes(federation)))
    if generators > most:
        raise UserError(
            f"a block of the distillation asks {generators} generators, but parallel.memory_gib "
            f"has room for {most}; lower knowledge_distillation.block_steps or generators_per_step"
        )


def stage(federation: Federation) -> Stage:
    """Return the stage `generator_optimization`."""
    generators = Generators(federation)
    return Stage(
        name="generator_optimization",
        blocks=generators.waves * generators.blocks,
        start=generators.start,
        block=generators.block,
        finish=generators.finish,
        artifacts={"samples": generators.samples},
        inspect=generators.inspect,
        stacks=frozenset({"training"}),
        client_steps=generators.settings.block_steps * generators.wave_size,
        upload=trees.num_bytes(upload_shapes(federation)),
    )


def _sharded(federation: Federation, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return the function with its results [clients, ...] sharded over the devices."""
    return lambda *args: federation.layout.shard_clients(function(*args))
