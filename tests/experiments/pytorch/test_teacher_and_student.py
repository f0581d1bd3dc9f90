"""The PyTorch baseline's teacher, meta model and distillation are ours."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the PyTorch baseline needs the extra `torch`")

from experiments.speed.pytorch_baseline import distillation as torch_distillation  # noqa: E402
from experiments.speed.pytorch_baseline import generators as torch_generators  # noqa: E402
from experiments.speed.pytorch_baseline import pipeline, teacher, weights  # noqa: E402
from mosaic_jax import rng  # noqa: E402
from mosaic_jax import settings as reader  # noqa: E402
from mosaic_jax.data.batches import epoch_batch, to_float  # noqa: E402
from mosaic_jax.stages import knowledge_distillation, meta_model  # noqa: E402
from mosaic_jax.stages.generator_ensemble import Ensemble, build_generator  # noqa: E402
from mosaic_jax.stages.image_pool import shuffled  # noqa: E402
from mosaic_jax.stages.prototypes import Prototypes  # noqa: E402
from mosaic_jax.stages.teacher import (  # noqa: E402
    Teacher,
    build_meta_model,
    expert_weights,
    teacher_logits,
)
from tests.experiments.pytorch.deviations import SETTINGS, perturbed  # noqa: E402
from tests.experiments.pytorch.parity import (  # noqa: E402
    adam_gradient,
    classifier,
    compare,
    compare_moved,
    gradients,
    to_torch,
)
from tests.helpers import TINY  # noqa: E402


@pytest.fixture(scope="module")
def mixture(federation):
    """Stacked experts, a meta model, and the baseline's teacher with the same weights."""
    rows, assignment = expert_weights(federation.clients.class_counts)
    each = [perturbed(federation, seed) for seed in range(len(rows))]
    experts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    meta = {"params": jax.jit(meta_model.MetaTraining(federation).start)().params}
    own = teacher.Teacher(
        [classifier(federation, expert) for expert in each],
        weights.load(torch_meta(federation), meta),
        torch.from_numpy(assignment).long(),
        chunk=5,
    )
    return Teacher(experts, meta), own


def torch_meta(federation):
    settings, classes = federation.config.meta_model, federation.dataset.num_classes
    return teacher.MetaModel(
        classes, classes, settings.feedforward, settings.dropout, settings.expert_embedding
    )


def test_teacher_logits(federation, mixture, record):
    variables, own = mixture
    images = to_float(federation.data.gather(np.arange(12)))
    logits = jax.jit(teacher_logits(federation))
    found = own(to_torch(images))
    assert not found.requires_grad
    record("logits", found, logits(variables, images))


def meta_batches(federation, examples, key):
    settings = federation.config.meta_model
    _, assignment = expert_weights(federation.clients.class_counts)
    for number in range(settings.steps):
        positions, mask = epoch_batch(
            examples.index,
            examples.size,
            step=number,
            key=key,
            batch_size=settings.batch_size,
        )
        positions = np.asarray(positions)[np.asarray(mask) > 0]
        tokens = np.array(examples.logits[positions][:, assignment])
        labels = np.array(examples.labels[positions])
        yield torch.from_numpy(tokens), torch.from_numpy(labels).long()


