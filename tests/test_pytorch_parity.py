"""The PyTorch baseline does the same work: same weights and batches, same losses and gradients.

Each test gives one stage of `mosaic_jax` and its counterpart in `experiments.pytorch_baseline` the
same weights, images and noise. The deviation of a loss or gradient is the largest difference in a
tensor over its largest entry; that of trained weights is the sum of all differences over the sum of
all ways the training took them. (A ReLU's input that is zero but for rounding, or a gradient that
Adam makes a whole step of, moves single weights.)
"""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

torch = pytest.importorskip("torch", reason="the PyTorch baseline needs the extra `torch`")

from experiments.pytorch_baseline import data as torch_data  # noqa: E402
from experiments.pytorch_baseline import distillation as torch_distillation  # noqa: E402
from experiments.pytorch_baseline import evaluation as torch_evaluation  # noqa: E402
from experiments.pytorch_baseline import generator_optimization as torch_generators  # noqa: E402
from experiments.pytorch_baseline import local_update as torch_local  # noqa: E402
from experiments.pytorch_baseline import models, pipeline, teacher, weights  # noqa: E402
from mosaic_jax import parallel, rng  # noqa: E402
from mosaic_jax import settings as reader  # noqa: E402
from mosaic_jax.data.clients import (  # noqa: E402
    batches_per_epoch,
    epoch_batch,
    to_float,
    uniform_batch,
)
from mosaic_jax.stages import (  # noqa: E402
    client_generator,
    cohort,
    generator_ensemble,
    generator_optimization,
    knowledge_distillation,
    meta_model,
    model_aggregation,
    round,
)
from mosaic_jax.stages.evaluation import evaluator, predictor  # noqa: E402
from mosaic_jax.stages.local_update import Batch, ClientUpdate  # noqa: E402

TOLERANCE = 1e-4
MOVED = 1e-3
"""Of trained weights."""

ABSOLUTE = 1e-7
"""Gradients that are zero but for rounding, such as that of an attention key's bias."""

CPU = torch.device("cpu")
SETTINGS = {
    "local_update.batch_size": 48,
    "local_update.momentum": 0.5,
    "local_update.weight_decay": 0.05,  # enough to be seen in a few steps
    "meta_model.dropout": 0.0,  # the two libraries draw different masks
    "generator_optimization.frozen_every": 2,
    "generator_optimization.entropy_weight": 0.3,
    "knowledge_distillation.class_prior": True,
    "knowledge_distillation.temperature": 1.5,
}
DEVIATIONS: dict[str, float] = {}
"""The largest of each test and quantity, printed at the end with `pytest -s`."""

FRESH: dict = {}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def federation(make_federation):
    return noisy(make_federation(**SETTINGS))


@pytest.fixture(scope="module")
def residual(make_federation):
    """A ResNet on smaller images: the fewer ReLUs, the fewer close calls."""
    changes = {
        "model.name": "resnet8",
        "data.image_size": 8,
        "local_update.batch_size": 24,
    }
    return noisy(make_federation(**SETTINGS | changes))


def noisy(federation):
    """Training images of noise.

    In an even area all pixels have the same activation; where it is zero but for rounding, the
    gradients of two libraries differ by the whole area.
    """
    images = federation.data["images"]
    noise = np.random.default_rng(2).integers(0, 256, images.shape, np.uint8)
    data = parallel.replicated(federation.mesh, dict(federation.data) | {"images": noise})
    return dataclasses.replace(federation, data=data)


@pytest.fixture
def record(request):
    """`record(quantity, found, expected)`: checks the deviation and notes the largest."""

    def check(quantity, found, expected):
        found, expected = np.asarray(found), np.asarray(expected)
        assert found.shape == expected.shape, quantity
        assert np.isfinite(expected).all(), quantity
        difference = np.abs(found - expected).max()
        largest = np.abs(expected).max()
        name = f"{request.node.name}: {quantity.split(' ')[0]}"
        if largest > 100 * ABSOLUTE:
            DEVIATIONS[name] = max(DEVIATIONS.get(name, 0.0), float(difference / largest))
        assert difference <= TOLERANCE * largest + ABSOLUTE, (quantity, difference, largest)

    return check


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    for name, deviation in DEVIATIONS.items():
        print(f"{name} {deviation:.1e}")


