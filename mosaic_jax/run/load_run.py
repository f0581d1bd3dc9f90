"""A run as objects: its student, teacher, experts and generators, to classify, draw and export.

from mosaic_jax import load_run

run = load_run("runs/digits")
run.classify(run.federation.dataset.test_images[:5])  # logits of the student
run.teacher(images); run.experts(images); run.draw(client=0, images=8)
run.save_student("student.npz")
run.export_student("student.stablehlo")
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from jax import export

from mosaic_jax import rng, settings, trees
from mosaic_jax.config import Config
from mosaic_jax.data.batches import to_float
from mosaic_jax.federation import Federation, load_federation
from mosaic_jax.run import experiment, reader
from mosaic_jax.run import workdir as files
from mosaic_jax.stages.evaluation import Predictor, predictor
from mosaic_jax.stages.generator_ensemble import build_generator, draw_labels, draw_latent
from mosaic_jax.stages.stage import State
from mosaic_jax.stages.teacher import Teacher, class_expert_logits, teacher_logits
from mosaic_jax.types import Array, Outputs, PyTree, UserError, Variables


@dataclass(frozen=True)
class LoadedRun:
    """A run's models, as far as it has come.

    Attributes:
      federation: clients, their data and the classifier, as the run has them.
      state: what its stages left, by name, see `stages.stage.State`.
      stages: the names of those that have ended.
    """

    federation: Federation
    state: State
    stages: tuple[str, ...]

    @property
    def config(self) -> Config:
        """All settings of the run."""
        return self.federation.config

    @property
    def student(self) -> Variables:
        """The variables of the student or, where there is none, of the global model."""
        return self._part("student" if "student" in self.state else "global")

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Return the student's logits [n, classes] of uint8 images [n, height, width, channels]."""
        return self._student_logits(self.student, self._checked(images))

    def teacher(self, images: np.ndarray) -> np.ndarray:
        """Return the logits [n, classes] of the mixture-of-experts teacher.

        Raises:
          UserError: the run has no teacher (yet).
        """
        return self._teacher_logits(self._teacher(), self._checked(images))

    def experts(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of every class's expert, and the global one, [n, experts, classes].

        Raises:
          UserError: the run has no experts (yet).
        """
        flat = self._expert_logits(Teacher(self._part("experts")), self._checked(images))
        return flat.reshape(len(images), -1, self.federation.dataset.num_classes)

    def draw(self, client: int, images: int, seed: int = 0) -> np.ndarray:
        """Draw images of a client's generator, uint8 [images, height, width, channels].

        Raises:
          UserError: the run has no generators (yet), or no such client.
        """
        generators = self._part("generators")
        if not 0 <= client < self.federation.num_clients:
            raise UserError(f"there are clients 0 to {self.federation.num_clients - 1}")
        own = trees.take(generators, client)
        key = rng.key(seed, "draw", client=client)
        counts = jnp.asarray(self.federation.clients.class_counts[client], jnp.float32)
        labels = draw_labels(key, counts, images)
        drawn = build_generator(self.federation).apply(
            own, draw_latent(self.federation, key, labels)
        )
        return np.rint((np.asarray(drawn) + 1) * 127.5).astype(np.uint8)

    def save_student(self, path: str | Path) -> None:
        """Write the student's arrays: as `.npz`, named like "params/head/kernel", or else orbax.

        Orbax writes a directory that is not there yet; its `StandardCheckpointer` reads it.

        Raises:
          UserError: the place cannot be written to.
        """
        path, arrays = Path(path).absolute(), jax.device_get(self.student)
        try:
            if path.suffix == ".npz":
                np.savez(path, **flatten_dict(arrays, sep="/"))
            else:
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(path, arrays)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {path}: {' '.join(str(error).split())}") from None

    def export_student(self, path: str | Path) -> None:
        """Write the student as a program for `jax.export.deserialize`, with its weights inside.

        It takes uint8 images [n, height, width, channels] of any number, gives logits [n, classes],
        and runs on CPU, GPU and TPU, without this package.

        Raises:
          UserError: the place cannot be written to.
        """
        variables, model = (
            jax.device_get(self.student),
            self.federation.classifier.module.clone(conv_impl="native"),
        )

        def classify(images: Array) -> Array:
            return cast(Outputs, model.apply(variables, to_float(images))).logits

        (batch,) = export.symbolic_shape("n")
        images = jax.ShapeDtypeStruct((batch, *self.federation.dataset.image_shape), np.uint8)
        program = export.export(jax.jit(classify), platforms=("cpu", "cuda", "tpu"))(images)
        try:
            Path(path).write_bytes(program.serialize())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    def _part(self, name: str) -> PyTree:
        if name not in self.state:
            raise UserError(
                f"the run has no {name!r}; it has come to {', '.join(self.stages) or 'nothing'}"
            )
        return self.state[name]

    def _teacher(self) -> Teacher:
        return Teacher(self._part("experts"), self._part("meta"))

    def _checked(self, images: np.ndarray) -> np.ndarray:
        shape = self.federation.dataset.image_shape
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise UserError(
                f"images are uint8 [n, {', '.join(map(str, shape))}], not {images.dtype} "
                f"{list(images.shape)}"
            )
        if not len(images):
            raise UserError("there are no images")
        return images

    @cached_property
    def _student_logits(self) -> Predictor:
        return predictor(self.federation)

    @cached_property
    def _teacher_logits(self) -> Predictor:
        return predictor(self.federation, teacher_logits(self.federation))

    @cached_property
    def _expert_logits(self) -> Predictor:
        experts = class_expert_logits(self.federation)

        def flat(teacher: Teacher, images: Array) -> Array:
            return experts(teacher, images).reshape(len(images), -1)

        return predictor(self.federation, flat)


def load_run(workdir: str | Path) -> LoadedRun:
    """Load a run's models; train nothing.

    Raises:
      UserError: the directory holds no run, or its data set is missing or another one now.
    """
    workdir = Path(workdir)
    config = settings.from_config_dict(reader.read_config(workdir))
    federation = load_federation(config)
    files.check_data(workdir, federation)
    state, ended = experiment.restore(federation, workdir)
    return LoadedRun(federation, state, ended)
