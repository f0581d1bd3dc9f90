"""A federation of shapes: walks a method's stages and compiles every program, without running any.

`Planned` stands in for `Federation`. Arrays are `jax.ShapeDtypeStruct`s with a sharding over a mesh
of devices that need not be there, and what a stage asks to be jitted is compiled for that mesh when
it is called and answers with the shapes and shardings of its results. So the method's own code says
which programs there are, on what, in which order: a plan cannot drift from the program.
"""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import compiled, hlo
from experiments.compiled import Figures, figures
from mosaic_jax import methods, parallel
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program of a stage.

    Attributes:
      stage: whose it is; "initial_variables" comes before the first.
      phase: "start", "block", "finish" or "evaluate".
      name: of the jitted function.
      figures: what the compiler says of it.
    """

    stage: str
    phase: str
    name: str
    figures: Figures


@dataclasses.dataclass
class Record:
    """What has been compiled, and where in the walk the next program belongs.

    Attributes:
      cache: folder of figures of earlier plans; None keeps none. A program of many clients takes
        the compiler minutes.
      report: called with every program.
    """

    cache: Path | None = None
    report: Callable[[Program], None] = lambda program: None
    programs: list[Program] = dataclasses.field(default_factory=list)
    stage: str = "initial_variables"
    phase: str = "start"

    def compiled(self, name: str, lowered: jax.stages.Lowered, mesh: Mesh) -> Figures:
        """Figures of another program, at this point of the walk."""
        found = self._cached(lowered, mesh)
        program = Program(self.stage, self.phase, name, found)
        self.programs.append(program)
        self.report(program)
        return found

    def _cached(self, lowered: jax.stages.Lowered, mesh: Mesh) -> Figures:
        if self.cache is None:
            return figures(lowered)
        device = mesh.devices.flat[0]
        readers = map(inspect.getsource, (compiled, hlo))  # who read otherwise, found other figures
        parts = (lowered.as_text(), device.device_kind, device.client.platform_version, *readers)
        path = self.cache / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dataclasses.asdict(figures(lowered))))
        return Figures.read(json.loads(path.read_text()))


@dataclasses.dataclass(frozen=True)
class Planned(Federation):
    """A federation whose arrays are shapes; made by `planned`.

    Attributes:
      record: every program that was compiled.
    """

    record: Record = dataclasses.field(default_factory=Record)

    def place(self, tree: PyTree) -> PyTree:
        """See `Federation.place`."""
        return on_mesh(self.mesh, tree)

    def fetch(self, tree: PyTree) -> PyTree:
        """Zeros, which take no memory as long as nobody writes."""
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)

    def empty(self, function: Callable[..., PyTree], *args: PyTree) -> PyTree:
        """The shapes themselves: a host would have no room for zeros of all clients."""
        return jax.eval_shape(function, *args)

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Compiles for the mesh at the first call; answers with shapes on the mesh."""
        jitted, done = jax.jit(function, **options), {}

        def planned(*args: PyTree) -> PyTree:
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

        return planned

    def _results(self, shapes: PyTree, found: Figures) -> PyTree:
        """Shapes with the shardings that the compiler chose.

        Where it gave up for want of memory, those that stages ask for: stacks of clients spread.
        """
        leaves, structure = jax.tree.flatten(shapes)
        axes = found.axes or [
            0 if leaf.shape and leaf.shape[0] == self.num_clients else None for leaf in leaves
        ]
        return jax.tree.unflatten(structure, map(self._shape, leaves, axes))

    def _shape(self, leaf: Any, axis: int | None) -> jax.ShapeDtypeStruct:
        spread = axis is not None and leaf.shape[axis] % self.mesh.size == 0
        spec = P(*[None] * (axis or 0), parallel.AXIS) if spread else P()
        where = NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def planned(federation: Federation, mesh: Mesh, record: Record) -> Planned:
    """A federation, its clients, data and settings, on a mesh that need not be there."""
    fields = {
        field.name: getattr(federation, field.name) for field in dataclasses.fields(federation)
    }
    arrays = {name: on_mesh(mesh, fields[name]) for name in ("data", "clients")}
    return Planned(**fields | arrays | {"mesh": mesh}, record=record)


def on_mesh(mesh: Mesh, tree: PyTree) -> PyTree:
    """Shapes of arrays that lie on every device of the mesh."""
    everywhere = NamedSharding(mesh, P())

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        found = jax.eval_shape(lambda: jnp.asarray(leaf)) if np.isscalar(leaf) else leaf
        dtype = jax.dtypes.canonicalize_dtype(found.dtype, allow_extended_dtype=True)
        return jax.ShapeDtypeStruct(found.shape, dtype, sharding=everywhere)

    return jax.tree.map(shape, tree)


def _traceable(leaf: Any) -> Any:
    """A leaf that can stand beside traced ones: zeros, which are never made."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def walk(planned: Planned, until: str = "", evaluate: bool = True) -> tuple[list[Stage], State]:
    """Starts every stage of the planned method, makes one block of it, its end and an evaluation.

    Args:
      planned: the federation.
      until: the last stage; all, if empty.
      evaluate: whether evaluations are planned, too.

    Returns:
      The stages walked, and the shapes that the last leaves.
    """
    record = planned.record
    state: State = {"global": planned.initial_variables()}
    stages = methods.stages(planned.config.method, planned)
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