def compare(record, quantity, module, found, variables):
    """Every tensor of `found`, a dict of names, with the Flax tree's."""
    expected = weights.convert(module, variables)
    for name, value in found.items():
        record(f"{quantity} {name}", value.detach(), expected[name])


def compare_moved(request, module, start, end):
    """All weights and statistics of the module with `end`, to which training took `start`."""
    before, after = (weights.convert(module, variables) for variables in (start, end))
    found = module.state_dict()
    off = sum(float((found[name] - after[name]).abs().sum()) for name in found)
    way = sum(float((before[name] - after[name]).abs().sum()) for name in found)
    name = f"{request.node.name}: weights"
    DEVIATIONS[name] = max(DEVIATIONS.get(name, 0.0), off / way)
    assert off <= MOVED * way, (off, way)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def member(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def to_torch(images):
    """Images [n, h, w, c] as a channels-last batch."""
    return torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)


def classifier(federation, variables=None):
    settings, dataset = federation.config.model, federation.dataset
    model = models.build_classifier(
        settings.name, dataset.num_classes, settings.width, dataset.mean, dataset.std
    )
    return model if variables is None else weights.load(model, variables)


def fresh(federation):
    """The federation's first variables, compiled once for each architecture."""
    key = federation.model, federation.dataset.image_shape
    if key not in FRESH:
        FRESH[key] = jax.tree.map(np.asarray, federation.initial_variables())
    return FRESH[key]


