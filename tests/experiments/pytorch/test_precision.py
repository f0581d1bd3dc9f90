"""The PyTorch baseline in bfloat16: its networks compute in it, all they keep stays float32."""

import pytest

torch = pytest.importorskip("torch", reason="the PyTorch baseline needs the extra `torch`")

from experiments.speed.pytorch_baseline import precision  # noqa: E402
from experiments.speed.pytorch_baseline.classifiers import build_classifier  # noqa: E402
from experiments.speed.pytorch_baseline.generators import Discriminator, Generator  # noqa: E402


@pytest.fixture
def in_bfloat16():
    """Yield `in_bfloat16()`, which switches; float32 comes back after the test."""
    yield lambda: precision.compute_in("bfloat16")
    precision.compute_in("float32")


def classifier():
    return build_classifier("resnet8", 10, 4, (0.5,), (0.25,), 16)


NETWORKS = {
    "classifier": (classifier, (4, 1, 16, 16), "stage2_block1.conv2"),
    "generator": (lambda: Generator(16, 1, 4, 8), (4, 8), "up2"),
    "discriminator": (lambda: Discriminator(16, 1, 4), (4, 1, 16, 16), "down2"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_in_bfloat16_and_return_float32(name, in_bfloat16):
    build, shape, layer = NETWORKS[name]
    network, x, seen = build().train(), torch.randn(shape), []
    network.get_submodule(layer).register_forward_hook(lambda *call: seen.append(call[2].dtype))

    def output():
        found = network(x)
        return found.logits if name == "classifier" else found

    expected = output()
    in_bfloat16()
    found = output()
    assert seen == [torch.float32, torch.bfloat16]
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
    found.square().mean().backward()
    assert {p.grad.dtype for p in network.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


def test_steps_do_not_compute_with_weights_of_an_earlier_one(in_bfloat16):
    """Autocast keeps copies of weights; they must not outlive a forward pass."""
    in_bfloat16()
    model, x = classifier(), torch.randn(4, 1, 16, 16)
    before = model(x).logits
    with torch.no_grad():
        model.stem.weight.mul_(-1)
    assert (model(x).logits - before).abs().max() > 0
