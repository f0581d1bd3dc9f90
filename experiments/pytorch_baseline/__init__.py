"""Mosaic as a good PyTorch user would write it: what `experiments.compare_pytorch` compares with.

An eager loop over clients; channels-last; tensors in memory; fused optimisers; nothing fetched from
the device between steps; no autograd through the teacher or the generators. Architectures, losses,
optimisers and settings are those of `mosaic_jax` (`tests/test_pytorch_parity.py`). The stages take
their batches and noise as arguments, so that both sides can be given the same; `pipeline.py` draws
its own. Nothing here imports JAX.
"""