def perturbed(federation, seed=0):
    """Variables of a model that has seen something: no scale, bias or statistic is 0 or 1."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = generator.uniform(-1, 1, leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "var":
            return 0.15 + 0.1 * noise
        return leaf + noise * (0.3 if name == "scale" else 0.1 if leaf.ndim == 1 else 0.02)

    variables = fresh(federation)
    return jax.tree_util.tree_map_with_path(draw, variables)


def client_batches(federation, client, key, steps):
    """The batches `ClientUpdate` makes of one client, without the masked examples."""
    key = rng.fold(key, client["id"])
    for number in range(steps):
        positions, mask = epoch_batch(
            client, number, key, federation.config.local_update.batch_size
        )
        positions = np.asarray(positions)[np.asarray(mask) > 0]
        images = to_float(federation.taken(federation.data, positions))
        labels = np.array(federation.data["labels"][positions])
        yield to_torch(images), torch.from_numpy(labels).long()


def round_inputs(federation, rate=0.05):
    return {
        "data": federation.data,
        "learning_rate": jnp.float32(rate),
        "key": federation.key("parity"),
        "first_step": jnp.int32(0),
        "round": jnp.int32(0),
    }


# --- classifiers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet8", "cnn"])
def test_evaluation(make_federation, record, name):
    federation = make_federation(**SETTINGS | {"model.name": name})
    variables, dataset = perturbed(federation), federation.dataset
    images = torch_data.to_float(dataset.test_images, CPU)
    model = classifier(federation, variables)
    assert model(to_torch(to_float(dataset.test_images[:8]))).features.std(0).mean() > 0.01

    def logits(images):
        return model(images).logits

    expected = predictor(federation)(variables, dataset.test_images)
    record("logits", torch_evaluation.predict(logits, images, 32), expected)
    record(
        "features",
        model(to_torch(images[:8])).features.detach(),
        federation.outputs(variables, to_float(dataset.test_images[:8])).features,
    )
    figures = torch_evaluation.evaluate(
        logits, images, torch.from_numpy(dataset.test_labels), federation.local_shards, 32
    )
    assert figures == pytest.approx(evaluator(federation)(variables))


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_local_steps(residual, record, request, batch_norm):
    """More than an epoch of each client; the last batch of an epoch is smaller."""
    federation, steps, rate = residual, 3, 0.05
    update = ClientUpdate(federation, steps, batch_norm)
    inputs, variables = round_inputs(federation, rate), perturbed(federation)
    run = jax.jit(lambda client: update(inputs | {"variables": variables}, client))
    gradient_of = jax.jit(jax.grad(lambda *args: update.loss(*args)[0]))
    for i in range(federation.num_clients):
        client = member(federation.clients, i)
        batches = list(client_batches(federation, client, inputs["key"], steps))
        if i == 0:
            images, labels = batches[0]
            model = classifier(federation, variables).train(batch_norm == "train")
            loss = torch.nn.functional.cross_entropy(model(images).logits, labels)
            loss.backward()
            expected = gradient_of(
                variables["params"],
                variables["batch_stats"],
                Batch(
                    jnp.asarray(images.permute(0, 2, 3, 1).numpy()),
                    jnp.asarray(labels.numpy()),
                    jnp.ones(len(labels)),
                    inputs["key"],
                ),
                inputs,
                client,
            )
            compare(record, "gradient", model, gradients(model), {"params": expected})
        model = classifier(federation, variables)
        loss, accuracy = torch_local.train_client(
            model, batches, federation.config.local_update, rate, batch_norm
        )
        trained, metrics = run(client)
        record("loss", loss, metrics["loss"])
        record("accuracy", accuracy, metrics["accuracy"])
        compare_moved(request, model, variables, trained)
        statistics = {n: v for n, v in model.state_dict().items() if "running_" in n}
        compare(record, "statistics", model, statistics, trained)
    assert len({len(labels) for _, labels in batches}) > 1


def test_round(federation, record, request):
    """FedAvg of all clients."""
    steps, inputs = 3, round_inputs(federation)
    variables = perturbed(federation)
    run = round.round_function(federation, ClientUpdate(federation, steps))
    sizes = cohort.size_weights(federation)
    members = cohort.cohort_of(federation, np.arange(federation.num_clients), sizes)
    expected = run({"global": federation.fresh(variables)}, inputs, members)
    model = classifier(federation, variables)
    server = [tensor.clone() for tensor in torch_local.tensors(model)]
    mean, kept, metrics = torch_local.federated_round(
        model,
        server,
        [
            client_batches(federation, member(federation.clients, i), inputs["key"], steps)
            for i in range(federation.num_clients)
        ],
        sizes[:, 0] / sizes.sum(),
        federation.config.local_update,
        0.05,
    )
    torch._foreach_copy_(torch_local.tensors(model), mean)
    compare_moved(request, model, variables, expected["carry"]["global"])
    record("loss", torch.stack([loss for loss, _ in metrics]), expected["metrics"]["loss"])
    assert kept == []


def test_vmapped_round_is_the_eager_one(federation):
    """With all clients stacked, on full batches and without momentum."""
    settings = dataclasses.replace(federation.config.local_update, momentum=0.0)
    model, shares = classifier(federation, perturbed(federation)), [0.2, 0.3, 0.5]
    images = torch.randn(2, 3, 8, 1, 16, 16)
    labels = torch.randint(10, (2, 3, 8))
    stacked = torch_local.vmapped_round(
        models.without_statistics(model),
        [parameter.detach().clone() for parameter in model.parameters()],
        zip(images, labels, strict=True),
        shares,
        settings,
        0.05,
    )
    server = [tensor.clone() for tensor in torch_local.tensors(model)]
    each = [list(zip(images[:, i], labels[:, i], strict=True)) for i in range(3)]
    mean, _, _ = torch_local.federated_round(model, server, each, shares, settings, 0.05)
    torch._foreach_copy_(torch_local.tensors(model), mean)
    for ours, parameter in zip(stacked, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.detach(), rtol=1e-4, atol=1e-5)


def test_class_experts(federation, record):
    stage = model_aggregation.form_experts(federation)
    formed, _ = stage.block({"global": perturbed(federation)}, None, 0)
    model = classifier(federation)
    clients = []
    for i in range(federation.num_clients):
        weights.load(model, member(formed["clients"], i))
        clients.append([tensor.clone() for tensor in torch_local.tensors(model)])
    rows, assignment = torch_local.expert_weights(federation.counts)
    expected_rows, expected_assignment = model_aggregation.expert_weights(federation.counts)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(assignment, expected_assignment)
    experts = torch_local.class_experts(clients, torch.from_numpy(rows))
    assert len(experts) > 1
    for i, expert in enumerate(experts):
        torch._foreach_copy_(torch_local.tensors(model), expert)
        compare(record, "weights", model, model.state_dict(), member(formed["experts"], i))


@pytest.mark.parametrize("size", [3, 16, 17, 33, 1])
def test_epochs_have_our_batches(size):
    """As many batches as ours, of the same sizes, which hold every image once."""
    index, count = torch.arange(100, 100 + size), int(batches_per_epoch(size, 16))
    batches = list(itertools.islice(torch_data.epochs(index, 16), 2 * count))
    client, key = {"index": np.arange(size), "size": size}, jax.random.key(0)
    _, masks = jax.jit(jax.vmap(lambda n: epoch_batch(client, n, key, 16)))(jnp.arange(2 * count))
    assert [len(batch) for batch in batches] == masks.sum(1).astype(int).tolist()
    for epoch in (batches[:count], batches[count:]):
        seen = torch.cat(epoch)
        assert len(seen.unique()) == len(seen)
        assert set(seen.tolist()) <= set(index.tolist())


# --- generators --------------------------------------------------------------------------------


def generator_pair(federation, carry, frozen):
    """The baseline's client with the weights of a carry."""
    settings = federation.config.generator_optimization
    height, _, channels = federation.dataset.image_shape
    generator = models.Generator(height, channels, settings.width, settings.latent).eval()
    discriminator = models.Discriminator(height, channels, settings.adversary_width)
    return torch_generators.ClientGenerator(
        weights.load(generator, carry["generator"]),
        weights.load(discriminator, carry["adversary"]),
        classifier(federation, frozen),
        settings,
    )


