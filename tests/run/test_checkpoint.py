"""Checkpoints: what was saved comes back bit for bit, and damage is seen and walked back over."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.run import checkpoint
from mosaic_jax.run.checkpoint import KEPT, StageCheckpoints, checksum
from mosaic_jax.stages.federated_round import RoundState
from mosaic_jax.stages.generator_optimization import WaveState
from mosaic_jax.stages.generator_state import GeneratorState
from mosaic_jax.stages.knowledge_distillation import StudentState
from mosaic_jax.stages.model_aggregation import Aggregated
from mosaic_jax.stages.prototypes import Prototypes
from mosaic_jax.stages.server_distillation import ServerState
from mosaic_jax.types import UserError

OPTIMIZER = optax.chain(optax.add_decayed_weights(1e-4), optax.adam(1e-3))


def carry(block):
    """What a stage carries: models, statistics, optimiser and average, different for each block."""
    generator = np.random.default_rng(block)
    params = {
        "kernel": jnp.asarray(generator.standard_normal((64, 33)), jnp.float32),
        "bias": jnp.asarray(generator.standard_normal(33), jnp.float32),
    }
    _, adam = OPTIMIZER.update(params, OPTIMIZER.init(params), params)
    _, ema = optax.ema(0.9, debias=True).update(params, optax.ema(0.9).init(params))
    return {
        "variables": {"params": params, "batch_stats": {"mean": jnp.full((33,), 1e-30)}},
        "optimizer": adam,
        "ema": ema,
        "half": params["bias"].astype(jnp.bfloat16),
        "step": jnp.int32(block),
    }


def shapes():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: carry(0)),
    )


def save(folder, *blocks):
    checkpoints = StageCheckpoints(folder)
    for block in blocks:
        checkpoints.save(block, carry(block))
    checkpoints.close()


def restore(folder):
    checkpoints = StageCheckpoints(folder)
    restored = checkpoints.restore(shapes())
    checkpoints.close()
    return restored


def assert_is_block(restored, block):
    assert restored is not None
    assert restored[0] == block
    expected = carry(block)
    assert jax.tree.structure(restored[1]) == jax.tree.structure(expected)
    for got, saved in zip(jax.tree.leaves(restored[1]), jax.tree.leaves(expected), strict=True):
        assert got.dtype == saved.dtype
        assert np.asarray(got).tobytes() == np.asarray(saved).tobytes()


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "stage"
    save(folder, 3, 4)
    return folder


@pytest.fixture
def damaged(two_blocks, tmp_path):
    """A copy of a folder with the blocks 3 and 4, to be damaged."""
    return shutil.copytree(two_blocks, tmp_path / "stage")


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def data_file(folder):
    """The file that holds the arrays: the largest."""
    return max(files(folder), key=lambda path: path.stat().st_size)


def flip(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"truncated": truncate, "flipped byte": flip, "deleted": lambda path: path.unlink()}


def test_a_carry_with_optimiser_states_comes_back_bit_for_bit(tmp_path):
    save(tmp_path / "stage", 7)
    assert_is_block(restore(tmp_path / "stage"), 7)


def test_the_newest_two_are_kept(tmp_path):
    save(tmp_path / "stage", 1, 2, 5, 6)
    names = {path.name for path in (tmp_path / "stage").iterdir() if path.is_dir()}
    assert KEPT == 2
    assert names == {"5", "6"}
    assert_is_block(restore(tmp_path / "stage"), 6)


def test_an_empty_folder_holds_nothing(tmp_path):
    assert restore(tmp_path / "stage") is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_data_file_leads_back_to_the_one_before(damaged, damage, caplog):
    DAMAGES[damage](data_file(damaged / "4"))
    with caplog.at_level(logging.WARNING, logger="mosaic_jax"):
        assert_is_block(restore(damaged), 3)
    own = [each for each in caplog.records if each.name.startswith("mosaic_jax")]
    assert len(own) == 1
    assert f"passed over checkpoint {damaged}/4" in own[0].getMessage()


@pytest.mark.parametrize("position", [0.1, 0.3, 0.6, 0.9])
def test_a_flipped_byte_anywhere_in_the_arrays_is_seen(damaged, position):
    path = data_file(damaged / "4")
    flip(path, int(position * path.stat().st_size))
    assert_is_block(restore(damaged), 3)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_never_gives_wrong_numbers(two_blocks, damage, tmp_path):
    """Whichever file it hits, the newest comes back whole or the one before does."""
    number = len(files(two_blocks / "4"))
    assert number > 3
    walked_back = 0
    for i in range(number):
        folder = shutil.copytree(two_blocks, tmp_path / f"{i}")
        DAMAGES[damage](files(folder / "4")[i])
        restored = restore(folder)
        assert restored is not None
        assert_is_block(restored, restored[0])
        walked_back += restored[0] == 3
    assert walked_back > 0


def test_a_missing_folder_leads_back_to_the_one_before(damaged):
    shutil.rmtree(damaged / "4")
    assert_is_block(restore(damaged), 3)


def test_a_half_written_save_is_no_checkpoint(damaged):
    (damaged / "4").rename(damaged / "4.orbax-checkpoint-tmp")
    assert_is_block(restore(damaged), 3)


def test_nothing_whole_gives_none(damaged, caplog):
    for block in "34":
        truncate(data_file(damaged / block))
    with caplog.at_level(logging.WARNING, logger="mosaic_jax"):
        assert restore(damaged) is None
    text = caplog.text
    assert f"{damaged}/4" in text
    assert f"{damaged}/3" in text


@pytest.mark.parametrize("damage", DAMAGES)
def test_saving_over_a_damaged_block_replaces_it(damaged, damage):
    DAMAGES[damage](data_file(damaged / "4"))
    checkpoints = StageCheckpoints(damaged)
    assert_is_block(checkpoints.restore(shapes()), 3)
    checkpoints.save(4, carry(4))
    checkpoints.save(5, carry(5))
    checkpoints.close()
    assert_is_block(restore(damaged), 5)
    DAMAGES[damage](data_file(damaged / "5"))
    assert_is_block(restore(damaged), 4)


def test_a_checkpoint_of_another_shape_is_passed_over(damaged):
    checkpoints = StageCheckpoints(damaged)
    other = shapes()
    other["half"] = jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=other["half"].sharding)
    assert checkpoints.restore(other) is None
    checkpoints.close()


def test_a_checkpoint_of_another_version_is_passed_over(tmp_path, monkeypatch, caplog):
    save(tmp_path / "stage", 1)
    monkeypatch.setattr(checkpoint, "SCHEMA_VERSION", checkpoint.SCHEMA_VERSION + 1)
    save(tmp_path / "stage", 2)
    assert_is_block(restore(tmp_path / "stage"), 2)
    monkeypatch.undo()
    assert_is_block(restore(tmp_path / "stage"), 1)
    assert "another version" in caplog.text


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/stage cannot be written: .*; those before it are"):
        StageCheckpoints(tmp_path / "file" / "stage")


@pytest.mark.parametrize(
    "damage",
    [
        lambda a: a * np.where(np.arange(a.size) < 2, -1, 1),  # two signs
        lambda a: -a,
        lambda a: np.roll(a, 256),
        lambda a: np.where(np.arange(a.size) == 3, np.nextafter(a, np.float32(9)), a),
        lambda a: np.concatenate([a[256:257], a[1:256], a[:1], a[257:]]),  # two places
    ],
)
def test_the_checksum_sees_numbers_that_change_or_move(damage):
    array = np.tile(np.array([1.0, 2.0], np.float32), 256)
    array[256:] = 3 - array[256:]
    changed = damage(array).astype(np.float32)
    assert (changed != array).any()
    assert checksum({"a": changed}) != checksum({"a": array})


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint32, np.float32, jnp.bfloat16])
def test_the_checksum_is_of_any_type_and_shape(dtype):
    shapes = ((), (2, 3), (3, 2), (0,))
    assert len({checksum([np.zeros(shape, dtype)]) for shape in shapes}) == 4
    assert checksum([np.ones(3, dtype)]) != checksum([np.zeros(3, dtype)])


@pytest.mark.parametrize(
    "carry",
    [
        RoundState(model=0, own=1, server=2),
        ServerState(average=0, generator=1, optimizer=2),
        Aggregated(client_models=0, experts=1, model=2),
        Prototypes(features=0, labels=1, valid=2),
        StudentState(optimizer=0, student=1),
        WaveState(
            GeneratorState(
                adversary=0,
                adversary_optimizer=1,
                average=2,
                distance=3,
                frozen=4,
                generator=5,
                generator_optimizer=6,
                ema_batch_stats=7,
            ),
            distances=8,
            uploaded=9,
        ),
    ],
    ids=lambda carry: type(carry).__name__,
)
def test_leaves_stand_in_the_order_in_which_they_are_saved(carry):
    """Checkpoints hold leaves by number: another order would read one array as another."""
    assert jax.tree.leaves(carry) == sorted(jax.tree.leaves(carry))
