"""Walk a method's stages on shapes and compile every program, without running any.

`AbstractLayout` takes the place of a federation's `Layout`. Arrays are `jax.ShapeDtypeStruct`s with
a sharding over a mesh of devices that need not be there. A function that a stage jits is compiled
for that mesh at its first call, and returns the shapes and shardings of its results. So the
method's own code determines the programs, their arguments and their order: a plan cannot drift from
it.
"""

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax import methods
from mosaic_jax.federation import Federation
from mosaic_jax.parallel import AXIS, Layout
from mosaic_jax.plan import compiled, hlo, library
from mosaic_jax.plan.compiled import Figures, figures
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program of a stage.

    Attributes:
      stage: the stage's name; "initial_variables" comes before the first.
      phase: "start", "block", "finish" or "evaluate".
      name: of the jitted function.
      figures: memory, operations, traffic and collectives, from the compiler.
    """

    stage: str
    phase: str
    name: str
    figures: Figures


@dataclasses.dataclass
class Record:
    """The programs compiled so far, and the place in the walk of the next one.

    Attributes:
      cache: folder of the figures of earlier plans; None keeps none. A program of many clients
        takes the compiler minutes.
      report: called with every program.
      memory: bytes that a device has for a program. The GPU's compiler does not refuse more.
      programs: in the order of their compilation.
      stage: of the next program.
      phase: of the next program.
    """

    cache: Path | None = None
    report: Callable[[Program], None] = lambda program: None
    memory: float = math.inf
    programs: list[Program] = dataclasses.field(default_factory=list)
    stage: str = "initial_variables"
    phase: str = "start"

    def compiled(self, name: str, lowered: jax.stages.Lowered, mesh: Mesh) -> Figures:
        """Compile a program at this point of the walk, record it and return its figures."""
        found = self._cached(lowered, mesh)
        found = dataclasses.replace(found, fits=found.fits and found.held <= self.memory)
        program = Program(self.stage, self.phase, name, found)
        self.programs.append(program)
        self.report(program)
        return found

    def _cached(self, lowered: jax.stages.Lowered, mesh: Mesh) -> Figures:
        if self.cache is None:
            return figures(lowered)
        device = mesh.devices.flat[0]
        readers = map(
            inspect.getsource, (compiled, hlo, library)
        )  # other readers find other figures
        parts = (lowered.as_text(), device.device_kind, device.client.platform_version, *readers)
        path = self.cache / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dataclasses.asdict(figures(lowered))), encoding="utf-8")
        return Figures.read(json.loads(path.read_text(encoding="utf-8")))


@dataclasses.dataclass(frozen=True)
class AbstractLayout(Layout):
    """A layout whose arrays are shapes; made by `abstract_federation`.

    Attributes:
      num_clients: of the federation.
      record: of every compiled program.
    """

    num_clients: int = 0
    record: Record = dataclasses.field(default_factory=Record)

    def put_replicated(self, tree: PyTree) -> PyTree:
        """Return the shapes of the arrays on the mesh, see `Layout.put_replicated`."""
        return on_mesh(self.mesh, tree)

    def to_host(self, tree: PyTree) -> PyTree:
        """Return zeros, which take no memory as long as nobody writes to them."""
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)

    def zeros_like_output(self, function: Callable[..., PyTree], *args: PyTree) -> PyTree:
        """Return the shapes themselves: zeros of all clients would not fit on a host."""
        return jax.eval_shape(function, *args)

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Compile for the mesh at the first call; return shapes on the mesh."""
        jitted, done = jax.jit(function, **options), {}

        def call(*args: PyTree) -> PyTree:
            leaves, structure = jax.tree.flatten(args)
            if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
                return function(*jax.tree.unflatten(structure, map(_traceable, leaves)))
            key = structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
            if key not in done:
                lowered = jitted.lower(*args)
                name = getattr(function, "__name__", "").strip("<>")
                found = self.record.compiled(name, lowered, self.mesh)
                done[key] = self._results(lowered.out_info, found)
            return done[key]

        return call

    def _results(self, shapes: PyTree, found: Figures) -> PyTree:
        """Return shapes with the shardings that the compiler chose.

        If the program did not fit, they have those that stages ask for: stacks of all clients are
        sharded over the devices, all else is replicated.
        """
        leaves, structure = jax.tree.flatten(shapes)
        axes = found.axes or [
            0 if leaf.shape and leaf.shape[0] == self.num_clients else None for leaf in leaves
        ]
        return jax.tree.unflatten(structure, map(self._shape, leaves, axes))

    def _shape(self, leaf: Any, axis: int | None) -> jax.ShapeDtypeStruct:
        is_sharded = axis is not None and leaf.shape[axis] % self.mesh.size == 0
        spec = P(*[None] * (axis or 0), AXIS) if is_sharded else P()
        sharding = NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def abstract_federation(federation: Federation, mesh: Mesh, record: Record) -> Federation:
    """Return a federation with the same clients, data and settings on a mesh of absent devices."""
    layout = AbstractLayout(
        **{**vars(federation.layout), "mesh": mesh},
        num_clients=federation.num_clients,
        record=record,
    )
    lists = on_mesh(mesh, federation.clients.lists)
    return dataclasses.replace(
        federation,
        layout=layout,
        clients=dataclasses.replace(federation.clients, lists=lists),
        data=on_mesh(mesh, federation.data),
    )


def on_mesh(mesh: Mesh, tree: PyTree) -> PyTree:
    """Return shapes of arrays that are replicated over the mesh."""
    replicated = NamedSharding(mesh, P())

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        found = jax.eval_shape(lambda: jnp.asarray(leaf)) if np.isscalar(leaf) else leaf
        dtype = jax.dtypes.canonicalize_dtype(found.dtype, allow_extended_dtype=True)
        return jax.ShapeDtypeStruct(found.shape, dtype, sharding=replicated)

    return jax.tree.map(shape, tree)


def _traceable(leaf: Any) -> Any:
    """Return a leaf that traced ones can be combined with: zeros, which are never allocated."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def walk(
    federation: Federation, until: str = "", evaluate: bool = True
) -> tuple[list[Stage], State]:
    """Compile start, one block, end and evaluation of every stage of the method.

    Args:
      federation: of `abstract_federation`.
      until: the last stage to walk; empty for all stages.
      evaluate: whether to plan evaluations, too.

    Returns:
      The stages that were walked, and the shapes of the state after the last.
    """
    layout = federation.layout
    assert isinstance(layout, AbstractLayout)
    record = layout.record
    state: State = {"global": federation.initial_variables()}
    stages = methods.stages(federation.config.method, federation)
    names = [stage.name for stage in stages]
    stages = stages[: names.index(until) + 1] if until else stages
    for stage in stages:
        record.stage, record.phase = stage.name, "start"
        carry = stage.start(state)
        record.phase = "block"
        if stage.blocks:
            carry, _ = stage.block(state, carry, 0)
        record.phase = "finish"
        state = stage.finish(state, carry)
        record.phase = "evaluate"
        if evaluate:
            stage.evaluate(state)
    return stages, state
