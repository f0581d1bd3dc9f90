"""Run the PyTorch side of `experiments.speed.compare_pytorch`, one unit when told to.

This process reads pickled messages from its standard input and answers on its standard output.
Between two messages it blocks in a read and its threads sleep. The first message is the work. Each
other message names a unit, and the answer is the wall time of that unit alone.
"""

import copy
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from experiments.speed.pytorch_baseline import data, precision
from experiments.speed.pytorch_baseline.pipeline import Mosaic, Work

CHUNKS = (16, 32, 64, 128, 320)
"""Sizes tried for the models in eval mode; the fastest is used."""

TEACHER_IMAGES = 320
PEAK_SIZES = {"cpu": 2048}
"""Rows of the square matrices whose product measures the machine; on an accelerator 8,192."""


class Units:
    """The units of work, each a function without arguments, ready to be timed.

    Args:
      work: settings and data.
      device: where PyTorch runs.
    """

    def __init__(self, work: Work, device: torch.device):
        self.mosaic = Mosaic(work, device, chunk=max(CHUNKS))
        self.device, self.config = device, work.config
        self.functions: dict[str, Callable[[], Any]] = {
            "local round": lambda: self.local_round(self.mosaic),
            "local round, torch.func.vmap": self.vmapped_round,
            "local round, torch.compile": self.compiled_round,
            "generators": self.mosaic.train_generators,
            "meta model": self.mosaic.train_meta,
            "evaluation": self.mosaic.evaluate,
            "pipeline": self.mosaic.run,
        }
        self.preparations = {"generators": self.mosaic.start_generators}
        self.compiled: Mosaic | None = None

    def prepare(self) -> dict[str, float]:
        """Find the best chunk and make one pass through all stages, whose state later units use."""
        mosaic = self.mosaic
        mosaic.chunk = min(CHUNKS, key=self._chunk_seconds)
        self._wait()
        start = time.perf_counter()
        mosaic.run()
        self._wait()
        first_pass = time.perf_counter() - start
        images = mosaic.generated()
        few = images.repeat(-(-TEACHER_IMAGES // len(images)), 1, 1, 1)[:TEACHER_IMAGES]
        few = few.contiguous(memory_format=torch.channels_last)
        self.functions["teacher"] = lambda: mosaic.teacher(few)
        self.distilled = mosaic.student()
        self.functions["distillation"] = self.distillation
        self.functions["distillation, no pool"] = self.distillation_without_pool
        return {"chunk": mosaic.chunk, "first_pass_seconds": first_pass}

    @torch.no_grad()
    def _chunk_seconds(self, chunk: int) -> float:
        """Return the wall time of one model in eval mode on the teacher's number of images."""
        model, images = self.mosaic.model.eval(), self.mosaic.images
        images = data.take(images, torch.arange(TEACHER_IMAGES, device=self.device) % len(images))
        self.functions["chunks"] = lambda: [model(part) for part in images.split(chunk)]
        return min(self.seconds("chunks") for _ in range(3))

    def seconds(self, name: str) -> float:
        """Return the wall time of one run of a unit, without its preparation."""
        function = self.functions[name]
        self.preparations.get(name, lambda: None)()
        self._wait()
        start = time.perf_counter()
        function()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def local_round(self, mosaic: Mosaic) -> None:
        """Run one round, always from the same model."""
        settings, server = self.config.local_update, mosaic.server
        mosaic.local_round(settings.learning_rate, settings.steps)
        mosaic.server = server

    def vmapped_round(self) -> None:
        """Run the same round with all clients stacked."""
        settings = self.config.local_update
        self.mosaic.vmapped_round(settings.learning_rate, settings.steps)

    def compiled_round(self) -> None:
        """Run the same round with a compiled model; the first call compiles it."""
        if self.compiled is None:
            self.compiled = copy.copy(self.mosaic)
            self.compiled.model = copy.deepcopy(self.mosaic.model)
            self.compiled.model.compile()
        self.local_round(self.compiled)

    def distillation(self) -> None:
        """Run one block of steps; the student goes on from block to block."""
        self.mosaic.distil(self.distilled, self.config.knowledge_distillation.block_steps)

    def distillation_without_pool(self) -> None:
        """Run one block of steps, each on images of its own."""
        steps = self.config.knowledge_distillation.block_steps
        self.distilled.distil(self.mosaic.generated, steps, passes=1)

    def peak(self) -> float:
        """Return the operations a second of the best of ten matrix products."""
        size = PEAK_SIZES.get(self.device.type, 8192)
        dtype = getattr(torch, precision.compute_dtype())
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        self.functions["peak"] = lambda: a @ b
        return 2 * size**3 / min(self.seconds("peak") for _ in range(10))


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer messages until the other side hangs up."""

    def answer(value: Any) -> None:
        pickle.dump(value, answers)
        answers.flush()

    first = pickle.load(requests)
    torch.set_num_threads(first["threads"])
    torch.set_float32_matmul_precision("high" if first["tf32"] else "highest")
    torch.backends.cudnn.allow_tf32 = first["tf32"]
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision.compute_in(first["work"].config.model.dtype)
    units = Units(first["work"], device)
    first_pass = units.prepare()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    answer(
        first_pass
        | {
            "torch": torch.__version__,
            "device": name,
            "threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        }
    )
    while True:
        try:
            name = pickle.load(requests)
        except EOFError:
            return
        try:
            answer(units.peak() if name == "peak" else units.seconds(name))
        except Exception as error:  # the parent reports what PyTorch cannot run
            traceback.print_exc()
            answer(error.__class__.__name__)


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # other output must not enter the pipe
    serve(sys.stdin.buffer, pipe)
