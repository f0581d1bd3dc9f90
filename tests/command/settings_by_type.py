"""Every setting with its type, and settings as a config file gives them."""

import dataclasses
import types
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest

from mosaic_jax.config import Config, Count, Fraction, Positive
from mosaic_jax.settings import from_config_dict
from mosaic_jax.types import UserError


def settings_of(cls, prefix=""):
    """`{dotted setting: (type with its range, default)}` of a config dataclass."""
    hints, found = get_type_hints(cls, include_extras=True), {}
    for entry in dataclasses.fields(cls):
        hint, path = hints[entry.name], prefix + entry.name
        if dataclasses.is_dataclass(hint):
            found |= settings_of(hint, f"{path}.")
        else:
            found[path] = (hint, entry.default)
    return found


SETTINGS = settings_of(Config)


def allows(path, kind):
    hint = SETTINGS[path][0]
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        hint = str
    return kind in (get_args(hint) if isinstance(hint, types.UnionType) else (hint,))


def marked(*kinds):
    """Settings whose range is that of one of the types."""
    ranges = [get_args(kind)[1] for kind in kinds]
    hints = {path: get_args(hint)[1:] for path, (hint, _) in SETTINGS.items()}
    return [path for path, marks in hints.items() if any(mark in ranges for mark in marks)]


def of_type(kind):
    return [path for path in SETTINGS if allows(path, kind)]


WHOLE, REAL, WORDS, SWITCHES = of_type(int), of_type(float), of_type(str), of_type(bool)
MAY_BE_ZERO, FRACTIONS, POSITIVE = marked(Count), marked(Fraction), marked(Positive)
CHOICES = {
    path: get_args(hint) for path, (hint, _) in SETTINGS.items() if get_origin(hint) is Literal
}
NEVER_NONE = [path for path in SETTINGS if not allows(path, type(None))]


def nested(changes):
    """Dotted settings as the nested dict that a config file gives."""
    tree = {}
    for path, value in changes.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def value_at(settings, path):
    for name in path.split("."):
        settings = getattr(settings, name)
    return settings


def refusal(changes):
    """The one line that answers these settings."""
    with pytest.raises(UserError) as caught:
        from_config_dict(nested(changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)
