"""Settings: one definition, options that combine, and one line for what is unknown."""

import dataclasses
import json

import pytest

from mosaic_jax.config import Config
from mosaic_jax.settings import from_config_dict, make
from mosaic_jax.types import UserError
from tests.command.settings_by_type import (
    NEVER_NONE,
    REAL,
    SETTINGS,
    SWITCHES,
    WHOLE,
    WORDS,
    allows,
    nested,
    refusal,
    value_at,
)


def test_defaults_survive_the_way_through_a_config_dict():
    assert from_config_dict(make("", {}, {}).to_dict()) == Config()
    assert from_config_dict({}) == Config()


def test_settings_survive_the_way_through_json():
    changed = from_config_dict(make("severe", {"data.train_images": 7, "seed": 3}, {}).to_dict())
    again = from_config_dict(json.loads(json.dumps(dataclasses.asdict(changed))))
    assert again == changed
    assert (again.data.train_images, again.seed) == (7, 3)


@pytest.mark.parametrize(("option", "alpha"), [("mild", 1.0), ("moderate", 0.1), ("severe", 0.01)])
def test_a_level_of_heterogeneity_sets_alpha_and_nothing_else(option, alpha):
    chosen = from_config_dict(make(option, {}, {"model.width": 4}).to_dict())
    assert chosen == dataclasses.replace(
        Config(), partition=dataclasses.replace(Config().partition, alpha=alpha)
    )


@pytest.mark.parametrize("options", ["small,severe", "severe,small"])
def test_options_combine_in_any_order(options):
    chosen = make(options, {"model.width": 16, "seed": 5}, {"model.width": 4})
    assert (chosen.partition.alpha, chosen.model.width, chosen.seed) == (0.01, 4, 5)


@pytest.mark.parametrize("options", ["narrow", "small,narrow", "narrow,small"])
def test_narrow_gives_sub_models_and_spends_fine_tuning_before_the_experts(options):
    changes = {"fine_tuning.rounds": 7, "local_update.learning_rate": 0.3}
    chosen = make(options, changes, {"fine_tuning.rounds": 2})
    rounds = 2 if "small" in options else 7
    assert (chosen.submodel.rho, chosen.submodel.sigma, chosen.submodel.scheme) == (5, 4, "static")
    assert chosen.model_aggregation.steps == 10 + 10 * rounds
    assert chosen.model_aggregation.learning_rate == 0.3
    assert chosen.fine_tuning.rounds == 0


def test_small_changes_nothing_unless_asked_for():
    assert make("mild", {"model.width": 16}, {"model.width": 4}).model.width == 16


@pytest.mark.parametrize(
    ("given", "meant"),
    [("sever", "severe"), ("smal", "small"), ("midl", "mild"), ("Moderate", "moderate")],
)
def test_an_unknown_option_names_the_nearest(given, meant):
    with pytest.raises(UserError, match=f"unknown option '{given}'; did you mean '{meant}'"):
        make(f"small,{given}", {}, {})


def test_an_option_like_no_other_gets_the_whole_list():
    with pytest.raises(UserError, match="known: small, narrow, mild, moderate, severe"):
        make("qqqq", {}, {})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("sed", "seed"),
        ("modle", "model"),
        ("model.widht", "model.width"),
        ("local_update.learning_rat", "local_update.learning_rate"),
        ("generator_optimisation", "generator_optimization"),
        ("knowledge_distillation.temprature", "knowledge_distillation.temperature"),
    ],
)
def test_an_unknown_setting_names_the_full_path_of_the_nearest(given, meant):
    assert refusal({given: 1}) == f"unknown setting '{given}'; did you mean '{meant}'?"


def test_a_setting_like_no_other_gets_no_far_fetched_guess():
    assert "did you mean" not in refusal({"generator_optimization.qqqq": 1})


@pytest.mark.parametrize("path", WHOLE)
@pytest.mark.parametrize("wrong", ["3", 3.0, True, [3]])
def test_a_whole_number_takes_no_word_real_number_or_switch(path, wrong):
    message = refusal({path: wrong})
    assert f"setting '{path}' takes int" in message
    assert repr(wrong) in message


@pytest.mark.parametrize("path", REAL)
@pytest.mark.parametrize("wrong", ["0.5", True])
def test_a_real_number_takes_no_word_and_no_switch(path, wrong):
    assert f"setting '{path}' takes float" in refusal({path: wrong})


@pytest.mark.parametrize("path", WORDS)
@pytest.mark.parametrize("wrong", [1, 0.5, False])
def test_a_word_takes_no_number_and_no_switch(path, wrong):
    assert f"setting '{path}' takes str" in refusal({path: wrong})


@pytest.mark.parametrize("path", SWITCHES)
@pytest.mark.parametrize("wrong", [1, 0, "True"])
def test_a_switch_takes_no_number_and_no_word(path, wrong):
    assert f"setting '{path}' takes bool" in refusal({path: wrong})


@pytest.mark.parametrize("path", NEVER_NONE)
def test_nothing_is_taken_only_where_the_definition_says_so(path):
    assert f"setting '{path}' takes" in refusal({path: None})


@pytest.mark.parametrize("path", [path for path in SETTINGS if allows(path, type(None))])
def test_nothing_is_taken_where_the_definition_says_so(path):
    assert value_at(from_config_dict(nested({path: None})), path) is None


@pytest.mark.parametrize("wrong", [None, 3, "resnet18"])
def test_a_section_takes_settings_only(wrong):
    assert "setting 'model' takes" in refusal({"model": wrong})
