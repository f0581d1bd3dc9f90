"""Time the stages beside PyTorch on the same device, in float32 and in bfloat16.

It is `experiments.speed.compare_pytorch` at the paper's width, with blocks short enough for a few
pairs. In bfloat16 PyTorch's networks run under autocast.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.speed.on_accelerator import children
from experiments.speed.on_accelerator.children import Options, Row, Skipped
from experiments.speed.timed_units import median_and_range

TITLE = "Beside PyTorch"
STAGES = ("local round", "generators", "teacher", "meta model", "distillation", "evaluation")
PAIRS = 5
DTYPES = ("float32", "bfloat16")
FULL = {
    "data.name": "synthetic",
    "data.image_size": 32,
    "model.width": 64,
    "partition.clients": 10,
    "local_update.rounds": 1,
    "generator_optimization.steps": 20,
    "generator_optimization.block_steps": 20,
    "generator_optimization.batch_size": 64,
    "generator_optimization.width": 64,
    "generator_optimization.adversary_width": 64,
    "meta_model.steps": 50,
    "knowledge_distillation.steps": 5,
    "knowledge_distillation.block_steps": 5,
    "fine_tuning.rounds": 1,
}
SMALL = {
    "data.image_size": 16,
    "data.train_images": 300,
    "data.test_images": 100,
    "model.name": "cnn",
    "model.width": 4,
    "model.conv": "native",  # as on an accelerator; on a CPU it compiles fastest
    "partition.clients": 2,
    "local_update.steps": 2,
    "local_update.batch_size": 16,
    "generator_optimization.steps": 2,
    "generator_optimization.block_steps": 2,
    "generator_optimization.batch_size": 16,
    "generator_optimization.width": 4,
    "generator_optimization.adversary_width": 4,
    "prototypes.images_per_class": 4,
    "prototypes.per_class": 2,
    "meta_model.steps": 4,
    "knowledge_distillation.steps": 2,
    "knowledge_distillation.block_steps": 2,
    "knowledge_distillation.images_per_generator": 16,
}


def settings(small: bool) -> dict[str, Any]:
    """Return the changes to `configs/fashion_mnist.py`."""
    return FULL | (SMALL if small else {})


def rows(options: Options, deadline: float) -> Iterator[Row]:
    """Yield a row for each type and stage.

    Raises:
      Skipped: PyTorch is not installed, or would run on another device.
    """
    if not options.torch_device:
        raise Skipped("PyTorch is not installed: pip install '.[torch]'")
    if (options.torch_device == "cpu") != options.forced:
        raise Skipped("PyTorch sees no accelerator here, so a comparison would not be fair")
    for dtype in DTYPES:
        yield from children.rows("beside_pytorch", options, deadline, dtype=dtype)


def child(small: bool, folder: str, dtype: str) -> Iterator[Row]:
    """Measure all stages in one type."""
    from experiments.speed import compare_pytorch  # which imports torch's side; it may be absent

    changes = settings(small) | {"model.dtype": dtype}
    arguments = compare_pytorch.parse(
        ["--width", str(changes["model.width"]), "--clients", str(changes["partition.clients"])]
    )
    arguments.set = list(changes.items())
    arguments.stages, arguments.pairs = STAGES, 1 if small else PAIRS
    arguments.out = Path(folder) / f"compare_pytorch_{dtype}"
    facts, measured = compare_pytorch.compare(arguments)
    results: list[dict[str, Any]] = []
    for one in measured:
        results.append(one)
        compare_pytorch.write(arguments.out, facts, results)
        yield row(dtype, one)


def row(dtype: str, figures: dict[str, Any]) -> Row:
    """Return the row of one stage."""
    shares = [figures.get(f"{side}_share_of_peak") for side in ("ours", "pytorch")]
    of_peak = ["" if share is None else f"{share:.0%}" for share in shares]
    return {
        "stage": figures["stage"],
        "type": dtype,
        "unit": f"{figures['count']} {figures['items']}",
        "ours, s": median_and_range(figures["seconds"]["ours"]),
        "PyTorch, s": median_and_range(figures["seconds"]["pytorch"]),
        "PyTorch / ours": median_and_range(figures["ratios"]),
        "of peak, ours": of_peak[0],
        "of peak, PyTorch": of_peak[1],
    }


if __name__ == "__main__":
    children.serve(child)
