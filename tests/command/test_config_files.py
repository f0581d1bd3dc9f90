"""Every config file passes all checks with every option, and is found from anywhere."""

import ast
import itertools

import pytest

from mosaic_jax.settings import (
    HETEROGENEITY,
    config_files,
    find_config,
    from_config_dict,
    get_config,
)
from mosaic_jax.types import UserError
from tests.helpers import ROOT

CONFIG_FILES = list(config_files().values())
OPTIONS = [
    "",
    "small",
    "narrow",
    "small,narrow",
    *HETEROGENEITY,
    *(f"{level},small" for level in HETEROGENEITY),
]


def test_there_are_config_files():
    own = {path.name for path in (ROOT / "configs").glob("*.py")} - {"common.py"}
    assert {path.name for path in CONFIG_FILES} == own
    assert "digits.py" in own


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_config_file_passes_all_checks_with_every_option(path, options):
    chosen = from_config_dict(get_config(str(path), options).to_dict())
    for option in options.split(","):
        if option in HETEROGENEITY:
            assert chosen.partition.alpha == HETEROGENEITY[option]


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_options_of_a_config_file_mean_the_same_in_any_order(path):
    for level, order in itertools.product(HETEROGENEITY, [("{}", "small"), ("small", "{}")]):
        options = ",".join(order).format(level)
        right = get_config(path.stem, f"{level},small")
        assert get_config(path.stem, options) == right, options


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_the_small_form_of_a_config_is_smaller(path):
    assert get_config(path.stem, "small") != get_config(path.stem)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_the_docstring_of_a_config_holds_its_command(path):
    command = f"python -m mosaic_jax.main --config=configs/{path.name}"
    assert command in ast.get_docstring(ast.parse(path.read_text()))


def test_configs_are_found_by_name_and_by_path_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = find_config("cifar100")
    assert packaged.is_file()
    assert find_config("configs/cifar100.py") == packaged
    assert find_config(str(packaged)) == packaged
    own = tmp_path / "configs" / "cifar100.py"
    own.parent.mkdir()
    own.write_text("")
    assert find_config("configs/cifar100.py").samefile(own)
    assert find_config("cifar100") == packaged


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("digts", "'digits'"),
        ("configs/digts.py", "'configs/digits.py'"),
        ("configs/mien.py", "'configs/mine.py'"),
        ("common", "base, cifar10"),
        ("elsewhere/digits.py", "'configs/digits.py'"),
    ],
)
def test_a_mistyped_config_names_the_nearest(given, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("")
    with pytest.raises(UserError, match=f"unknown config '{given}'.*{meant}"):
        find_config(given)
