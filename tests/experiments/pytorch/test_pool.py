"""The PyTorch baseline's pools: as many draws and answers as ours, every image once in a pass."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the PyTorch baseline needs the extra `torch`")

from experiments.speed.pytorch_baseline import distillation  # noqa: E402
from tests.experiments.pytorch.parity import classifier  # noqa: E402


@pytest.mark.parametrize(("passes", "draws"), [(1, 8), (2, 4), (3, 4), (4, 2)])
def test_a_block_draws_and_asks_as_often_as_ours(federation, passes, draws):
    """Two blocks of four steps; three passes need two draws a block, like two."""
    settings = dataclasses.replace(
        federation.config.knowledge_distillation, steps=8, block_steps=4, pool_passes=passes
    )
    drawn, asked = [], []

    def draw():
        drawn.append(torch.rand(6, 1, 16, 16) * 2 - 1)
        return drawn[-1]

    def teacher(images):
        asked.append(images)
        return torch.randn(len(images), 10)

    student = distillation.Student(classifier(federation), teacher, torch.zeros(1, 10), settings)
    student.distil(draw, 8, passes)
    assert len(drawn) == len(asked) == draws
    assert all(one is other for one, other in zip(drawn, asked, strict=True))
    assert student.steps_made == 8


@pytest.mark.parametrize(("draws", "steps"), [(5, 20), (13, 50)])
def test_a_pass_uses_every_image_once(draws, steps):
    order = distillation.shuffled(draws, 12, steps, torch.device("cpu")).numpy()
    assert order.shape == (steps, 12)
    assert (order % 12 == np.arange(12)).all()
    for start in range(0, steps, draws):
        positions = order[start : start + draws].ravel()
        assert len(set(positions)) == len(positions)
        assert positions.max() < 12 * draws
