"""Settings survive a round trip, whatever is drawn."""

import dataclasses
import json
from typing import Literal, get_args, get_origin, get_type_hints

from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st

from mosaic_jax import settings as reader
from mosaic_jax.config import Config, Fraction
from tests.properties import DRAWN, answer

LEAVES = flatten_dict(dataclasses.asdict(Config()), sep=".")


def others(name, value):
    """Values of the same type that alone are allowed."""
    *section, last = name.split(".")
    owner = type(getattr(Config(), *section)) if section else Config
    hint = get_type_hints(owner, include_extras=True)[last]
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int) and not name.endswith(("steps", "clients_per_round")):
        return st.integers(1, 10**6)
    if hint == Fraction:
        return st.floats(0, 0.99)
    if isinstance(value, float):
        return st.floats(1e-6, 1e6)
    return st.just(value)


@DRAWN
@given(data=st.data(), names=st.sets(st.sampled_from(sorted(LEAVES)), max_size=6))
def test_settings_survive_a_round_trip(data, names):
    changes = {name: data.draw(others(name, LEAVES[name]), name) for name in names}
    given = reader.make("", changes, {}).to_dict()
    config, refusal = answer(reader.from_config_dict, given)
    if refusal:
        return  # settings that contradict
    again = json.loads(json.dumps(dataclasses.asdict(config)))
    assert reader.from_config_dict(again) == config
