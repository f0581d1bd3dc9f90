"""The cores of this machine, and their shares for jobs that run side by side."""

import os
import sys

import joblib

RSS_BYTES = 1 if sys.platform == "darwin" else 1024
"""Bytes in the unit of a process's `ru_maxrss`."""


def usable() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(joblib.cpu_count()))


def shares(cores: list[int], jobs: int) -> list[set[int]]:
    """Return the cores of each of several concurrent jobs; disjoint where there are enough."""
    each = max(1, len(cores) // jobs)
    return [{cores[(job * each + i) % len(cores)] for i in range(each)} for job in range(jobs)]


def bind(share: set[int]) -> None:
    """Bind this thread, and the processes it will start, to some cores; not possible on macOS."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share)
