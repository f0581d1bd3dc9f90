"""Saving and resuming: per stage, the carried pytree of its last blocks.

Each stage has a folder of orbax checkpoints; a checkpoint holds what the stage carries, not what
earlier stages left, so nothing is written twice. Orbax restores a flipped byte without a word:
every checkpoint carries a CRC-32 of its arrays, and one that does not check is passed over for the
one before it.
"""

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from mosaic_jax.types import PyTree, UserError

log = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints kept of each stage: the newest, and one to walk back to."""

FORM = 1
"""Of what is saved. Those of another form are passed over, and nothing is guessed."""


class StageCheckpoints:
    """The checkpoints of one stage."""

    def __init__(self, directory: Path):
        self.directory = directory
        with _writing(directory):
            self.manager = ocp.CheckpointManager(
                directory.absolute(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEPT, create=True, enable_async_checkpointing=False
                ),
            )

    def save(self, block: int, carry: PyTree) -> None:
        """Save what the stage carries after `block` blocks.

        Raises:
          UserError: it cannot be written; what was saved before is kept.
        """
        leaves = jax.tree.leaves(carry)
        args = ocp.args.Composite(
            carry=ocp.args.StandardSave({str(i): leaf for i, leaf in enumerate(leaves)}),
            meta=ocp.args.JsonSave({"crc": checksum(carry), "form": FORM}),
        )
        with _writing(self.directory / str(block)):
            if block in self.manager.all_steps():  # one that was passed over as damaged
                self.manager.delete(block)
            self.manager.save(block, args=args)

    def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
        """The newest checkpoint that is whole: (blocks done, carry), or None.

        Args:
          like: shapes, dtypes and shardings of the carry (`jax.ShapeDtypeStruct`).
        """
        leaves, structure = jax.tree.flatten(like)
        target = {str(i): leaf for i, leaf in enumerate(leaves)}
        for block in sorted(self.manager.all_steps(), reverse=True):
            try:
                restored = self.manager.restore(
                    block,
                    args=ocp.args.Composite(
                        carry=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
                    ),
                )
                carry = jax.tree.unflatten(structure, [restored["carry"][name] for name in target])
                if restored["meta"].get("form") != FORM:
                    raise ValueError("it is of another version of this program")
                if checksum(carry) != restored["meta"]["crc"]:
                    raise ValueError("checksum differs")
            except Exception as error:  # orbax raises bare Exception on damaged files
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                log.warning("passed over checkpoint %s/%d: %s", self.directory, block, reason)
            else:
                return block, carry
        return None

    def close(self) -> None:
        """Release the manager's threads."""
        self.manager.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A full disk reaches us as any of several exceptions of orbax and its storage."""
    try:
        yield
    except Exception as error:
        text = str(error).strip()
        reason = text.splitlines()[0] if text else repr(error)
        if "No space left" in text:
            reason = "no space left on the device"
        raise UserError(
            f"checkpoint {path} cannot be written: {reason}; those before it are kept"
        ) from error


def checksum(tree: PyTree) -> int:
    """CRC-32 over all arrays of a pytree, shapes and types included."""
    crc = 0
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(jax.device_get(leaf))
        crc = zlib.crc32(f"{array.shape}{array.dtype}".encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return crc
