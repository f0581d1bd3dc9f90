"""Meta model that fuses the experts' logits into the teacher's (methods, sections 3 and 8).

The meta model is a small post-norm transformer whose tokens are the experts. The reference cannot
tell the experts apart, because it uses one embedding for all and pools over tokens. Here each
expert has a learned vector, `expert_embedding`.
"""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.models.layers import Dense, normal, xavier_uniform
from mosaic_jax.types import Array


class MetaModel(nn.Module):
    """Transformer from expert logits to fused logits.

    It has one encoder and one decoder layer with the same tokens as source and target. Tokens are
    pooled by their mean. The reference sums ten tokens and averages a hundred. The next layer is
    linear, so the two differ only in the scale of its learning rate. With the mean, logits are
    comparable for any number of experts.

    Attributes:
      num_classes: number of classes, C.
      experts: number of experts, which are the tokens.
      width_per_class: the model is `width_per_class * C` wide.
      heads: attention heads; None means C, as in the reference.
      feedforward: hidden width of the position-wise network.
      dropout: rate, everywhere `torch.nn.Transformer` has it.
      expert_embedding: whether every expert has a learned vector.
    """

    num_classes: int
    experts: int
    width_per_class: int = 10
    heads: int | None = None
    feedforward: int = 2048
    dropout: float = 0.2
    expert_embedding: bool = True

    @nn.compact
    def __call__(self, expert_logits: Array, train: bool = False) -> Array:
        """Fuse `[batch, experts, classes]` to logits `[batch, classes]`.

        Training needs the rng `dropout`.
        """
        # A single expert would broadcast against the embeddings of all without an error.
        chex.assert_shape(expert_logits, (None, self.experts, self.num_classes))
        width, heads = self.width_per_class * self.num_classes, self.heads or self.num_classes
        tokens = Dense(width, name="embed")(expert_logits)
        if self.expert_embedding:
            tokens += self.param("expert_embedding", normal(1.0), (self.experts, width))
        settings = (heads, self.feedforward, self.dropout)
        memory = EncoderLayer(*settings, name="encoder")(tokens, train)
        memory = _layer_norm("encoder_norm")(memory)
        decoded = DecoderLayer(*settings, name="decoder")(tokens, memory, train)
        decoded = _layer_norm("decoder_norm")(decoded)
        return Dense(self.num_classes, name="head")(decoded.mean(axis=1))


class EncoderLayer(nn.Module):
    """Self-attention and a position-wise network, each followed by a layer norm."""

    heads: int
    feedforward: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map `[batch, tokens, width]` to the same shape."""
        attend = Attention(self.heads, self.dropout, name="self_attention")
        x = _layer_norm("norm1")(x + attend(x, x, train))
        work = FeedForward(self.feedforward, self.dropout, name="feedforward")
        return _layer_norm("norm2")(x + work(x, train))


class DecoderLayer(nn.Module):
    """Self-attention, attention over the encoder's output, and a position-wise network."""

    heads: int
    feedforward: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, memory: Array, train: bool) -> Array:
        """Map two arrays `[batch, tokens, width]` to one of the same shape."""
        attend = Attention(self.heads, self.dropout, name="self_attention")
        x = _layer_norm("norm1")(x + attend(x, x, train))
        consult = Attention(self.heads, self.dropout, name="cross_attention")
        x = _layer_norm("norm2")(x + consult(x, memory, train))
        work = FeedForward(self.feedforward, self.dropout, name="feedforward")
        return _layer_norm("norm3")(x + work(x, train))


class Attention(nn.Module):
    """Multi-head scaled dot-product attention with dropout on its weights and its output."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, memory: Array, train: bool) -> Array:
        """Attend from `x` `[batch, queries, width]` to `memory` `[batch, keys, width]`."""
        width = x.shape[-1]
        # The Xavier bound depends on the shape, so one matrix holds all three projections, as in
        # PyTorch.
        kernel = self.param("kernel", xavier_uniform, (width, 3 * width)).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (3 * width,)).astype(x.dtype)
        query = self._split(x @ kernel[:, :width] + bias[:width])
        key, value = jnp.split(memory @ kernel[:, width:] + bias[width:], 2, axis=-1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, self._split(key))
        weights = jax.nn.softmax(scores / math.sqrt(width // self.heads))
        weights = nn.Dropout(self.dropout, deterministic=not train)(weights)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, self._split(value)).reshape(x.shape)
        mixed = Dense(width, xavier_uniform, nn.initializers.zeros, name="out")(mixed)
        return nn.Dropout(self.dropout, deterministic=not train)(mixed)

    def _split(self, x: Array) -> Array:
        """Split the last axis into heads: `[batch, tokens, heads, width / heads]`."""
        return x.reshape(*x.shape[:2], self.heads, -1)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them, applied to every token."""

    features: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map `[batch, tokens, width]` to the same shape."""
        hidden = nn.relu(Dense(self.features, xavier_uniform, name="hidden")(x))
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        y = Dense(x.shape[-1], xavier_uniform, name="out")(hidden)
        return nn.Dropout(self.dropout, deterministic=not train)(y)


def _layer_norm(name: str) -> nn.LayerNorm:
    """Return a layer norm with PyTorch's epsilon."""
    return nn.LayerNorm(epsilon=1e-5, name=name)
