"""Triton kernels and their launchers, without autograd, in one file per method.

``common`` and ``angles`` hold the parts that these files share. Nothing is imported here: the package must be
importable without Triton, and an op imports its kernels when it first uses them. The tests compile every kernel ahead
of time, for the constants and GPUs that tests/aot/ lists.
"""
