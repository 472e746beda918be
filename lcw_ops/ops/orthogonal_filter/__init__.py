"""The recurrence: ``op`` (schemas, autograd, choice of the kernel), ``graph`` (torch's products in a CUDA graph) and
``crossover`` (where measurements found which kernel the faster)."""

from lcw_ops.ops.orthogonal_filter import crossover, op

__all__ = ["crossover", "op"]
