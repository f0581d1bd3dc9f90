"""FedAvg in other frameworks, for `experiments.speed.compare_frameworks`.

Each worker is a program that runs in its framework's own environment, which has PyTorch but not
JAX: `flower_worker.py` and `pfl_worker.py`. Both train the model of
`experiments.speed.pytorch_baseline`. `fedavg.py` holds what they share, `work.py` what they get,
and `cases.py` makes it.
"""
