"""How clients run and where arrays lie: client map, layout, several hosts, stacks on disk."""

from mosaic_jax.parallel.client_map import (
    map_clients,
    padding_fraction,
    reduce_clients,
    take_clients,
)
from mosaic_jax.parallel.devices import (
    AXIS,
    CHUNK,
    apply_in_chunks,
    available_devices,
    client_sharding,
    lanes_for,
    make_mesh,
    put_replicated,
    set_up_jax,
    to_host,
)
from mosaic_jax.parallel.layout import Layout

__all__ = [
    "AXIS",
    "CHUNK",
    "Layout",
    "apply_in_chunks",
    "available_devices",
    "client_sharding",
    "lanes_for",
    "make_mesh",
    "map_clients",
    "padding_fraction",
    "put_replicated",
    "reduce_clients",
    "set_up_jax",
    "take_clients",
    "to_host",
]
