"""All stages together: what they compile, and that they run by themselves."""

import jax

from mosaic_jax import methods
from mosaic_jax.stages.stage import Stage
from tests.helpers import assert_same
from tests.stages.unequal import SETTINGS, unequal


def test_other_learning_rates_and_loss_weights_run_the_same_compiled_programs(states, compilations):
    """Compiled by XLA once: the cache of compiled programs answers every later run."""
    changed = unequal(
        **SETTINGS,
        **{
            "local_update.learning_rate": 0.011,
            "model_aggregation.learning_rate": 0.012,
            "generator_optimization.learning_rate": 0.0013,
            "generator_optimization.adversary_learning_rate": 0.0014,
            "generator_optimization.entropy_weight": 0.15,
            "generator_optimization.diversity_weight": 0.16,
            "generator_optimization.inversion_weight": 0.17,
            "meta_model.learning_rate": 0.0018,
            "knowledge_distillation.learning_rate": 0.0019,
            "knowledge_distillation.kl_weight": 0.21,
            "knowledge_distillation.ce_weight": 0.22,
            "knowledge_distillation.js_weight": 0.23,
            "fine_tuning.learning_rate": 0.0024,
        },
    )
    missed = []

    def listen(event, **details):
        if event == "/jax/compilation_cache/cache_misses":
            missed.append(stage.name)

    jax.monitoring.register_event_listener(listen)
    try:
        before = "start"
        for stage in methods.stages("mosaic", changed):
            state = states[before]
            carry = stage.start(state)
            for block in range(min(stage.blocks, 2)):
                seen = len(compilations)
                carry, _ = stage.block(state, carry, block)
                assert block == 0 or len(compilations) == seen, stage.name
            before = stage.name
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert missed == []


def test_a_stage_run_whole_leaves_what_its_blocks_leave(federation, states):
    """`states` are of start, blocks and finish, called one by one."""
    before, names = states["start"], []
    for stage in methods.stages("mosaic", federation):
        after = stage.run(before)
        assert after.keys() == states[stage.name].keys()
        assert_same(after, states[stage.name])
        before, names = states[stage.name], [*names, stage.name]
    assert ["start", *names] == list(states)


def test_a_stage_of_ones_own_runs_its_blocks_in_order():
    stage = Stage(
        name="count",
        blocks=3,
        start=lambda state: [state["first"]],
        block=lambda state, carry, index: ([*carry, state["step"] * index], {"figure": index}),
        finish=lambda state, carry: state | {"counted": carry},
    )
    state = {"first": 7, "step": 10}
    assert stage.run(state) == {"first": 7, "step": 10, "counted": [7, 0, 10, 20]}
    assert state == {"first": 7, "step": 10}
