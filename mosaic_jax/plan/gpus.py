"""Describe GPUs to XLA, which then compiles for them on a machine that has none.

The facts are those of the SXM cards with 80 GB: NVIDIA H100 (Hopper) and NVIDIA A100 (Ampere).
"""

from collections.abc import Sequence

import jax

from mosaic_jax import compat

COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 48 * 1024,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
}
"""Limits of both cards, by XLA's names."""

FACTS: dict[str, dict[str, float]] = {
    # CUDA C++ Programming Guide, compute capabilities 8.0 and 9.0, for the limits of a
    # multiprocessor. Clock, memory and bandwidth are what the cards report to XLA (openxla/xla,
    # xla/backends/gpu/target_config/specs: a100_sxm_80 and h100_sxm).
    "a100": {
        "core_count": 108,
        "fpus_per_core": 64,
        "shared_memory_per_core": 164 * 1024,
        "shared_memory_per_block_optin": 163 * 1024,
        "l2_cache_size": 40 * 2**20,
        "clock_rate_ghz": 1.41,
        "memory_bandwidth": 2_039_040_000_000,
        "device_memory_size": 85_100_068_864,
    },
    "h100": {
        "core_count": 132,
        "fpus_per_core": 128,
        "shared_memory_per_core": 228 * 1024,
        "shared_memory_per_block_optin": 227 * 1024,
        "l2_cache_size": 50 * 2**20,
        "clock_rate_ghz": 1.98,
        "memory_bandwidth": 3_352_320_000_000,
        "device_memory_size": 84_978_434_048,
    },
}
"""Facts of each card, by XLA's names: bytes, bytes a second and GHz."""

NAMES = {"a100": ("NVIDIA A100-SXM4-80GB", 8), "h100": ("NVIDIA H100 80GB HBM3", 9)}
"""The name that each card reports, and the major number of its compute capability."""


def description(card: str) -> str:
    """Return XLA's description of a card of `FACTS`, as the text of a protocol buffer.

    cuDNN's version is the oldest that JAX's CUDA packages ask for.
    """
    name, major = NAMES[card]
    facts = "".join(f"  {key}: {value}\n" for key, value in (COMMON | FACTS[card]).items())
    return (
        f"gpu_device_info {{\n{facts}  cuda_compute_capability {{ major: {major} }}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 12 }\n"
        f'device_description_str: "{name}"\n'
    )


def devices(card: str, count: int) -> Sequence[jax.Device]:
    """Return the devices of one host with several GPUs, to compile for without having them.

    Raises:
      UserError: this JAX cannot describe devices that are not there.
      jax.errors.JaxRuntimeError: the compiler does not take the description.
    """
    return compat.absent_devices(
        card, "cuda", target_config=description(card), topology=f"1x1x{count}"
    )
