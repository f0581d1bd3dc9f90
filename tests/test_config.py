"""Settings: one definition, refused with one line that helps, and every one of them is read."""

import ast
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import types
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from mosaic_jax import checks
from mosaic_jax.config import Config
from mosaic_jax.settings import HETEROGENEITY, from_config_dict, make
from mosaic_jax.types import UserError

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mosaic_jax"
CONFIG_FILES = sorted((ROOT / "configs").glob("*.py"))
OPTIONS = [
    "",
    "small",
    "narrow",
    "small,narrow",
    *HETEROGENEITY,
    *(f"{level},small" for level in HETEROGENEITY),
]


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


@pytest.mark.parametrize("path", REAL)
def test_a_real_number_takes_a_whole_one(path):
    whole = 0 if path in checks.FRACTIONS else 1
    value = value_at(from_config_dict(nested({path: whole})), path)
    assert value == whole
    assert type(value) is float


@pytest.mark.parametrize("path", WHOLE)
def test_whole_numbers_have_their_smallest_value(path):
    smallest = 0 if path in checks.MAY_BE_ZERO else 1
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


@pytest.mark.parametrize("path", sorted(checks.FRACTIONS))
@pytest.mark.parametrize("wrong", [1, 1.0, 1.5])
def test_fractions_stay_below_one(path, wrong):
    assert refusal({path: wrong}) == f"{path} = {float(wrong)}: must lie in [0, 1)"


@pytest.mark.parametrize("path", sorted(checks.POSITIVE))
@pytest.mark.parametrize("wrong", [0, 0.0])
def test_positive_numbers_are_not_zero(path, wrong):
    assert refusal({path: wrong}) == f"{path} = 0.0: must be greater than 0"


@pytest.mark.parametrize("alpha", [0, -0.1])
def test_alpha_must_be_greater_than_zero(alpha):
    assert "partition.alpha" in refusal({"partition.alpha": alpha})


def test_a_cosine_needs_a_learning_rate_to_fall_from():
    """The schedule divides by it."""
    refusal({"local_update.learning_rate": 0.0, "local_update.final_learning_rate": 0.001})


@pytest.mark.parametrize("path", sorted(checks.CHOICES))
def test_a_choice_takes_its_words_and_names_the_nearest_to_others(path):
    for word in checks.CHOICES[path]:
        assert value_at(from_config_dict(nested({path: word})), path) == word
    word = checks.CHOICES[path][0]
    assert f"did you mean '{word}'" in refusal({path: word[:-1] + word[-1] * 2})


@pytest.mark.parametrize("stage", ["generator_optimization", "knowledge_distillation"])
def test_steps_must_fill_whole_blocks(stage):
    changes = {f"{stage}.steps": 70, f"{stage}.block_steps": 20}
    assert refusal(changes) == (f"{stage}.steps = 70 is not a multiple of {stage}.block_steps = 20")
    from_config_dict(nested(changes | {f"{stage}.steps": 80}))


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
    ("registry", "kind"), [("CHOICES", str), ("MAY_BE_ZERO", int), ("FRACTIONS", float),
                           ("POSITIVE", float)],
)  # fmt: skip
def test_the_lists_of_checks_name_settings_that_exist(registry, kind):
    names = set(getattr(checks, registry))
    assert names <= set(of_type(kind))
    assert names


def test_every_default_is_among_the_choices():
    for path, words in checks.CHOICES.items():
        assert SETTINGS[path][1] in words


# --- every setting is read ---------------------------------------------------------------------


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


DEFINERS = [PACKAGE / f"{name}.py" for name in ("config", "settings", "checks")]
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


# --- the config files --------------------------------------------------------------------------


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
