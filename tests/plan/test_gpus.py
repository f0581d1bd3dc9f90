"""GPUs as XLA is told of them; no test needs the GPU's compiler."""

import re

import pytest

from mosaic_jax.plan import gpus
from mosaic_jax.plan.chips import CHIPS


@pytest.mark.parametrize(
    ("card", "cores", "memory", "name"),
    [("a100", 108, 85_100_068_864, "NVIDIA A100-SXM4-80GB"), ("h100", 132, 84_978_434_048, None)],
)
def test_a_description_has_the_cards_facts(card, cores, memory, name):
    text = gpus.description(card)
    facts = dict(re.findall(r"^  (\w+): (\S+)$", text, re.MULTILINE))
    assert facts.keys() == gpus.COMMON.keys() | gpus.FACTS[card].keys()
    assert (int(facts["core_count"]), int(facts["device_memory_size"])) == (cores, memory)
    assert int(facts["block_dim_limit_x"]) == 2147483647
    major = {"a100": 8, "h100": 9}[card]
    assert f"cuda_compute_capability {{ major: {major} }}" in text
    assert f'device_description_str: "{name or "NVIDIA H100 80GB HBM3"}"' in text
    assert text.count("{") == text.count("}")


def test_every_gpu_is_described():
    cards = {name for name, chip in CHIPS.items() if chip.platform == "gpu"}
    assert cards == gpus.FACTS.keys() == gpus.NAMES.keys()
