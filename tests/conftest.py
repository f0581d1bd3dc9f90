"""What several tests share: a cache of compiled programs, and federations of a few seconds."""

import os
import warnings
from pathlib import Path

import jax
import pytest

from mosaic_jax import parallel
from mosaic_jax import settings as reader
from mosaic_jax.data import sources
from mosaic_jax.stages import federation as federations

CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
    Path(__file__).parents[1] / ".pytest_cache" / "jax"
)
CACHE_SETTINGS = {
    "jax_compilation_cache_dir": CACHE,
    "jax_persistent_cache_min_compile_time_secs": 0,
}
for setting, value in CACHE_SETTINGS.items():
    jax.config.update(setting, value)

ORBAX_LEFTOVERS = "(?s).*(Event loop is closed|_read_array_index_and_device_put)"
"""Complaints of what a restore that failed leaves behind; they come at any time after it."""

TINY = {
    "data.name": "synthetic",
    "data.image_size": 16,
    "data.train_images": 200,
    "data.test_images": 60,
    "partition.clients": 3,
    "partition.alpha": 0.5,
    "partition.minimum": 4,
    "model.name": "cnn",
    "model.width": 4,
    "local_update.rounds": 2,
    "local_update.steps": 3,
    "local_update.batch_size": 16,
    "local_update.learning_rate": 0.05,
    "model_aggregation.steps": 3,
    "generator_optimization.steps": 4,
    "generator_optimization.block_steps": 2,
    "generator_optimization.batch_size": 8,
    "generator_optimization.latent": 8,
    "generator_optimization.width": 4,
    "generator_optimization.adversary_width": 4,
    "prototypes.per_class": 3,
    "prototypes.images_per_class": 12,
    "prototypes.iterations": 5,
    "meta_model.steps": 4,
    "meta_model.batch_size": 16,
    "meta_model.feedforward": 16,
    "knowledge_distillation.steps": 4,
    "knowledge_distillation.block_steps": 2,
    "knowledge_distillation.images_per_generator": 4,
    "fine_tuning.rounds": 1,
}


def pytest_configure(config):
    for category in ("pytest.PytestUnraisableExceptionWarning", "RuntimeWarning"):
        config.addinivalue_line("filterwarnings", f"ignore:{ORBAX_LEFTOVERS}:{category}")


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure(config):
    """For what comes after the last test, when pytest looks once more with other filters."""
    warnings.filterwarnings("ignore", ORBAX_LEFTOVERS, pytest.PytestUnraisableExceptionWarning)


def tiny_federation(**overrides):
    """A federation of 3 clients and 200 images; overrides as `{"section.setting": value}`."""
    settings = reader.from_config_dict(reader.make("", TINY | overrides, {}).to_dict())
    dataset = sources.load(
        settings.data.name,
        image_size=settings.data.image_size,
        train_images=settings.data.train_images,
        test_images=settings.data.test_images,
        seed=settings.seed,
    )
    return federations.build(settings, dataset, parallel.make_mesh(settings.parallel.devices))


@pytest.fixture(scope="session")
def make_federation():
    """`make_federation(**{"section.setting": value})`."""
    return tiny_federation


@pytest.fixture
def compilations():
    """A list that grows by one entry for every program XLA is asked to compile."""
    events = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(details.get("fun_name", "a program"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def subprocess_environment():
    """Variables for a child process of eight CPU devices that uses the same cache."""
    own = {name.upper(): str(value) for name, value in CACHE_SETTINGS.items()}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    return os.environ | own | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
