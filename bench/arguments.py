"""The arguments of ``lcw-ops bench``. This module does not import torch, so the command's help is quick."""

import argparse
from pathlib import Path

# The names of the methods (stems). Each is a module of this package with cases(device_type).
STEMS = ("gradient_activation", "hypersphere", "lcw_linear", "orthogonal_filter", "parallel_depth", "weight_norm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stem", nargs="*", help=f"what to measure: {', '.join(STEMS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, about a minute; for orientation only")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="CSV",
        help="append the rows here; default: bench/results/<device>.csv, or <device>.csv",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="CPU cores for every competitor; default: all")
    parser.add_argument("--share", default="1/1", metavar="K/N", help="every Nth case from the Kth on; default: all")
