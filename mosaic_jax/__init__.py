"""Mosaic (arXiv 2505.19699) in JAX. `load_run` gives a notebook the models of a finished run."""

from typing import Any

__all__ = ["load_run"]


def __getattr__(name: str) -> Any:
    """`load_run`, imported when it is asked for: reports and readers of data need no JAX."""
    if name == "load_run":
        from mosaic_jax.run.load_run import load_run

        return load_run
    raise AttributeError(f"module 'mosaic_jax' has no attribute {name!r}")
