"""The teacher: a mixture of class-wise experts whose logits a meta model fuses (paper, Figure 1c).

Expert c is the mean of the clients' models weighted by how many images of class c each trained on:
theta_c = sum_i n_ic theta_i / sum_i n_ic. Classes with equal weight rows share one expert, so the
teacher evaluates `members`, the different models, and `class_expert_logits` says which of their
logits (or which mean of them) each class's expert has. With `model_aggregation.global_expert` the
mean of all clients, each weighted by n_i, is one expert more (not in the paper).
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from mosaic_jax.federation import Federation
from mosaic_jax.models import MetaModel
from mosaic_jax.parallel import apply_in_chunks
from mosaic_jax.types import Array, PyTree, UserError, Variables

ATTENTION_BYTES = 1 << 30
"""Maximum size of the attention weights of the images that a device fuses at a time; those of one
image with 200 classes and as many heads are 32 MB."""


class Teacher(struct.PyTreeNode):
    """Variables of the teacher.

    Attributes:
      members: the different experts' variables, [members, ...].
      meta: the meta model's variables; None for the ensembles that have none.
    """

    members: Variables
    meta: PyTree = None


TeacherFunction = Callable[[Teacher, Array], Array]
"""(teacher, images [batch, h, w, c]) -> logits [batch, classes]."""


def expert_weights(
    class_counts: np.ndarray, global_expert: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the mixing matrix, and which row each expert uses.

    Args:
      class_counts: images n_ic, [clients, classes].
      global_expert: whether the mean of all clients is one expert more, the last.

    Returns:
      Different weight rows, float32 [members, clients], each summing to 1, and int32 [experts], one
      a class. A class nobody holds gets the global mean's row.
    """
    sizes = class_counts.sum(axis=1, keepdims=True)
    shares = np.where(class_counts.sum(axis=0) > 0, class_counts, sizes).astype(np.float64)
    if global_expert:
        shares = np.concatenate([shares, sizes], axis=1)
    shares /= shares.sum(axis=0)
    rows, assignment = np.unique(shares.T.astype(np.float32), axis=0, return_inverse=True)
    return rows, assignment.reshape(-1).astype(np.int32)


def experts_of(federation: Federation) -> tuple[np.ndarray, np.ndarray]:
    """Return the federation's `expert_weights`."""
    return expert_weights(
        federation.clients.class_counts, federation.config.model_aggregation.global_expert
    )


def averages_parameters(federation: Federation) -> bool:
    """Return whether experts are averages of parameters, rather than of logits."""
    mode = federation.config.model_aggregation.expert_mode
    return mode == "parameters" or (mode == "auto" and not federation.has_submodels)


def member_logits(federation: Federation) -> Callable[[Variables, Array], Array]:
    """Return `(members [members, ...], images) -> logits [batch, members, classes]`.

    It is one batched call; the members are sharded over the devices like clients.
    """
    layout = federation.layout

    def one_member(images: Array, member: Variables) -> Array:
        def logits(part: Array) -> Array:
            return federation.classifier.apply_eval(member, part).logits

        return apply_in_chunks(logits, images, layout.mesh)

    mapped = layout.map_clients(one_member)

    def logits(members: Variables, images: Array) -> Array:
        return jnp.swapaxes(mapped(images, members), 0, 1)

    return logits


def mixture(federation: Federation) -> Callable[[Array], Array]:
    """Return the map from members' to experts' logits.

    Logits [..., members, classes] become [..., experts, classes].
    """
    rows, assignment = experts_of(federation)
    if averages_parameters(federation):
        return lambda logits: logits[..., assignment, :]
    mixing = rows[assignment]
    return lambda logits: jnp.einsum("em,...mc->...ec", mixing, logits, precision="highest")


def class_expert_logits(federation: Federation) -> TeacherFunction:
    """Return `(teacher, images) -> logits [batch, experts, classes]`; experts come by class."""
    logits, mix = member_logits(federation), mixture(federation)
    return lambda teacher, images: mix(logits(teacher.members, images))


def build_meta_model(federation: Federation) -> MetaModel:
    """Build the meta model for one expert a class, and the global one if there is one.

    Raises:
      UserError: its heads do not divide its width.
    """
    settings, classes = federation.config.meta_model, federation.dataset.num_classes
    if settings.heads and settings.width_per_class * classes % settings.heads:
        raise UserError(
            f"meta_model.heads = {settings.heads} does not divide the model's width, "
            f"meta_model.width_per_class * classes = {settings.width_per_class * classes}"
        )
    return MetaModel(
        num_classes=classes,
        experts=classes + federation.config.model_aggregation.global_expert,
        width_per_class=settings.width_per_class,
        heads=settings.heads or None,
        feedforward=settings.feedforward,
        dropout=settings.dropout,
        expert_embedding=settings.expert_embedding,
    )


def fusion(federation: Federation) -> Callable[[PyTree, Array], Array]:
    """Return `(meta, experts' logits [batch, experts, classes]) -> logits [batch, classes]`.

    The meta model fuses each device's share of the images.
    """
    layout, fuse = federation.layout, _in_chunks(build_meta_model(federation))

    def fused(meta: PyTree, tokens: Array) -> Array:
        chex.assert_rank(tokens, 3)
        where = layout.client_sharding(len(tokens)).spec
        if layout.debug or where == P():
            return fuse(meta, tokens)
        sharded = jax.shard_map(
            fuse, mesh=layout.mesh, in_specs=(P(), where), out_specs=where, check_vma=False
        )
        return cast(Array, sharded(meta, tokens))

    return fused


def teacher_logits(federation: Federation) -> TeacherFunction:
    """Return the mixture-of-experts teacher: t(x) = meta(f_1(x), ..., f_C(x)).

    A member's logits are computed on its device.
    """
    experts, fuse = class_expert_logits(federation), fusion(federation)
    return lambda teacher, images: fuse(teacher.meta, experts(teacher, images))


def _in_chunks(model: MetaModel) -> Callable[[PyTree, Array], Array]:
    """Return `(meta, tokens [batch, experts, classes]) -> logits`, in chunks that fit in memory."""
    heads = model.heads or model.num_classes
    chunk = max(1, ATTENTION_BYTES // (4 * heads * model.experts**2))

    def fuse(meta: PyTree, tokens: Array) -> Array:
        if len(tokens) <= chunk:
            return cast(Array, model.apply(meta, tokens))
        one = partial(model.apply, meta)
        return cast(Array, jax.lax.map(lambda image: one(image[None])[0], tokens, batch_size=chunk))

    return fuse


def uniform_logits(federation: Federation) -> TeacherFunction:
    """Return the plain ensemble: the mean of all class experts' logits (as in DENSE and DFRD)."""
    experts, classes = class_expert_logits(federation), federation.dataset.num_classes
    return lambda teacher, images: experts(teacher, images)[:, :classes].mean(axis=1)


def per_class_logits(federation: Federation) -> TeacherFunction:
    """Return the experts without a meta model: each class's logit is that of its own expert."""
    experts = class_expert_logits(federation)

    def own(teacher: Teacher, images: Array) -> Array:
        return jnp.diagonal(experts(teacher, images), axis1=1, axis2=2)

    return own


TEACHERS = {"meta": teacher_logits, "own": per_class_logits, "uniform": uniform_logits}
"""The values of `knowledge_distillation.teacher`."""
