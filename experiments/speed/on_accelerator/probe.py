"""Say which devices JAX has here, and whether PyTorch would run on the same."""

import importlib.util
import platform
from collections.abc import Iterator
from typing import Any

import jax

from experiments.speed.on_accelerator import children
from experiments.speed.on_accelerator.children import Row


def probe(**_: Any) -> Iterator[Row]:
    """Yield one row of facts: platform, devices, versions and PyTorch's device."""
    first = jax.devices()[0]
    yield {
        "platform": first.platform,
        "device": f"{first.device_kind} x {len(jax.devices())}",
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}, "
        f"{first.client.platform_version.splitlines()[0]}",
        "torch_device": torch_device(),
    }


def torch_device() -> str:
    """Return where PyTorch would run, "cpu" or "cuda"; empty if it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return ""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    children.serve(probe)
