"""Triton kernels and their launchers, without autograd, in one file per stem.

``common`` and ``angles`` hold the parts that these files share. Nothing is imported here: the package must be
importable without Triton, and an op imports its kernels when it first uses them. Every kernel has a variant in
tests/aot/, which the tests compile ahead of time.
"""
