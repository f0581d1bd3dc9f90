"""Every setting is read somewhere in the package."""

import ast
import functools
import gc

import pytest

from mosaic_jax.config import Config
from tests.command.settings_by_type import SETTINGS
from tests.helpers import ROOT


@functools.cache
def parsed(source):
    """Without a garbage collection meanwhile, whose finalisers CPython 3.11 trips over in here."""
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        gc.enable()


def unread(settings, sources):
    """Settings that no source reads.

    A read is `x.section.name`, `section.name` or `getattr(section, ...)`, where `x` is a config and
    a bare section is a variable, attribute or parameter that stands for it (`settings =
    federation.config.local_update`). Each function or class is looked at with its own variables, so
    that a name read from another section, or from anything else, does not count.

    Args:
      settings: dotted names.
      sources: Python source texts.
    """
    sections = {path.split(".")[0] for path in settings if "." in path}
    read = set()
    for source in sources:
        module = parsed(source)
        words = {n.value for n in ast.walk(module) if isinstance(n, ast.Constant)}
        for scope in module.body:
            aliases = _aliases(scope, sections)
            for node in ast.walk(scope):
                if isinstance(node, ast.Attribute):
                    section = _section(node.value, sections, aliases)
                    read |= {f"{section}.{node.attr}"} if section else set()
                    read |= {node.attr} if _is_config(node.value) else set()
                elif _is_call_of(node, "getattr"):
                    section = _section(node.args[0], sections, aliases)
                    read |= {f"{section}.{word}" for word in words if section}
    return sorted(set(settings) - read)


def _is_config(node):
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
    return name == "config"


def _is_call_of(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _section(node, sections, aliases):
    """The section an expression stands for, or None."""
    if isinstance(node, ast.Attribute) and node.attr in sections and _is_config(node.value):
        return node.attr
    return aliases.get(ast.unparse(node))


def _aliases(scope, sections):
    """`{source text of a variable: the section it stands for}`."""
    classes = {type(getattr(Config(), name)).__name__: name for name in sections}
    aliases, before = {}, None
    while aliases != before:  # until variables made of variables are found too
        before = dict(aliases)
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                together = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                pairs = zip(target.elts, value.elts) if together else [(target, value)]  # noqa: B905
                for name, expression in pairs:
                    if section := _section(expression, sections, aliases):
                        aliases[ast.unparse(name)] = section
            elif isinstance(node, ast.arg) and node.annotation is not None:
                annotated = ast.unparse(node.annotation).split(".")[-1]
                if annotated in classes:
                    aliases[node.arg] = classes[annotated]
    return aliases


PACKAGE = ROOT / "mosaic_jax"
DEFINERS = [PACKAGE / f"{name}.py" for name in ("config", "settings")]
SOURCES = [path.read_text() for path in PACKAGE.rglob("*.py") if path not in DEFINERS]


def test_every_setting_is_read():
    assert unread(list(SETTINGS), SOURCES) == []


@pytest.mark.parametrize(
    "path",
    [
        "colour",
        "local_update.colour",
        "fine_tuning.batch_size",  # a name that other sections have
        "parallel.images",  # read of other things
        "run.learning_rate",
    ],
)
def test_a_setting_nobody_reads_is_found(path):
    assert unread([*SETTINGS, path], SOURCES) == [path]


@pytest.mark.parametrize("path", ["seed", "fine_tuning.rounds", "data.flip", "model.conv"])
def test_without_its_readers_a_setting_counts_as_unread(path):
    name = path.split(".")[-1]
    silenced = [source.replace(f".{name}", ".something_else") for source in SOURCES]
    assert path in unread(list(SETTINGS), silenced)
