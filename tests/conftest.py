"""Fixtures that tests of several folders use, and the cache of compiled programs."""

import os
import warnings
from contextlib import nullcontext

import jax
import pytest

from mosaic_jax.run import experiment
from tests.helpers import CACHE_SETTINGS, tiny_federation

for setting, value in CACHE_SETTINGS.items():
    jax.config.update(setting, value)

# Most of a test's time is compilation, which these options halve. Flags of the caller come last and
# win; child processes inherit them.
CHEAP = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later ones have no such choice
    CHEAP.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*CHEAP, os.environ.get("XLA_FLAGS", "")]).strip()

ORBAX_LEFTOVERS = "(?s).*(Event loop is closed|_read_array_index_and_device_put)"
"""Complaints of what a restore that failed leaves behind; they come at any time after it."""


def pytest_configure(config):
    for category in ("pytest.PytestUnraisableExceptionWarning", "RuntimeWarning"):
        config.addinivalue_line("filterwarnings", f"ignore:{ORBAX_LEFTOVERS}:{category}")


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure(config):
    """Silence the leftovers after the last test, when pytest looks once more with other filters."""
    warnings.filterwarnings("ignore", ORBAX_LEFTOVERS, pytest.PytestUnraisableExceptionWarning)


@pytest.fixture(scope="session", autouse=True)
def compile_at_the_calls():
    """Compile programs at their calls: on tiny stages, walking ahead costs a sixth of a run.

    `tests/run/test_ahead.py` and the tests of commands, in processes of their own, compile ahead.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "compiling_ahead", lambda *stages: nullcontext())
        yield


@pytest.fixture(scope="session")
def make_federation():
    """Return `make_federation(**{"section.setting": value})`."""
    return tiny_federation


@pytest.fixture
def compilations():
    """Yield a list that grows by one entry for every program XLA is asked to compile."""
    events = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(details.get("fun_name", "a program"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def subprocess_environment():
    """Return variables for a child process of eight CPU devices that uses the same cache."""
    own = {name.upper(): str(value) for name, value in CACHE_SETTINGS.items()}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    return os.environ | own | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
