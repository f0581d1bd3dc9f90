"""What differs between versions of JAX, between systems and between terminals.

The parts of JAX that have no public name or may still move are each behind one function. All were
tried on JAX 0.10.2, 0.11.2 and 0.12.0.1. None has a public equivalent there. On a version that
lacks one, its function raises a `UserError` of one line.
"""

import locale
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from io import TextIOWrapper

import jax
from rich.console import Console

from mosaic_jax.types import Array, UserError

JAX = "jax>=0.10.2,<0.13"
"""The versions of `pyproject.toml`."""


def check_system() -> None:
    """Refuse a system that runs are not made for.

    Raises:
      UserError: it is Windows.
    """
    if sys.platform == "win32":
        raise UserError("mosaic_jax runs on Linux and macOS; on Windows, start it in WSL")


def console(quiet: bool = False) -> Console:
    """Return a terminal that prints text as it is: names of files are no markup.

    Args:
      quiet: print nothing.
    """
    print_utf8()
    return Console(markup=False, emoji=False, quiet=quiet)


def start_in_utf8_mode() -> None:
    """Start this program again in Python's UTF-8 mode, where the locale has another encoding.

    Arguments, names of files and what libraries read are all affected, and cannot be decoded again
    in a process that has begun.
    """
    if locale.getencoding().lower() not in ("utf-8", "utf8") and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def print_utf8() -> None:
    """Print UTF-8 whatever the locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def live_processes() -> Callable[[list[int]], Iterable[int]]:
    """Return a poll: of the given process numbers, those that still answer.

    `jax.distributed.initialize` must have been called. The public
    `jax.experimental.multihost_utils.live_devices` does not serve, as it waits for all processes.

    Raises:
      UserError: this JAX has no such poll.
    """
    try:
        from jax._src.distributed import global_state

        return global_state.client.get_live_nodes  # type: ignore[union-attr]
    except (ImportError, AttributeError):
        raise _missing("poll of live processes, which a run on several hosts needs") from None


def varying_axes(array: Array) -> frozenset[str]:
    """Return the mesh axes of the enclosing `shard_map` over which an array varies.

    Outside `shard_map` there are none. `jax.typeof` is public; what it says of such axes is not.

    Raises:
      UserError: this JAX does not say it.
    """
    try:
        return jax.typeof(array).manual_axis_type.varying
    except AttributeError:
        raise _missing("list of the mesh axes that an array varies over") from None


def cost_of_text(text: str) -> dict[str, float]:
    """Return XLA's cost analysis of a program's text, among it "flops" and "bytes accessed".

    The public `jax.stages.Compiled.cost_analysis` does not serve, as it analyses no single
    computation of a program.

    Raises:
      UserError: this jaxlib has no such analysis.
    """
    try:
        from jaxlib._hlo import hlo_module_from_text
        from jaxlib._jax import hlo_module_cost_analysis
    except ImportError:
        raise _missing("cost analysis of a program's text, which the pod plan needs") from None
    return hlo_module_cost_analysis(jax.devices("cpu")[0].client, hlo_module_from_text(text))


def absent_devices(name: str, platform: str, /, **options: str) -> Sequence[jax.Device]:
    """Return the devices of a topology, to compile for without having them.

    Args:
      name: the topology's, such as "v5e:2x4" of a TPU slice.
      platform: "tpu" or "cuda".
      options: of that compiler.

    Raises:
      UserError: this JAX cannot describe topologies.
      jax.errors.JaxRuntimeError: the compiler knows no such topology.
    """
    try:
        from jax.experimental.topologies import get_topology_desc
    except ImportError:
        raise _missing("description of absent devices, which the pod plan needs") from None
    return get_topology_desc(name, platform, **options).devices


def _missing(part: str) -> UserError:
    return UserError(f"JAX {jax.__version__} has no {part}; install '{JAX}'")
