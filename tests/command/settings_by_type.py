"""Every setting with its type, and settings as a config file gives them."""

import dataclasses
import types
from typing import get_args, get_type_hints

import pytest

from mosaic_jax.config import Config
from mosaic_jax.settings import from_config_dict
from mosaic_jax.types import UserError


def settings_of(cls, prefix=""):
    """`{dotted setting: (type, default)}` of a config dataclass."""
    hints, found = get_type_hints(cls), {}
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
    return kind in (get_args(hint) if isinstance(hint, types.UnionType) else (hint,))


def of_type(kind):
    return [path for path in SETTINGS if allows(path, kind)]


WHOLE, REAL, WORDS, SWITCHES = of_type(int), of_type(float), of_type(str), of_type(bool)
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