def step_draws(federation, shared, client, number):
    """What `ClientGenerator.step` draws: noise, real images, corners and brightness."""
    settings = federation.config.generator_optimization
    key = rng.fold(shared["key"], client["id"], number)
    z = jax.random.normal(rng.fold(key, 3), (settings.batch_size, settings.latent))
    positions = uniform_batch(client, rng.fold(key, 4), settings.batch_size)
    corner_key, _ = jax.random.split(rng.fold(key, 5, 0))
    corners = jax.random.randint(corner_key, (len(z), 2), 0, 2 * settings.shift + 1)
    brightness = jax.random.uniform(rng.fold(key, 5, 1), (len(z), 1, 1, 1), minval=-1.0)
    return (
        torch.from_numpy(np.array(z)),
        to_torch(to_float(federation.taken(shared["data"], positions))),
        torch.from_numpy(np.array(corners)).long(),
        torch.from_numpy(np.array(brightness)),
    )


def adam_gradient(before, after, beta1):
    """The gradient behind a step of `optax.adam`, out of the first moments."""
    return jax.tree.map(lambda a, b: (b - beta1 * a) / (1 - beta1), before[0].mu, after[0].mu)


def test_generator_steps(federation, record, request):
    """Steps with (even numbers) and without the frozen losses, and the upload."""
    settings = federation.config.generator_optimization
    client = generator_optimization.ClientGenerator(federation)
    shared = {
        "data": federation.data,
        "key": federation.key("parity"),
        "learning_rate": jnp.float32(settings.learning_rate),
        "adversary_learning_rate": jnp.float32(settings.adversary_learning_rate),
        "loss_weights": {
            name: jnp.float32(getattr(settings, name)) for name in client_generator.LOSS_WEIGHTS
        },
        "first_step": jnp.int32(0),
    }
    frozen = perturbed(federation)
    packed = member(federation.clients, 1) | {"frozen": frozen}
    start = carry = jax.jit(lambda: client.start(shared, packed))()
    step = jax.jit(lambda carry, number: client.step(shared, packed, carry, number))
    pair = generator_pair(federation, carry, frozen)
    for number in range(4):
        after, health = step(carry, number)
        found = pair.step(*step_draws(federation, shared, packed, number))
        for name, value in found.items():
            record(f"{name}", value, health[name])
        for name, module, optimizer in (
            ("generator", pair.generator, "generator_optimizer"),
            ("adversary", pair.discriminator, "adversary_optimizer"),
        ):
            expected = adam_gradient(carry[optimizer], after[optimizer], settings.beta1)
            compare(record, f"{name}_gradient", module, gradients(module), {"params": expected})
        carry = after
    untracked = {"params": carry["adversary"]["params"]}
    compare_moved(request, pair.discriminator, {"params": start["adversary"]["params"]}, untracked)
    key = jax.random.key(5)
    noise = [
        jax.random.normal(rng.fold(key, i), (settings.batch_size, settings.latent))
        for i in range(client_generator.SETTLING)
    ]
    upload = pair.upload(torch.from_numpy(np.array(noise)))
    expected = client.upload(carry | {"settled": jax.jit(client.settle)(carry, key)})
    compare_moved(request, upload, start["generator"], expected)


