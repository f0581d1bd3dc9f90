"""The PyTorch baseline's evaluation, local training, rounds and class experts are ours."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the PyTorch baseline needs the extra `torch`")

from experiments.speed.pytorch_baseline import classifiers, weights  # noqa: E402
from experiments.speed.pytorch_baseline import data as torch_data  # noqa: E402
from experiments.speed.pytorch_baseline import evaluation as torch_evaluation  # noqa: E402
from experiments.speed.pytorch_baseline import local_update as torch_local  # noqa: E402
from mosaic_jax.data.batches import batches_per_epoch, epoch_batch, to_float  # noqa: E402
from mosaic_jax.stages import cohort, federated_round, model_aggregation  # noqa: E402
from mosaic_jax.stages.evaluation import evaluator, predictor  # noqa: E402
from mosaic_jax.stages.local_update import Batch, ClientUpdate  # noqa: E402
from mosaic_jax.stages.teacher import expert_weights  # noqa: E402
from tests.experiments.pytorch.deviations import SETTINGS, noisy, perturbed  # noqa: E402
from tests.experiments.pytorch.parity import (  # noqa: E402
    CPU,
    classifier,
    client_batches,
    compare,
    compare_moved,
    gradients,
    round_inputs,
    to_torch,
)
from tests.helpers import member  # noqa: E402


@pytest.fixture(scope="module")
def residual(make_federation):
    """Return a ResNet on smaller images: the fewer ReLUs, the fewer close calls."""
    changes = {"model.name": "resnet8", "data.image_size": 8, "local_update.batch_size": 24}
    return noisy(make_federation(**SETTINGS | changes))


@pytest.mark.parametrize("name", ["resnet18", "resnet8", "cnn", "lenet"])
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
        federation.classifier.apply_eval(variables, to_float(dataset.test_images[:8])).features,
    )
    figures = torch_evaluation.evaluate(
        logits,
        images,
        torch.from_numpy(dataset.test_labels),
        federation.clients.local_test_shards,
        32,
    )
    assert figures == pytest.approx(evaluator(federation)(variables))


@pytest.fixture(scope="module")
def lenet(make_federation):
    """Return a model without batch norm."""
    return noisy(make_federation(**SETTINGS | {"model.name": "lenet"}))


@pytest.mark.parametrize(
    ("model", "batch_norm"), [("residual", "train"), ("residual", "frozen"), ("lenet", "train")]
)
def test_local_steps(record, request, model, batch_norm):
    """More than an epoch of each client; the last batch of an epoch is smaller."""
    federation, steps, rate = request.getfixturevalue(model), 3, 0.05
    update = ClientUpdate(federation, steps, batch_norm)
    inputs, variables = round_inputs(federation, rate), perturbed(federation)
    run = jax.jit(lambda client: update(inputs.replace(variables=variables), client))
    gradient_of = jax.jit(jax.grad(lambda *args: update.loss(*args)[0]))
    for i in range(federation.num_clients):
        client = member(federation.clients.lists, i)
        batches = list(client_batches(federation, client, inputs.key, steps))
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
                    inputs.key,
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
    run = federated_round.round_function(federation, ClientUpdate(federation, steps))
    sizes = cohort.size_weights(federation)
    members = cohort.cohort_of(federation, np.arange(federation.num_clients), sizes)
    state = federated_round.RoundState(federation.layout.copy_for_donation(variables), own={})
    expected = run(state, inputs, members)
    model = classifier(federation, variables)
    server = [tensor.clone() for tensor in torch_local.tensors(model)]
    mean, kept, metrics = torch_local.federated_round(
        model,
        server,
        [
            client_batches(federation, member(federation.clients.lists, i), inputs.key, steps)
            for i in range(federation.num_clients)
        ],
        sizes[:, 0] / sizes.sum(),
        federation.config.local_update,
        0.05,
    )
    torch._foreach_copy_(torch_local.tensors(model), mean)
    compare_moved(request, model, variables, expected.state.model)
    record("loss", torch.stack([loss for loss, _ in metrics]), expected.metrics["loss"])
    assert kept == []


def test_vmapped_round_is_the_eager_one(federation):
    """With all clients stacked, on full batches and without momentum."""
    settings = dataclasses.replace(federation.config.local_update, momentum=0.0)
    model, shares = classifier(federation, perturbed(federation)), [0.2, 0.3, 0.5]
    images = torch.randn(2, 3, 8, 1, 16, 16)
    labels = torch.randint(10, (2, 3, 8))
    stacked = torch_local.vmapped_round(
        classifiers.without_statistics(model),
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
    stage = model_aggregation.stage(federation)
    formed, _ = stage.block({"global": perturbed(federation)}, None, 0)
    model = classifier(federation)
    clients = []
    for i in range(federation.num_clients):
        weights.load(model, member(formed.client_models, i))
        clients.append([tensor.clone() for tensor in torch_local.tensors(model)])
    rows, assignment = torch_local.expert_weights(federation.clients.class_counts)
    expected_rows, expected_assignment = expert_weights(federation.clients.class_counts)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(assignment, expected_assignment)
    experts = torch_local.class_experts(clients, torch.from_numpy(rows))
    assert len(experts) > 1
    for i, expert in enumerate(experts):
        torch._foreach_copy_(torch_local.tensors(model), expert)
        compare(record, "weights", model, model.state_dict(), member(formed.experts, i))


@pytest.mark.parametrize("size", [3, 16, 17, 33, 1])
def test_epochs_have_our_batches(size):
    """As many batches as ours, of the same sizes, which hold every image once."""
    index, count = torch.arange(100, 100 + size), int(batches_per_epoch(size, 16))
    batches = list(itertools.islice(torch_data.epochs(index, 16), 2 * count))
    own, key = np.arange(size), jax.random.key(0)
    _, masks = jax.jit(jax.vmap(lambda n: epoch_batch(own, size, step=n, key=key, batch_size=16)))(
        jnp.arange(2 * count)
    )
    assert [len(batch) for batch in batches] == masks.sum(1).astype(int).tolist()
    for epoch in (batches[:count], batches[count:]):
        seen = torch.cat(epoch)
        assert len(seen.unique()) == len(seen)
        assert set(seen.tolist()) <= set(index.tolist())
