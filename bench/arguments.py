"""The arguments of ``lcw-ops bench``. This module does not import torch, so the command's help is quick."""

import argparse
from pathlib import Path

# The names of the methods (stems). Each is a module of this package with cases(device_type).
STEMS = ("gradient_activation", "hypersphere", "lcw_linear", "orthogonal_filter", "parallel_depth", "weight_norm")

# The fewest pairs of processes of a comparison with --base. Ten pairs allow one ratio to be an outlier on either side.
MIN_PAIRS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stem", nargs="*", help=f"what to measure: {', '.join(STEMS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, about a minute; for orientation only")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="CSV",
        help="append the rows here; default: bench/results/<device>.csv, or <device>.csv; with --base compare-<device>",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="CPU cores for every competitor; default: all")
    parser.add_argument("--share", default="1/1", metavar="K/N", help="every Nth case from the Kth on; default: all")
    parser.add_argument(
        "--case", metavar="TEXT", help='only cases whose name, shape and dtype contain this, such as "forward, L=500"'
    )
    parser.add_argument(
        "--base",
        metavar="REV",
        help="compare our kernels with those of this git revision, which is built once in the cache folder",
    )
    parser.add_argument(
        "--pairs", type=int, help=f"pairs of processes for --base, at least {MIN_PAIRS}; default: {MIN_PAIRS}"
    )