def test_the_crop_and_its_gradient(federation, record):
    client = generator_optimization.ClientGenerator(federation)
    settings, key = federation.config.generator_optimization, jax.random.key(8)
    images = to_float(federation.taken(federation.data, np.arange(6)))
    above = jax.random.normal(key, images.shape)
    expected, pull = jax.vjp(lambda images: client.augment(images, key), images)
    corner_key, _ = jax.random.split(rng.fold(key, 0))
    corners = np.array(jax.random.randint(corner_key, (6, 2), 0, 2 * settings.shift + 1))
    change = np.array(jax.random.uniform(rng.fold(key, 1), (6, 1, 1, 1), minval=-1.0))
    mine = to_torch(images).requires_grad_()
    found = torch_data.crop(mine, torch.from_numpy(corners).long(), settings.shift)
    found = found + settings.brightness * torch.from_numpy(change)
    found.backward(to_torch(above))
    record("images", found.detach().permute(0, 2, 3, 1), expected)
    record("gradient", mine.grad.permute(0, 2, 3, 1), pull(above)[0])


# --- teacher and student -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(federation):
    """Stacked experts, a meta model, and the baseline's teacher with the same weights."""
    rows, assignment = model_aggregation.expert_weights(federation.counts)
    each = [perturbed(federation, seed) for seed in range(len(rows))]
    experts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    meta = {"params": jax.jit(meta_model.MetaTraining(federation).start)()["params"]}
    own = teacher.Teacher(
        [classifier(federation, expert) for expert in each],
        weights.load(torch_meta(federation), meta),
        torch.from_numpy(assignment).long(),
        chunk=5,
    )
    return {"experts": experts, "meta": meta}, own


def torch_meta(federation):
    settings, classes = federation.config.meta_model, federation.dataset.num_classes
    return models.MetaModel(
        classes, classes, settings.feedforward, settings.dropout, settings.expert_embedding
    )


def test_teacher_logits(federation, mixture, record):
    variables, own = mixture
    images = to_float(federation.taken(federation.data, np.arange(12)))
    logits = jax.jit(meta_model.teacher_logits(federation))
    found = own(to_torch(images))
    assert not found.requires_grad
    record("logits", found, logits(variables, images))


def meta_batches(federation, examples, key):
    settings = federation.config.meta_model
    _, assignment = model_aggregation.expert_weights(federation.counts)
    for number in range(settings.steps):
        positions, mask = epoch_batch(examples, number, key, settings.batch_size)
        positions = np.asarray(positions)[np.asarray(mask) > 0]
        tokens = np.array(examples["logits"][positions][:, assignment])
        labels = np.array(examples["labels"][positions])
        yield torch.from_numpy(tokens), torch.from_numpy(labels).long()


