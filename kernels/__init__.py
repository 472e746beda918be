"""Triton kernels and their launchers, without autograd; one file per idea, named as in every other layer.

Nothing is imported here: this package must be importable without Triton, and the ops import a kernel at its first use.
A module lists in ``AOT_VARIANTS`` how each kernel is compiled, and the ahead-of-time tests build every one of them.
"""
