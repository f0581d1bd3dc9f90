"""Settings out of range, and settings that contradict, are refused with one line that helps."""

import pytest

from mosaic_jax.settings import changes_results, from_config_dict
from tests.command.settings_by_type import (
    CHOICES,
    FRACTIONS,
    MAY_BE_ZERO,
    POSITIVE,
    REAL,
    SETTINGS,
    WHOLE,
    nested,
    of_type,
    refusal,
    value_at,
)


@pytest.mark.parametrize("path", REAL)
def test_a_real_number_takes_a_whole_one(path):
    whole = 0 if path in FRACTIONS else 1
    value = value_at(from_config_dict(nested({path: whole})), path)
    assert value == whole
    assert type(value) is float


SEEDS = ["seed", "partition.seed"]


@pytest.mark.parametrize("path", SEEDS)
def test_a_seed_has_32_bits(path):
    """JAX would keep the lower ones of a larger number: another seed's run."""
    for value in (0, 2**32 - 1):
        assert value_at(from_config_dict(nested({path: value})), path) == value
    for wrong in (-1, 2**32):
        assert refusal({path: wrong}) == f"{path} = {wrong}: must lie in [0, 2**32)"


@pytest.mark.parametrize("path", sorted(set(WHOLE) - set(SEEDS)))
def test_whole_numbers_have_their_smallest_value(path):
    smallest = 0 if path in MAY_BE_ZERO else 1
    assert refusal({path: smallest - 1}) == (
        f"{path} = {smallest - 1}: must be at least {smallest}"
    )
    # fedavg with blocks of one step, so that no check across settings gets in the way
    alone = {"method": "fedavg", "generator_optimization.block_steps": 1}
    alone |= {"knowledge_distillation.block_steps": 1, path: smallest}
    assert value_at(from_config_dict(nested(alone)), path) == smallest


@pytest.mark.parametrize("path", REAL)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), -0.5])
def test_real_numbers_are_finite_and_not_negative(path, wrong):
    assert refusal({path: wrong}).startswith(f"{path} = {wrong}: must ")


@pytest.mark.parametrize("path", sorted(FRACTIONS))
@pytest.mark.parametrize("wrong", [1, 1.0, 1.5])
def test_fractions_stay_below_one(path, wrong):
    assert refusal({path: wrong}) == f"{path} = {float(wrong)}: must lie in [0, 1)"


@pytest.mark.parametrize("path", sorted(POSITIVE))
@pytest.mark.parametrize("wrong", [0, 0.0])
def test_positive_numbers_are_not_zero(path, wrong):
    assert refusal({path: wrong}) == f"{path} = 0.0: must be greater than 0"


@pytest.mark.parametrize("alpha", [0, -0.1])
def test_alpha_must_be_greater_than_zero(alpha):
    assert "partition.alpha" in refusal({"partition.alpha": alpha})


def test_a_cosine_needs_a_learning_rate_to_fall_from():
    """The schedule divides by it."""
    refusal({"local_update.learning_rate": 0.0, "local_update.final_learning_rate": 0.001})


@pytest.mark.parametrize("path", sorted(CHOICES))
def test_a_choice_takes_its_words_and_names_the_nearest_to_others(path):
    for word in CHOICES[path]:
        assert value_at(from_config_dict(nested({path: word})), path) == word
    word = CHOICES[path][0]
    assert f"did you mean '{word}'" in refusal({path: word[:-1] + word[-1] * 2})


@pytest.mark.parametrize("stage", ["generator_optimization", "knowledge_distillation"])
def test_steps_must_fill_whole_blocks(stage):
    changes = {f"{stage}.steps": 70, f"{stage}.block_steps": 20}
    assert refusal(changes) == (f"{stage}.steps = 70 is not a multiple of {stage}.block_steps = 20")
    from_config_dict(nested(changes | {f"{stage}.steps": 80}))


def test_a_pool_holds_at_least_a_batch():
    changes = {"knowledge_distillation.block_steps": 10, "knowledge_distillation.steps": 20}
    passes = "knowledge_distillation.pool_passes"
    assert refusal(changes | {passes: 11}) == (
        f"{passes} = 11 makes a pool smaller than a batch; the most passes are "
        "knowledge_distillation.block_steps = 10"
    )
    from_config_dict(nested(changes | {passes: 10}))


def test_distillation_on_generated_images_needs_generators():
    without = {"generator_optimization.steps": 0}
    assert "generator_optimization.steps is 0" in refusal(without)
    from_config_dict(nested(without | {"knowledge_distillation.images": "real"}))
    averaged = {"knowledge_distillation.images": "averaged"}
    assert "images = 'averaged', but" in refusal(without | averaged)
    assert "in memory" in refusal(averaged | {"parallel.memory_gib": 1.0})
    from_config_dict(nested(without | {"knowledge_distillation.steps": 0}))
    from_config_dict(nested(without | {"method": "fedavg"}))


def test_distillation_needs_a_loss():
    weights = [f"knowledge_distillation.{name}_weight" for name in ("kl", "ce", "js")]
    assert "at least one of" in refusal(dict.fromkeys(weights, 0.0))
    for kept in weights:
        from_config_dict(nested(dict.fromkeys(weights, 0.0) | {kept: 0.1}))


@pytest.mark.parametrize(
    ("names", "kind", "known"),
    [
        (CHOICES, str, "model.conv"),
        (MAY_BE_ZERO, int, "fine_tuning.rounds"),
        (SEEDS, int, "partition.seed"),
        (FRACTIONS, float, "meta_model.dropout"),
        (POSITIVE, float, "partition.alpha"),
    ],
)
def test_the_lists_of_checks_name_settings_that_exist(names, kind, known):
    assert set(names) <= set(of_type(kind))
    assert known in names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("seed", True),
        ("model.width", True),
        ("parallel.lanes", False),
        ("run.checkpoint_every", False),
        ("nonsense", True),
    ],
)
def test_layout_and_record_keeping_change_no_results(name, expected):
    assert changes_results(name) == expected


def test_every_default_is_among_the_choices():
    for path, words in CHOICES.items():
        assert SETTINGS[path][1] in words
