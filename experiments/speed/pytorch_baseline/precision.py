"""The type that the networks compute in: float32, or bfloat16 under autocast.

Like PyTorch's own precision of matrix products it belongs to the process. In bfloat16 the forward
pass of each network runs under `torch.autocast`, which is PyTorch's own way. Weights, statistics,
optimisers and all that networks return stay float32, as in `mosaic_jax`. The meta model computes in
float32 there, too.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

_DTYPE = "float32"


def compute_in(dtype: str) -> None:
    """Set the type, "float32" or "bfloat16", of all later forward passes."""
    global _DTYPE
    _DTYPE = dtype


def compute_dtype() -> str:
    """Return the name of the type."""
    return _DTYPE


def forward_pass(device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a network's forward pass."""
    if _DTYPE == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
