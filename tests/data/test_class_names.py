"""Names of the classes: out of a set's own files, else the known ones, else the labels."""

import pickle

import numpy as np
import pytest

from experiments import small_sets
from mosaic_jax.data import __main__ as command
from mosaic_jax.data import load
from tests.data.written import directory_of

pytestmark = pytest.mark.usefixtures("nowhere")
LETTERS = [f"name {label}" for label in range(100)]


@pytest.mark.parametrize(
    ("name", "form", "file", "content"),
    [
        (
            "cifar10",
            "pickles",
            "cifar-10-batches-py/batches.meta",
            pickle.dumps({b"label_names": [each.encode() for each in LETTERS[:10]]}),
        ),
        (
            "cifar100",
            "pickles",
            "cifar-100-python/meta",
            pickle.dumps(
                {
                    b"coarse_label_names": [b"coarse"] * 20,
                    b"fine_label_names": [each.encode() for each in LETTERS],
                }
            ),
        ),
        (
            "cifar10",
            "records",
            "cifar-10-batches-bin/batches.meta.txt",
            "\n".join([*LETTERS[:10], ""]).encode(),
        ),
        (
            "cifar100",
            "records",
            "cifar-100-binary/fine_label_names.txt",
            "\n".join(LETTERS).encode(),
        ),
    ],
)
def test_cifars_own_list_of_its_classes_counts(tmp_path, name, form, file, content):
    small_sets.write(name, tmp_path, form)
    (tmp_path / file).write_bytes(content)
    data = load(name, directory=tmp_path)
    assert data.class_names == tuple(LETTERS[: data.num_classes])
    assert load(name, directory=tmp_path).class_names == data.class_names  # out of the cache


def test_a_list_of_another_number_of_classes_is_not_taken(tmp_path):
    small_sets.write("cifar10", tmp_path, "records")
    (tmp_path / "cifar-10-batches-bin/batches.meta.txt").write_text("a\nb\n")
    assert load("cifar10", directory=tmp_path).class_names[:2] == ("airplane", "automobile")


def test_tiny_imagenets_classes_have_words_where_it_says_them(tmp_path):
    small_sets.write("tiny_imagenet", tmp_path, "folder")
    folder = tmp_path / "tiny-imagenet-200"
    wnids = sorted((folder / "wnids.txt").read_text().split())
    (folder / "words.txt").write_text(f"{wnids[1]}\tgoldfish, Carassius auratus\nn0\tnone\n")
    found = load("tiny_imagenet", directory=tmp_path).class_names
    assert found == (wnids[0], "goldfish", *wnids[2:])


@pytest.mark.parametrize(
    ("name", "last"), [("fashion_mnist", "ankle boot"), ("cifar10", "truck"), ("mnist", "9")]
)
def test_sets_that_say_none_have_the_known_names(tmp_path, name, last):
    small_sets.write(name, tmp_path)
    assert load(name, directory=tmp_path).class_names[-1] == last


def test_food101s_classes_are_its_lines(tmp_path):
    small_sets.write("food101", tmp_path, "folder")
    lines = (tmp_path / "food-101/meta/classes.txt").read_text().split()
    assert load("food101", directory=tmp_path).class_names == tuple(lines)


def test_a_users_names_are_shown_even_those_with_two_dollar_signs(tmp_path, capsys):
    small_sets.write("own", tmp_path, "folder")
    folder = directory_of(tmp_path, "own", "folder")
    for split in ("train", "test"):
        (folder / split / "class1").rename(folder / split / "$1_$2")
    given = ["own", "--directory", str(folder), "--out", str(tmp_path / "a.png")]
    assert command.main(["", "describe", *given]) == 0
    assert "0 $1_$2" in capsys.readouterr().out
    assert load("own", directory=folder).class_names == ("$1_$2", "class0", "class2")
    assert (np.bincount(load("own", directory=folder).train_labels) > 0).all()
