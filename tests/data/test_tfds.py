"""Sets prepared by tensorflow-datasets."""

import numpy as np
import pytest

from experiments import small_sets
from mosaic_jax.data import load
from mosaic_jax.types import UserError
from tests.data.written import expected_images

pytestmark = pytest.mark.usefixtures("nowhere")


def prepare(theirs, features, rows, folder):
    """A prepared directory as tensorflow-datasets writes it, without TensorFlow."""
    import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = theirs
        VERSION = tfds.core.Version("3.0.1")

        def _info(self):
            described = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=described)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", "test")}

        def _generate_examples(self, split):
            yield from rows[split]

    Small(data_dir=str(folder), file_format="array_record").download_and_prepare()


def prepared_set(name, folder):
    import tensorflow_datasets as tfds

    written = small_sets.images(name, per_class=3)
    theirs = {"svhn": "svhn_cropped"}.get(name, name)
    shape = written.train_images.shape[1:]
    features = {
        "image": tfds.features.Tensor(shape=shape, dtype=np.uint8),
        "label": tfds.features.Tensor(shape=(), dtype=np.int64),
    }
    if name == "cifar10":
        features["id"] = tfds.features.Text()
    rows = {}
    for split in ("train", "test"):
        pairs = zip(
            getattr(written, f"{split}_images"), getattr(written, f"{split}_labels"), strict=True
        )
        rows[split] = []
        for number, (image, label) in enumerate(pairs):
            row = {"image": image, "label": int(label)}
            key = number
            if name == "cifar10":
                key = row["id"] = f"{split}_{number:05d}"
            rows[split].append((key, row))
    prepare(theirs, features, rows, folder)
    return written


@pytest.mark.parametrize("name", ["mnist", "svhn", "cifar10"])
def test_a_prepared_directory_gives_the_archives_order(tmp_path, name):
    written = prepared_set(name, tmp_path / "tfds")
    for where in (None, tmp_path / "tfds"):
        data = load(name, directory=where)
        for split in ("train", "test"):
            images = expected_images(name, getattr(written, f"{split}_images"))
            np.testing.assert_array_equal(getattr(data, f"{split}_images"), images)
            labels = getattr(written, f"{split}_labels")
            np.testing.assert_array_equal(getattr(data, f"{split}_labels"), labels)


def test_a_prepared_directory_comes_before_original_files(tmp_path):
    small_sets.write("mnist", tmp_path / "mine", per_class=5)
    assert len(load("mnist", directory=tmp_path / "mine").train_labels) == 50
    prepared_set("mnist", tmp_path / "mine")
    assert len(load("mnist", directory=tmp_path / "mine").train_labels) == 30


def test_a_prepared_directory_in_another_format_says_what_to_do(tmp_path):
    folder = tmp_path / "mnist/3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(UserError, match=r"prepared as tfrecord.*file_format='array_record'"):
        load("mnist", directory=tmp_path)


def test_prepared_images_of_another_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(small_sets.SIZES, "mnist", (30, 1))
    prepared_set("mnist", tmp_path)
    with pytest.raises(UserError, match=r"mnist/3\.0\.1 holds images of \(30, 30, 1\), not \(28,"):
        load("mnist", directory=tmp_path)