@pytest.mark.parametrize("embedding", [True, False])
def test_meta_steps(make_federation, mixture, record, embedding):
    """Gradients of the first batch; losses and averaged weights of the whole training."""
    federation = make_federation(
        **SETTINGS | {"meta_model.steps": 6, "meta_model.expert_embedding": embedding}
    )
    training, experts = meta_model.MetaTraining(federation), mixture[0]["experts"]
    generator, classes = np.random.default_rng(1), federation.dataset.num_classes
    count, width = len(mixture[1].experts), experts["params"]["head"]["kernel"].shape[1]
    features = generator.standard_normal((3, 2 * classes, count, width)).astype(np.float32)
    prototypes = {
        "features": features,
        "labels": np.broadcast_to(np.arange(2 * classes) // 2, (3, 2 * classes)),
        "valid": (generator.random((3, 2 * classes)) < 0.7).astype(np.float32),
    }
    state = {"experts": experts, "prototypes": prototypes}
    examples = meta_model.training_set(state)
    found = teacher.prototype_logits(
        mixture[1].experts,
        torch.from_numpy(features).movedim(2, 0).flatten(1, 2),
        mixture[1].assignment,
    )
    record("prototypes", found, training.mix(examples["logits"]))

    start = jax.jit(training.start)()
    own = weights.load(torch_meta(federation), {"params": start["params"]})
    batches = list(meta_batches(federation, examples, training.key))
    tokens, labels = batches[0]
    loss = torch.nn.functional.cross_entropy(own.train()(tokens), labels)
    loss.backward()
    expected = jax.jit(jax.value_and_grad(training.loss))(
        start["params"],
        jnp.asarray(tokens.numpy()),
        jnp.asarray(labels.numpy()),
        jnp.ones(len(labels)),
        jax.random.key(0),
    )
    record("loss", loss.detach(), expected[0])
    compare(record, "gradient", own, gradients(own), {"params": expected[1]})

    settings = federation.config.meta_model
    mean, losses = jax.jit(training.run)(state, jnp.float32(settings.learning_rate))
    record("losses", teacher.train_meta(own, batches, settings), losses)
    # Adam makes whole steps of gradients that are zero but for rounding: an attention key's bias
    # changes no answer and wanders. So the answers are compared.
    answers = meta_model.build(federation).apply({"params": mean}, jnp.asarray(tokens.numpy()))
    record("answers", own(tokens).detach(), answers)


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_distillation_steps(federation, mixture, record, request, batch_norm):
    """Consecutive steps on the same noise, from drawing the images to the student's weights."""
    changed = dataclasses.replace(
        federation.config.knowledge_distillation, batch_norm=batch_norm, steps=3
    )
    federation = dataclasses.replace(
        federation, config=dataclasses.replace(federation.config, knowledge_distillation=changed)
    )
    uploads = [trained_generator(federation, seed) for seed in range(federation.num_clients)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *uploads)
    student, variables = knowledge_distillation.Student(federation), perturbed(federation, 9)
    inputs = {
        "teacher": mixture[0],
        "source": {"generators": stacked},
        "first": 0,
        "weights": {
            name: jnp.float32(getattr(changed, name))
            for name in knowledge_distillation.LOSS_WEIGHTS
        },
        "learning_rate": jnp.float32(changed.learning_rate),
        "key": federation.key("parity"),
    }
    images = torch_distillation.shares(
        federation.counts.sum(1), changed.images_per_generator * federation.num_clients
    )
    own_prior = student.images(inputs, 0)[1]
    assert images.sum() == len(own_prior)
    prior = torch_distillation.class_prior(federation.counts, images)
    record("prior", prior, own_prior)
    generators = [weights.load(torch_generator(federation), upload) for upload in uploads]
    own = torch_distillation.Student(
        classifier(federation, variables), mixture[1], torch.from_numpy(prior), changed
    )
    step = jax.jit(lambda carry, number: student.step(carry, number, inputs))
    draw = jax.jit(lambda number: student.images(inputs, number)[0])
    carry = student.start(variables)
    for number in range(3):
        noise = ensemble_noise(federation, rng.fold(inputs["key"], number), images)
        drawn = torch_distillation.draw(generators, noise)
        record("images", drawn.permute(0, 2, 3, 1), draw(number))
        found = own.step(drawn)
        after, metrics = step(carry, number)
        for name, value in found.items():
            record(name, value, metrics[name])
        expected = adam_gradient((carry["optimizer"],), (after["optimizer"],), 0.9)
        compare(record, "gradient", own.model, gradients(own.model), {"params": expected})
        carry = after
    compare_moved(request, own.model.eval(), variables, carry["student"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model.name", "resnet50"),
        ("prototypes.features", "global"),
        ("knowledge_distillation.images", "real"),
        ("generator_optimization.adversary", "local"),
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
    return models.Generator(height, channels, settings.width, settings.latent).eval()


def trained_generator(federation, seed):
    """A generator whose images have contrast."""
    settings = federation.config.generator_optimization
    init = jax.jit(generator_ensemble.build(federation).init)
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
