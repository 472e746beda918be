"""All layers at once: ``op`` (schemas, autograd), ``solver`` (Picard sweeps), ``frame`` (the filter's powers) and
``crossover`` (where measurements found the sweeps the faster)."""

from lcw_ops.ops.parallel_depth import crossover, frame, op, solver

__all__ = ["crossover", "frame", "op", "solver"]
