"""Programs of a run: functions compiled at their first call, or ahead of it in other threads.

A program that is called with shapes (`jax.ShapeDtypeStruct`) in place of arrays is compiled in the
background and returns the shapes of its results. So the stages' own code, walked on shapes, names
the programs, and the call on arrays finds them compiled.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import Mesh

from mosaic_jax.parallel.devices import replicated_sharding
from mosaic_jax.types import PyTree


class Program:
    """A function compiled with `jax.jit`; also traceable inside other programs.

    Args:
      function: of arrays.
      mesh: the devices.
      **options: of `jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], mesh: Mesh, **options: Any):
        self.jitted, self.mesh = jax.jit(function, **options), mesh
        self.lock, self.pending = threading.Lock(), list[Future[Any]]()

    def __call__(self, *args: PyTree) -> PyTree:
        """Run on arrays; on shapes, compile in the background and return the results' shapes."""
        if is_abstract(args):
            return self._compile_ahead(args)
        with self.lock:  # a program is not compiled twice at the same time
            while self.pending:
                with suppress(Exception):  # what is wrong is raised again below
                    self.pending.pop().result()
            return self.jitted(*args)

    def _compile_ahead(self, args: tuple[PyTree, ...]) -> PyTree:
        traced, compilers = self.jitted.trace(*args), COMPILERS.get()
        if self.lock.acquire(blocking=False):  # else another thread compiles it just now
            try:
                self.pending.append(compilers.submit(traced.lower().compile))
            finally:
                self.lock.release()
        return self._results(traced)

    def shapes(self, *args: PyTree) -> PyTree:
        """Return the shapes of the results and where they lie; compile nothing."""
        return self._results(self.jitted.trace(*args))

    def _results(self, traced: Any) -> PyTree:
        """Lay the results' shapes over the mesh as the program's last lines say.

        Stages end with `Layout.shard_clients` and `Layout.replicate`. Where the compiler lays a
        result otherwise, a program that takes it is compiled anew at its call.
        """
        made_by = {id(out): each for each in traced.jaxpr.eqns for out in each.outvars}
        leaves, structure = jax.tree.flatten(traced.out_info)
        shapes = []
        for leaf, variable in zip(leaves, traced.jaxpr.jaxpr.outvars, strict=True):
            last: Any = made_by.get(id(variable))
            where = replicated_sharding(self.mesh)
            if last is not None and last.primitive.name == "sharding_constraint":
                where = last.params["sharding"]
            shapes.append(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where))
        return jax.tree.unflatten(structure, shapes)


COMPILERS: ContextVar[ThreadPoolExecutor] = ContextVar("COMPILERS")
"""Threads that compile programs ahead of their calls, set by who calls programs on shapes."""


def is_abstract(tree: PyTree) -> bool:
    """Return whether a tree holds shapes in place of arrays."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def shapes_of(tree: PyTree) -> PyTree:
    """Return the shapes of arrays and where they lie."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
