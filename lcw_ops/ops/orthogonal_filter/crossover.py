"""The fastest kernel of the orthogonal-filter recurrence at a width, measured per GPU generation.

``make gpu PART=crossover`` measures, writes bench/results/<generation>-<date>-crossover.csv and prints the line for
``MEASURED``. Commit the file with that line.
"""

# (kernel, widest row for which it is the fastest), in the order of width. The last one has no limit. Until a generation
# is measured, the limits of the design apply: a layer fits into one program's registers (triton), into a cluster's
# shared memory (cuda), or into neither (graph).
Table = tuple[tuple[str, int | None], ...]
DEFAULT: Table = (("triton", 128), ("cuda", 512), ("graph", None))
MEASURED: dict[tuple[int, int], Table] = {}


def get_table(capability: tuple[int, int]) -> Table:
    return MEASURED.get(capability, DEFAULT)


def fastest_kernel(width: int, capability: tuple[int, int]) -> str:
    """Returns "triton", "cuda" (which itself chooses between clusters and rows) or "graph"."""
    return next(kernel for kernel, widest in get_table(capability) if widest is None or width <= widest)
