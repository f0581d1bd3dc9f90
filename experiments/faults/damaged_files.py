"""Damage small data sets in every original format and read them: 10,000 files by default.

    python -m experiments.faults.damaged_files --files 10000

Each time one file of one set is cut, overwritten, enlarged, emptied or replaced by noise, at seeded
random places. Reading must end in the program's own error. Where the damage hit bytes that the
format does not check, it may end in images of the right type and labels in range. The cache of
decoded images must hold nothing that is not in the files.
"""

import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import numpy as np

from experiments import small_sets
from mosaic_jax.data import load
from mosaic_jax.sweep import launch
from mosaic_jax.types import Dataset, UserError

MEMORY = 6 << 30
"""Bytes of address space; a reader that a damaged file makes allocate more fails."""


def damage(content: bytes, chance: random.Random) -> bytes:
    """Return the content of a file after one random damage."""
    size = len(content)
    at = chance.randrange(size) if size else 0
    length = min(chance.choice([1, 1, 2, 8, 64, 1024]), size - at)
    noise = chance.randbytes(length)
    kind = chance.randrange(7)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + noise + content[at + length :]
    if kind == 2:
        return content[:at] + noise + content[at:]
    if kind == 3:
        return content[:at] + content[at + length :]
    if kind == 4:
        flipped = bytes(byte ^ (1 << chance.randrange(8)) for byte in content[at : at + length])
        return content[:at] + flipped + content[at + length :]
    if kind == 5:
        head = min(size, 512)  # where formats keep their headers
        at = chance.randrange(head) if head else 0
        return content[:at] + chance.randbytes(1) + content[at + 1 :]
    return chance.randbytes(chance.choice([0, 1, 100, 5000]))


def faults(data: Dataset) -> list[str]:
    """Return what is wrong with images that were read without an error."""
    wrong = []
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
            wrong.append(f"images {images.dtype} {images.shape}, labels {labels.shape}")
        elif labels.min() < 0 or labels.max() >= data.num_classes:
            wrong.append(f"labels {labels.min()}..{labels.max()}")
    return wrong


def decode_again(name: str, directory: Path) -> Dataset:
    """Read the data set without the cache."""
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]) / "mosaic_jax", ignore_errors=True)
    return load(name, directory=directory)


def read_damaged(name: str, form: str, root: Path, chance: random.Random) -> str:
    """Damage a file in `root`, read the set and mend it.

    Returns:
      "refused", "read" or what was wrong.
    """
    file = chance.choice([path for path in sorted(root.rglob("*")) if path.is_file()])
    whole = file.read_bytes()
    directory = root / {"folder": "pictures", "npz": "own.npz"}[form] if name == "own" else root
    file.write_bytes(damage(whole, chance))
    try:
        data = load(name, directory=directory)
        again = load(name, directory=directory)  # from the cache
        fresh = decode_again(name, directory)
        same = all(
            np.array_equal(getattr(one, part), getattr(fresh, part))
            for one in (data, again)
            for part in ("train_images", "train_labels", "test_images", "test_labels")
        )
        wrong = faults(data) + ([] if same else ["the cache holds something else"])
        return "; ".join(wrong) or "read"
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except Exception:
        return f"{name}, {form}, {file.name}: {traceback.format_exc()[-600:]}"
    finally:
        file.write_bytes(whole)
        shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]) / "mosaic_jax", ignore_errors=True)


def main(files: int, seed: int) -> int:
    """Damage and read files, print the counts of the results; return the exit status."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    wrong = 0
    formats = [(name, form) for name, forms in small_sets.WRITERS.items() for form in forms]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        for name, form in formats:
            small_sets.write(name, Path(folder) / f"{name}-{form}", form, per_class=1)
        for index in range(files):
            name, form = formats[index % len(formats)]
            result = read_damaged(name, form, Path(folder) / f"{name}-{form}", chance)
            is_right = result in ("refused", "read")
            counts[f"{name}, {form}: {result}" if is_right else "wrong"] += 1
            if not is_right:
                wrong += 1
                print(result, flush=True)
    for what, count in sorted(counts.items()):
        print(f"{count:6d}  {what}")
    print(f"{files} damaged files, {wrong} answered wrongly")
    return int(bool(wrong))


if __name__ == "__main__":
    parser = launch.command_parser(__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.files, arguments.seed))
