"""Which kernel of the orthogonal-filter recurrence is the fastest at a width: measured per GPU generation.

``make gpu PART=crossover`` measures, writes bench/results/<generation>-<date>-crossover.csv and prints the line to put
into ``MEASURED``; the file is committed with it.
"""

# (kernel, widest row it is the fastest for), in the order of width; the last one has no limit. Before anything is
# measured, the design's limits: a layer in one program's registers, a layer in a cluster's shared memory, neither.
Table = tuple[tuple[str, int | None], ...]
DEFAULT: Table = (("triton", 128), ("cuda", 512), ("graph", None))
MEASURED: dict[tuple[int, int], Table] = {}


def get_table(capability: tuple[int, int]) -> Table:
    return MEASURED.get(capability, DEFAULT)


def fastest_kernel(width: int, capability: tuple[int, int]) -> str:
    """ "triton", "cuda" (by clusters or by rows, which it chooses itself) or "graph"."""
    return next(kernel for kernel, widest in get_table(capability) if widest is None or width <= widest)
