"""What programs start with: JAX on this machine, a config's federation, and exit statuses."""

import logging
import os
import warnings

import jax

from mosaic_jax import hosts, parallel
from mosaic_jax.config import Config
from mosaic_jax.data import cache, sources
from mosaic_jax.stages import federation as federations
from mosaic_jax.stages.federation import Federation

CPU_DEVICES = 8
"""CPU devices at most: each holds the data set."""

USER_ERROR = 2
"""Exit status of a run the user can mend."""

FAILED = 1
INTERRUPTED = 130
TERMINATED = 143
"""What a shell reports of a process that the signals ended."""


def set_up_jax(clients: int) -> None:
    """One CPU device a core, and compiled programs kept between runs in the user's cache directory.

    XLA:CPU gains little from a second thread inside these small models, but clients on devices of
    their own run side by side. Both are left alone where the user has set them.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0))
        jax.config.update("jax_num_cpu_devices", min(cores, clients, CPU_DEVICES))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache.root() / "compilation"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Orbax reports every file it writes, and in full what it raises anyway.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message=".*Sharding info not provided.*")


def prepare(config: Config) -> Federation:
    """Load the data and lay the federation over the devices.

    Raises:
      UserError: data that are missing, or settings they cannot serve.
    """
    dataset = sources.load(
        config.data.name,
        directory=config.data.directory,
        image_size=config.data.image_size,
        train_images=config.data.train_images,
        test_images=config.data.test_images,
        seed=config.seed,
    )
    hosts.check_agreement("images", dataset.fingerprint)
    return federations.build(config, dataset, parallel.make_mesh(config.parallel.devices))
