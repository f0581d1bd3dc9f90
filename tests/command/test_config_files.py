"""Every config file passes all checks with every option."""

import importlib.util
import itertools

import pytest

from mosaic_jax.settings import HETEROGENEITY, from_config_dict
from tests.helpers import ROOT

CONFIG_FILES = sorted((ROOT / "configs").glob("*.py"))
OPTIONS = [
    "",
    "small",
    "narrow",
    "small,narrow",
    *HETEROGENEITY,
    *(f"{level},small" for level in HETEROGENEITY),
]


def load(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_config_files():
    assert ROOT / "configs" / "digits.py" in CONFIG_FILES


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_config_file_passes_all_checks_with_every_option(path, options):
    chosen = from_config_dict(load(path).get_config(options).to_dict())
    for option in options.split(","):
        if option in HETEROGENEITY:
            assert chosen.partition.alpha == HETEROGENEITY[option]


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_options_of_a_config_file_mean_the_same_in_any_order(path):
    get_config = load(path).get_config
    for level, order in itertools.product(HETEROGENEITY, [("{}", "small"), ("small", "{}")]):
        options = ",".join(order).format(level)
        assert get_config(options) == get_config(f"{level},small"), options


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_the_small_form_of_a_config_is_smaller(path):
    get_config = load(path).get_config
    assert get_config("small") != get_config("")


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_the_docstring_of_a_config_holds_its_command(path):
    command = f"python -m mosaic_jax.main --config=configs/{path.name}"
    assert command in load(path).__doc__
