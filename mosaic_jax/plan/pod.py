"""Plan one topology, a TPU slice or a host's GPUs: devices, settings, shapes, lanes that fit."""

import argparse
import dataclasses
import importlib.util
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mosaic_jax import compat, parallel, settings
from mosaic_jax.config import Config
from mosaic_jax.data import catalog, sources
from mosaic_jax.federation import build_federation
from mosaic_jax.plan import gpus
from mosaic_jax.plan.abstract import Program, Record, abstract_federation, walk
from mosaic_jax.plan.chips import CHIPS, Chip
from mosaic_jax.plan.tables import TopologyPlan
from mosaic_jax.sweep import launch
from mosaic_jax.types import Dataset, UserError, unknown_name

IMAGES = {
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "svhn": (73_257, 26_032),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "tiny_imagenet": (100_000, 10_000),
    "food101": (75_750, 25_250),
}
"""Numbers of training and test images of the published sets."""

COMPILERS = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}
"""The package with the compiler of each kind of chip, installed by the extra of the kind's name."""

ROOM = 100
"""Minimum ratio of average to smallest client size for a Dirichlet split. Below it, draws without
a client that is too small are too rare."""


def dataset(config: Config) -> Dataset:
    """Return black images and evenly spread labels, of the shape and number of the config's set.

    Raises:
      UserError: there is no such set, or it has no fixed shape.
    """
    about, data = catalog.SETS.get(config.data.name), config.data
    if about is None:
        if data.name not in ("digits", "synthetic"):
            known = sorted([*catalog.SETS, "digits", "synthetic"])
            raise UserError(unknown_name("data set", data.name, known))
        return sources.load(
            data.name,
            image_size=data.image_size,
            train_images=data.train_images,
            test_images=data.test_images,
            seed=config.seed,
        )
    size, channels = data.image_size or about.sizes[0], len(about.mean)
    given = zip((data.train_images, data.test_images), IMAGES[about.name], strict=True)
    train, test = (count or whole for count, whole in given)

    def labels(count: int) -> np.ndarray:
        return (np.arange(count) % about.num_classes).astype(np.int32)

    def images(count: int) -> np.ndarray:
        return np.zeros((count, size, size, channels), np.uint8)

    return Dataset(
        about.name,
        images(train),
        labels(train),
        images(test),
        labels(test),
        about.num_classes,
        about.mean,
        about.std,
    )


def settings_of(
    arguments: argparse.Namespace, clients: int, dtype: str, lanes: int | None
) -> tuple[Config, list[str]]:
    """Return the config's settings for a number of clients, and notes on what had to change.

    Raises:
      UserError: there is no such config or setting, or its value is wrong.
    """
    changes = {"partition.clients": clients, "model.dtype": dtype} | dict(arguments.set)
    config = _config(arguments.config, changes)
    notes, split = [], config.partition
    images = config.data.train_images or IMAGES.get(config.data.name, (None,))[0]
    if split.kind == "dirichlet" and images and images < ROOM * split.minimum * clients:
        notes.append(
            f"{images} images are too few for a Dirichlet({split.alpha:g}) split over {clients} "
            f"clients with {split.minimum} each: partition.kind = iid"
        )
        changes["partition.kind"] = "iid"
    known = IMAGES.get(config.data.name, (images,))[0]
    if images and known and images > known:
        notes.append(f"{config.data.name} has {known} images; here it has {images}")
    if config.model.conv == "auto":
        changes["model.conv"] = "native"  # what "auto" is on TPUs and GPUs
    if config.model.dtype == "auto":
        changes["model.dtype"] = "bfloat16"  # the same
    if lanes is not None:
        changes["parallel.lanes"] = lanes
    return _config(arguments.config, changes), notes


def _config(given: str, changes: dict[str, Any]) -> Config:
    name, _, options = given.partition(":")
    for setting in changes:
        if setting not in settings.names():
            raise UserError(unknown_name("setting", setting, settings.names()))
    try:
        return launch.configure(launch.get_config(name), options, 0, changes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from None


def topology_mesh(topology: str, count: int | None) -> tuple[Chip, Mesh]:
    """Return the kind of a topology's chips and a mesh of one axis over them.

    Args:
      topology: the compiler's name of a TPU slice, as `v5e:16x16`, or GPUs of a host, as `h100:8`.
      count: how many of its chips to use; None uses all.

    Raises:
      UserError: there is no compiler, or it knows no such topology.
    """
    family, _, size = topology.partition(":")
    chip = CHIPS.get(family)
    if chip is None:
        raise UserError(unknown_name("chip", family, CHIPS))
    if chip.platform == "gpu" and size not in chip.topologies.values():
        known = [f"{family}:{each}" for each in chip.topologies.values()]
        raise UserError(unknown_name("topology", topology, known))
    package = COMPILERS[chip.platform]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed; pip install '.[{chip.platform}]'")
    try:
        devices = (
            gpus.devices(family, int(size))
            if chip.platform == "gpu"
            else compat.absent_devices(topology, "tpu")
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the compiler knows no topology {topology!r}: {reason}") from None
    return chip, Mesh(np.array(devices[:count]), (parallel.AXIS,))


def plan_topology(
    arguments: argparse.Namespace, chip: Chip, mesh: Mesh, clients: int, dtype: str
) -> TopologyPlan:
    """Plan the method on a topology; halve the lanes as long as a stage does not fit."""
    lanes: int | None = None
    tried: list[str] = []
    while True:
        config, notes = settings_of(arguments, clients, dtype, lanes)
        record = Record(arguments.cache, _progress, chip.memory)
        one_device = Mesh(np.array(jax.devices("cpu")[:1]), (parallel.AXIS,))
        here = dataclasses.replace(parallel.Layout.of(config.parallel), mesh=one_device)
        built = build_federation(config, dataset(config), here)
        federation = abstract_federation(built, mesh, record)
        stages, _ = walk(federation, arguments.until, arguments.evaluation)
        unfit = [each for each in record.programs if not each.figures.fits]
        now = parallel.lanes_for(config.parallel.lanes, clients, mesh)
        if federation.batch_size < config.local_update.batch_size:
            size = federation.batch_size
            notes.append(f"no client holds more than {size} images: local steps are of {size}")
        notes += _without_triton(record.programs)
        found = TopologyPlan(chip, mesh.size, config, stages, record.programs, notes + tried)
        if not unfit or now == 1 or arguments.keep_lanes:
            return found
        names = ", ".join(dict.fromkeys(each.stage for each in unfit))
        lanes = now // 2
        tried.append(f"{now} lanes do not fit in {names}: parallel.lanes = {lanes}")


def _without_triton(programs: list[Program]) -> list[str]:
    """Return a note on the programs that were compiled a second time, without Triton."""
    left = dict.fromkeys(
        f"{each.stage} {each.phase}" for each in programs if not each.figures.triton
    )
    if not left:
        return []
    return [
        f"matrix products by cuBLAS alone: {', '.join(left)}. Triton's tiling does not suit a "
        "product there; a GPU's own compiler tries cuBLAS, too, one without a GPU does not"
    ]


def _progress(program: Program) -> None:
    held = program.figures.held / 2**30
    line = f"{program.stage}: {program.phase} {program.name}, {held:.2f} GiB"
    print(line, file=sys.stderr, flush=True)
