"""Mosaic (arXiv 2505.19699): the four boxes of Figure 1, in order.

Rounds of local training; one more whose client models form the class-wise experts; generators,
uploaded once; prototypes and the meta model that make the experts a teacher; distillation of the
teacher into the student on generated images; fine-tuning rounds.
"""

from mosaic_jax.config import needs_generators
from mosaic_jax.stages import (
    generator_optimization,
    knowledge_distillation,
    meta_model,
    model_aggregation,
    prototypes,
    rounds,
)
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.stage import Stage


def stages(federation: Federation) -> list[Stage]:
    """All stages; the last trains the student, under the name of the global model.

    Without distillation steps there is no student, and fine-tuning continues the global model;
    the real-image oracle needs no generators.
    """
    config = federation.config
    distillation, fine_tuning = config.knowledge_distillation, config.fine_tuning
    update = ClientUpdate(federation, config.local_update.steps)
    plan = [rounds.warm_up(federation, update), model_aggregation.form_experts(federation)]
    if needs_generators(config):
        plan.append(generator_optimization.train(federation))
    plan += [prototypes.collect(federation), meta_model.train(federation)]
    if distillation.steps:
        plan.append(knowledge_distillation.distil(federation))
    if fine_tuning.batch_norm == "frozen":
        update = ClientUpdate(federation, config.local_update.steps, batch_norm="frozen")
    tuning = rounds.Rounds(
        federation,
        update,
        "fine_tuning",
        fine_tuning.rounds,
        fine_tuning.learning_rate,
        model="student" if distillation.steps else "global",
        first_round=config.local_update.rounds + 1,
    ).stage()
    return [*plan, tuning]
