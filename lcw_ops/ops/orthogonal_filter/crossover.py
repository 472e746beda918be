"""The fastest kernel of the orthogonal-filter recurrence at a width, measured per GPU generation.

``make gpu PART=crossover`` measures, writes bench/results/<generation>-<date>-crossover.csv and prints the line for
``MEASURED``. Commit the file with that line.
"""

# (kernel, widest row for which it is the fastest), in the order of width in float32. The last one has no limit. A
# float64 row counts as a float32 row twice as wide. Until a generation is measured, the limits of the design apply: a
# layer fits into one program's registers (triton), into the shared memory of a block or cluster (cuda), or into neither
# (graph).
Table = tuple[tuple[str, int | None], ...]
DEFAULT: Table = (("triton", 128), ("cuda", 512), ("graph", None))
# With clusters, "cuda" is predicted to be the faster of the two from 65 units on. Counted for sm_90, a layer of 128
# samples and a dense filter, forward:
#     units                                      32        64        96       128
#     triton: cycles of shared memory           166       652     2,584     2,584    (of 96 units it pads a tile of 128)
#             instructions of a scheduler       286       455     1,634     1,612
#             microseconds at 1.8 GHz           0.3       0.5       1.5       1.5
#     cluster: cycles of shared memory          224       320       370       512
#              microseconds                     0.6       0.7       0.7       0.8
# Triton's figures are those at the head of kernels/orthogonal_filter.py. A cluster's block takes up to 1,200
# instructions of a scheduler, two barriers and, from 33 units on, one exchange between multiprocessors (assumed to take
# 0.15 us). Backward without dW, shared memory alone takes Triton 3.2 us at 128 units, and a cluster should take 1.5 us.
# All times are predicted, not measured: MEASURED overrides them, and a verdict of `lcw-ops verify` decides
# which kernels may be chosen at all.
CLUSTERS: Table = (("triton", 64), ("cuda", 512), ("graph", None))
FIRST_WITH_CLUSTERS = (9, 0)
MEASURED: dict[tuple[int, int], Table] = {}


def get_table(capability: tuple[int, int], itemsize: int = 4) -> Table:
    """The table of a GPU generation for a state of ``itemsize`` bytes per number. Clusters are for float32."""
    has_clusters = capability >= FIRST_WITH_CLUSTERS and itemsize == 4
    return MEASURED.get(capability, CLUSTERS if has_clusters else DEFAULT)


def fastest_kernel(width: int, capability: tuple[int, int], itemsize: int = 4) -> str:
    """Returns "triton", "cuda" (which itself chooses between clusters and rows) or "graph"."""
    counted, table = width * itemsize // 4, get_table(capability, itemsize)
    return next(kernel for kernel, widest in table if widest is None or counted <= widest)
