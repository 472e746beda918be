"""Experiments on the papers' claims, one module per method: ``python -m lcw_ops.bench.reproduce.<module>``."""
