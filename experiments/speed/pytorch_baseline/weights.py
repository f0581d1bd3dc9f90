"""Load a Flax variables tree into a PyTorch module of the same architecture.

The networks of this folder have the names of the Flax tree, so only layouts differ. Only the meta
model's transformer is PyTorch's own and has other names.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LEAVES = {"scale": "weight", "kernel": "weight", "mean": "running_mean", "var": "running_var"}
TRANSFORMER = {
    "encoder": "transformer.encoder.layers.0",
    "encoder_norm": "transformer.encoder.norm",
    "decoder": "transformer.decoder.layers.0",
    "decoder_norm": "transformer.decoder.norm",
}
INSIDE = {
    "self_attention": "self_attn",
    "self_attention.out": "self_attn.out_proj",
    "cross_attention": "multihead_attn",
    "cross_attention.out": "multihead_attn.out_proj",
    "feedforward.hidden": "linear1",
    "feedforward.out": "linear2",
}


def load(module: nn.Module, variables: Mapping[str, Any]) -> nn.Module:
    """Set all weights and running statistics.

    Args:
      module: a network of this folder, in eval mode if it tracks statistics. The discriminator
        tracks none; those in the tree are left out.
      variables: Flax collections of arrays, "params" and, where there are any, "batch_stats".

    Raises:
      KeyError: a weight is missing, or is in the tree but not in the module.
    """
    entries, state = convert(module, variables), module.state_dict()
    entries = {n: value for n, value in entries.items() if n in state or "running_" not in n}
    if entries.keys() != state.keys():
        raise KeyError(f"these are not in both: {sorted(entries.keys() ^ state.keys())}")
    state.update(entries)
    module.load_state_dict(state)
    return module


def convert(module: nn.Module, variables: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tree as a state dict of `module`; gradients go under "params", as weights do."""
    state = {}
    for collection in ("params", "batch_stats"):
        for path, leaf in _flat(variables.get(collection, {})):
            where = _where(path[:-1])
            layer = module.get_submodule(where)
            value = np.asarray(leaf, np.float32)
            value = _kernel(layer, value) if path[-1] == "kernel" else value
            name = LEAVES.get(path[-1], path[-1])
            if isinstance(layer, nn.MultiheadAttention):
                name = f"in_proj_{name}"
            state[f"{where}.{name}".lstrip(".")] = torch.from_numpy(np.array(value))
    return state


def _flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*path, name))
        else:
            yield (*path, name), value


def _where(path: tuple[str, ...]) -> str:
    """Return the name of the module at this path of the Flax tree."""
    if not path or path[0] not in TRANSFORMER:
        return ".".join(path)
    inside = ".".join(path[1:])
    return ".".join(filter(None, [TRANSFORMER[path[0]], INSIDE.get(inside, inside)]))


def _kernel(layer: nn.Module, value: np.ndarray) -> np.ndarray:
    if isinstance(layer, nn.ConvTranspose2d):  # PyTorch flips the kernel, `lax` does not
        return value[::-1, ::-1].transpose(2, 3, 0, 1)
    if isinstance(layer, nn.Conv2d):
        return value.transpose(3, 2, 0, 1)
    return value.T