def random_prototypes(federation, mixture):
    """Return prototypes of three clients, two a class, of which seven in ten are valid."""
    generator, classes = np.random.default_rng(1), federation.dataset.num_classes
    count, width = (
        len(mixture[1].experts),
        mixture[0].members["params"]["head"]["kernel"].shape[1],
    )
    features = generator.standard_normal((3, 2 * classes, count, width)).astype(np.float32)
    return Prototypes(
        features=features,
        labels=np.broadcast_to(np.arange(2 * classes) // 2, (3, 2 * classes)),
        valid=(generator.random((3, 2 * classes)) < 0.7).astype(np.float32),
    )


@pytest.mark.parametrize("embedding", [True, False])
def test_meta_steps(make_federation, mixture, record, embedding):
    """Gradients of the first batch; losses and averaged weights of the whole training."""
    federation = make_federation(
        **SETTINGS | {"meta_model.steps": 6, "meta_model.expert_embedding": embedding}
    )
    training, experts = meta_model.MetaTraining(federation), mixture[0].members
    prototypes = random_prototypes(federation, mixture)
    examples = meta_model.training_set(experts, prototypes)
    found = teacher.prototype_logits(
        mixture[1].experts,
        torch.from_numpy(prototypes.features).movedim(2, 0).flatten(1, 2),
        mixture[1].assignment,
    )
    record("prototypes", found, training.mix(examples.logits))

    start = jax.jit(training.start)()
    own = weights.load(torch_meta(federation), {"params": start.params})
    batches = list(meta_batches(federation, examples, training.key))
    tokens, labels = batches[0]
    loss = torch.nn.functional.cross_entropy(own.train()(tokens), labels)
    loss.backward()
    expected = jax.jit(jax.value_and_grad(training.loss))(
        start.params,
        jnp.asarray(tokens.numpy()),
        jnp.asarray(labels.numpy()),
        jnp.ones(len(labels)),
        jax.random.key(0),
    )
    record("loss", loss.detach(), expected[0])
    compare(record, "gradient", own, gradients(own), {"params": expected[1]})

    settings = federation.config.meta_model
    mean, losses = jax.jit(training.run)(experts, prototypes, jnp.float32(settings.learning_rate))
    record("losses", teacher.train_meta(own, batches, settings), losses)
    # Adam makes whole steps of gradients that are zero but for rounding: an attention key's bias
    # changes no answer and wanders. So the answers are compared.
    answers = build_meta_model(federation).apply({"params": mean}, jnp.asarray(tokens.numpy()))
    record("answers", own(tokens).detach(), answers)


def distillation_inputs(federation, teacher, generators):
    """Return what a step of the student is given."""
    settings = federation.config.knowledge_distillation
    everyone = Ensemble(federation, settings.images_per_generator).everyone
    return knowledge_distillation.DistillationInputs(
        first=0,
        key=federation.key("parity"),
        learning_rate=jnp.float32(settings.learning_rate),
        prepared={"all": generators, "shares": everyone},
        teacher=teacher,
        weights={
            name: jnp.float32(getattr(settings, name))
            for name in knowledge_distillation.LOSS_WEIGHTS
        },
    )


@pytest.fixture
def distillation(federation, mixture):
    """Return `distillation(**changes)`: the federation, our student, its inputs and its start, the
    baseline's student, its generators, and the images of each in a batch."""

    def make(**changes):
        changed = dataclasses.replace(federation.config.knowledge_distillation, **changes)
        config = dataclasses.replace(federation.config, knowledge_distillation=changed)
        mine = dataclasses.replace(federation, config=config)
        uploads = [trained_generator(mine, seed) for seed in range(mine.num_clients)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *uploads)
        student, variables = knowledge_distillation.Student(mine), perturbed(mine, 9)
        counts = mine.clients.class_counts
        batch = changed.images_per_generator * mine.num_clients
        images = torch_distillation.shares(counts.sum(1), batch)
        prior = torch.from_numpy(torch_distillation.class_prior(counts, images))
        own = torch_distillation.Student(classifier(mine, variables), mixture[1], prior, changed)
        generators = [weights.load(torch_generator(mine), upload) for upload in uploads]
        inputs = distillation_inputs(mine, mixture[0], stacked)
        return mine, student, inputs, variables, own, generators, images

    return make


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_distillation_steps(distillation, record, request, batch_norm):
    """Consecutive steps on the same noise, from drawing the images to the student's weights."""
    federation, student, inputs, variables, own, generators, images = distillation(
        batch_norm=batch_norm, steps=3
    )
    draw = jax.jit(
        lambda number: student.source.sample(
            inputs.prepared, rng.fold(inputs.key, number), number - inputs.first
        )
    )
    own_prior = draw(0)[1]
    assert images.sum() == len(own_prior)
    record("prior", own.prior, own_prior)
    step = jax.jit(lambda carry, number: student.step(carry, number, inputs))
    carry = student.start(variables)
    for number in range(3):
        noise = ensemble_noise(federation, rng.fold(inputs.key, number), images)
        drawn = torch_distillation.draw(generators, noise)
        record("images", drawn.permute(0, 2, 3, 1), draw(number)[0])
        found = own.step(drawn, own.ask(drawn))
        after, metrics = step(carry, number)
        for name, value in found.items():
            record(name, value, metrics[name])
        expected = adam_gradient(carry.optimizer, after.optimizer, 0.9)
        compare(record, "gradient", own.model, gradients(own.model), {"params": expected})
        carry = after
    compare_moved(request, own.model.eval(), variables, carry.student)


def test_distillation_on_a_pool(distillation, record, request):
    """A block of four steps on two draws, in our order."""
    federation, student, inputs, variables, own, generators, images = distillation(
        steps=4, block_steps=4, pool_passes=2
    )
    carry, metrics = jax.jit(student.block)(student.start(variables), inputs)
    batches = [
        torch_distillation.draw(generators, ensemble_noise(federation, key, images))
        for key in (rng.fold(inputs.key, number) for number in range(2))
    ]
    batch = len(batches[0])
    numbers = shuffled(rng.fold(inputs.key, 2), 2, batch, 4)
    order = torch.from_numpy(np.array(numbers)).long() * batch + torch.arange(batch)
    found = own.steps_on_pool(batches, order)
    for name, value in metrics.items():
        record(name, np.mean([each[name] for each in found]), value)
    compare_moved(request, own.model.eval(), variables, carry.student)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model.name", "resnet50"),
        ("model_aggregation.global_expert", True),
        ("prototypes.features", "global"),
        ("knowledge_distillation.images", "real"),
        ("generator_optimization.adversary", "local"),
        ("generator_optimization.conditional", True),
        ("generator_optimization.upsampling", "nearest"),
        ("generator_optimization.inversion_threshold", 5),
    ],
)
def test_work_that_is_not_built_is_refused(setting, value):
    pipeline.refuse_what_is_not_built(reader.from_config_dict(reader.make("", TINY, {}).to_dict()))
    other = reader.from_config_dict(reader.make("", TINY | {setting: value}, {}).to_dict())
    with pytest.raises(ValueError, match=re.escape(setting)):
        pipeline.refuse_what_is_not_built(other)


def torch_generator(federation):
    settings = federation.config.generator_optimization
    height, _, channels = federation.dataset.image_shape
    return torch_generators.Generator(height, channels, settings.width, settings.latent).eval()


def trained_generator(federation, seed):
    """A generator whose images have contrast."""
    settings = federation.config.generator_optimization
    init = jax.jit(build_generator(federation).init)
    variables = init(jax.random.key(seed), jnp.zeros((2, settings.latent)))
    params = jax.tree.map(lambda leaf: leaf * (5 if leaf.ndim == 4 else 1), variables["params"])
    return {"params": params, "batch_stats": variables["batch_stats"]}


def ensemble_noise(federation, key, images):
    """The noise behind each image of `generator_ensemble.Ensemble`'s batch."""
    latent = federation.config.generator_optimization.latent
    return [
        torch.from_numpy(
            np.array(jax.random.normal(rng.fold(key, i), (int(images.max()), latent)))[:count]
        )
        for i, count in enumerate(images)
    ]
