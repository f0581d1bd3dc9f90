"""Saving and resuming: per stage, the carried pytree of its last blocks.

Each stage has a folder of orbax checkpoints; a checkpoint holds what the stage carries, not what
earlier stages left, so nothing is written twice. Orbax restores a flipped byte without a word:
every checkpoint carries a checksum of its arrays, and one that does not check is passed over for
the one before it. Several hosts write, and read, each its own part in a directory they share.
"""

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mosaic_jax.parallel import to_host
from mosaic_jax.types import Array, PyTree, UserError

log = logging.getLogger(__name__)

KEPT = 2
"""Number of checkpoints kept of each stage: the newest, and one to walk back to."""

SCHEMA_VERSION = 2
"""Version of what is saved; checkpoints of another version are passed over."""


class StageCheckpoints:
    """The checkpoints of one stage."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.passed_over: list[int] = []
        with _writing(directory):
            self.manager = ocp.CheckpointManager(
                directory.absolute(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEPT, create=True, enable_async_checkpointing=False
                ),
            )

    def save(self, block: int, carry: PyTree) -> None:
        """Save the stage's carry after `block` blocks.

        Raises:
          UserError: it cannot be written; what was saved before is kept.
        """
        leaves = jax.tree.leaves(carry)
        args = ocp.args.Composite(
            carry=ocp.args.StandardSave({str(i): leaf for i, leaf in enumerate(leaves)}),
            meta=ocp.args.JsonSave({"crc": checksum(carry), "form": SCHEMA_VERSION}),
        )
        with _writing(self.directory / str(block)):
            if block in self.manager.all_steps():  # one that was passed over as damaged
                self.manager.delete(block)
            self.manager.save(block, args=args)

    def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
        """Restore the newest whole checkpoint: (blocks done, carry), or None.

        Args:
          like: shapes, dtypes and shardings of the carry (`jax.ShapeDtypeStruct`).

        Raises:
          UserError: the machine, not the checkpoint, is at fault; or one of several hosts cannot
            read it.
        """
        leaves, structure = jax.tree.flatten(like)
        target = {str(i): leaf for i, leaf in enumerate(leaves)}
        for block in sorted(self.manager.all_steps(), reverse=True):
            arrays, reason = self._read(block, target)
            if arrays is None and jax.process_count() > 1:
                # The other hosts wait in orbax for this one.
                raise UserError(
                    f"checkpoint {self.directory / str(block)} cannot be read ({reason}); delete "
                    "it to go on from the one before"
                )
            if arrays is not None:
                carry = jax.tree.unflatten(structure, [arrays["carry"][name] for name in target])
                if checksum(carry) == arrays["meta"].get("crc"):
                    return block, carry
                reason = "checksum differs"
            log.warning("passed over checkpoint %s/%d: %s", self.directory, block, reason)
            self.passed_over.append(block)
        return None

    def _read(self, block: int, target: dict[str, PyTree]) -> tuple[Any, str]:
        """Read a checkpoint; return None and the reason if it cannot be read."""
        args = ocp.args.Composite(
            carry=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
        )
        try:
            restored = self.manager.restore(block, args=args)
            if restored["meta"].get("form") != SCHEMA_VERSION:
                raise ValueError("it is of another version of this program")
        except Exception as error:  # orbax raises bare Exception on damaged files
            if (fault := _machines_fault(error)) is not None:
                raise UserError(
                    f"checkpoint {self.directory / str(block)} cannot be read now ({fault}); "
                    "nothing is lost, and the same command goes on when that is mended"
                ) from None
            return None, str(error).splitlines()[0] if str(error) else type(error).__name__
        return restored, ""

    def close(self) -> None:
        """Release the manager's threads."""
        self.manager.close()


MACHINES_FAULTS = (
    *("RESOURCE_EXHAUSTED", "Cannot allocate memory", "out of memory"),
    *("Input/output error", "Stale file handle", "Permission denied", "PERMISSION_DENIED"),
    *("Too many open files", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Transport endpoint"),
)
"""Words in the errors of a memory, disk or network that fails: the file may be whole."""


def _machines_fault(error: BaseException | None) -> str | None:
    """Return the line of an error, or of one behind it, that is no damaged file's; else None."""
    while error is not None:
        text = str(error) or type(error).__name__
        if isinstance(error, MemoryError) or any(word in text for word in MACHINES_FAULTS):
            return text.splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the several exceptions of orbax and its storage on a full disk into one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise  # a collective failed, since a host is lost: not the file's fault
    except Exception as error:
        text = str(error).strip()
        reason = text.splitlines()[0] if text else repr(error)
        if "No space left" in text:
            reason = "no space left on the device"
        raise UserError(
            f"checkpoint {path} cannot be written: {reason}; those before it are kept"
        ) from error


def checksum(tree: PyTree) -> int:
    """Return the CRC-32 of shapes, types and sums (`_sums`) of all arrays of a pytree.

    Computed where the arrays lie, so it gathers nothing and is the same on any devices and hosts.
    """
    leaves = jax.tree.leaves(tree)
    sums = to_host(_sums(leaves))
    facts = [(leaf.shape, str(leaf.dtype), int(s)) for leaf, s in zip(leaves, sums, strict=True)]
    return zlib.crc32(str(facts).encode())


@jax.jit
def _sums(leaves: list[Array]) -> list[Array]:
    """Sum each array's numbers modulo 2^32, each hashed together with its position.

    One changed number always changes the sum, because the hash is one to one; other damage does
    but for about one case in 2^32.
    """
    return [_hashed(_bits(leaf) ^ _positions(leaf.shape)).sum(dtype=jnp.uint32) for leaf in leaves]


def _hashed(x: Array) -> Array:
    """Apply MurmurHash3's finaliser, one to one on uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(leaf: Array) -> Array:
    """Return the bits of each number as uint32."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> Array:
    """Hash each element's position in an array of this shape, uint32."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return position * np.uint32(0x9E3779B1)
