"""Mosaic as a good PyTorch user would write it, for `experiments.speed.compare_pytorch`.

It is an eager loop over clients: channels-last, tensors in memory, fused optimisers. It fetches
nothing from the device between steps and needs no autograd through the teacher or the generators.
Architectures, losses, optimisers and settings are those of `mosaic_jax`; tests compare them. The
stages take their batches and noise as arguments, so that both sides can get the same; `pipeline.py`
draws its own. Nothing here imports JAX.
"""
