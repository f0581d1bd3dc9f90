"""A user's own model is checked before anything runs."""

import flax.linen as nn
import pytest

from mosaic_jax.models import CLASSIFIERS, build_classifier, check_classifier
from mosaic_jax.models.layers import BatchNorm, Dense
from mosaic_jax.types import Outputs, UserError


class Mine(nn.Module):
    """A user's model, right but for what is changed."""

    wrong: str = ""
    has_norm: bool = True

    @nn.compact
    def __call__(self, images, train=False, mask=None):
        x = images.reshape(len(images), 1, 1, -1)
        x = nn.Dense(4)(x)
        if self.has_norm:
            x = BatchNorm(name="norm")(x, train, mask)
        features = x if self.wrong == "features" else x.reshape(len(images), -1)
        name = "last" if self.wrong == "head" else "head"
        logits = Dense(4 if self.wrong == "classes" else 3, name=name)(x.reshape(len(images), -1))
        if self.wrong == "shape":
            images.reshape(7)
        return (logits, features) if self.wrong == "tuple" else Outputs(logits, features)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("features", "gives features [2, 1, 1, 4] for 2 images, not [2, d]"),
        ("head", "has no last layer 'head' with kernel [4, 3] and bias [3]"),
        ("classes", "gives logits [2, 4] for 2 images of 3 classes"),
        ("tuple", "returns a tuple, not Outputs(logits, features)"),
        ("shape", "cannot be run: "),
    ],
)
def test_a_users_model_is_checked_before_anything_runs(wrong, message):
    for has_norm in (True, False):
        check_classifier("mine", Mine(has_norm=has_norm), (8, 8, 1), 3)
    with pytest.raises(UserError) as error:
        check_classifier("mine", Mine(wrong), (8, 8, 1), 3)
    assert str(error.value).startswith(f"model 'mine' {message}")
    assert str(error.value).endswith("; see docs/guide.md")


def test_too_small_images_for_lenet_are_an_answer():
    model = build_classifier("lenet", 3, 8, (0.5,), (0.3,))
    check_classifier("lenet", model, (16, 16, 1), 3)
    with pytest.raises(UserError, match="'lenet' cannot be run: it needs images of 16 pixels"):
        check_classifier("lenet", model, (15, 16, 1), 3)


def test_a_model_without_the_arguments_of_one_is_an_answer(monkeypatch):
    monkeypatch.setitem(CLASSIFIERS, "mine", Mine)
    with pytest.raises(UserError, match=r"model 'mine' cannot be built: .*num_classes"):
        build_classifier("mine", 3, 8, (0.5,), (0.3,))
