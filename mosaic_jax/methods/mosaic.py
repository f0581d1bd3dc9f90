"""Mosaic (arXiv 2505.19699): the four boxes of Figure 1, in order.

Rounds of local training; one more whose client models form the class-wise experts; generators,
uploaded once; prototypes and the meta model that make the experts a teacher; distillation of the
teacher into the student on generated images; acceptance of the student, if the settings ask for it;
fine-tuning rounds.
"""

from mosaic_jax.config import needs_generators
from mosaic_jax.federation import Federation
from mosaic_jax.stages import (
    acceptance,
    generator_optimization,
    knowledge_distillation,
    meta_model,
    model_aggregation,
    prototypes,
    rounds,
)
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.stage import Stage

STAGES = (
    "local_update",
    "model_aggregation",
    "generator_optimization",
    "prototypes",
    "meta_model",
    "knowledge_distillation",
    "acceptance",
    "fine_tuning",
)
"""Names of the stages in their order; each is also the section of settings it depends on first."""

SECTIONS = set(STAGES)
UNUSED: set[str] = set()


def stages(federation: Federation) -> list[Stage]:
    """Return all stages; those from the distillation on make the student.

    Without distillation steps there is no student, and fine-tuning continues the global model;
    the real-image oracle needs no generators.
    """
    config = federation.config
    update = ClientUpdate(federation, config.local_update.steps)
    plan = [rounds.warm_up(federation, update), model_aggregation.stage(federation)]
    if needs_generators(config):
        plan.append(generator_optimization.stage(federation))
    plan += [prototypes.stage(federation), meta_model.stage(federation)]
    if config.knowledge_distillation.steps:
        plan.append(knowledge_distillation.stage(federation))
        if config.acceptance.rule == "held_out":
            plan.append(acceptance.stage(federation))
    return [*plan, fine_tuning(federation)]


def fine_tuning(federation: Federation) -> Stage:
    """Return the rounds after the distillation, on the clients' or the model's batch statistics."""
    config = federation.config
    settings = config.fine_tuning
    update = ClientUpdate(federation, config.local_update.steps, batch_norm=settings.batch_norm)
    model = "student" if config.knowledge_distillation.steps else "global"
    return rounds.Rounds(
        federation,
        update,
        "fine_tuning",
        settings.rounds,
        settings.learning_rate,
        model=model,
        output=model,
        first_round=config.local_update.rounds + 1,
    ).stage()
