"""stub"""
from mosaic_jax.methods.fedavg import stages  # noqa
