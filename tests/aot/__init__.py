"""The variants of the Triton kernels that are compiled ahead of time. Each kernels/<stem>.py has a file here.

Each file lists its variants in ``VARIANTS``: dictionaries that `variant` makes. If the launcher would choose another
tile on other GPUs, a variant names its ``targets``; other variants are compiled for all of `DEVICES`.
"""

import pkgutil

from lcw_ops import kernels
from lcw_ops.kernels.common import Device

# Every file of kernels/ except for the two that the others share.
STEMS = sorted({module.name for module in pkgutil.iter_modules(kernels.__path__)} - {"angles", "common"})
DEVICES = {
    "sm_80": Device(processors=108, shared_memory=163 * 1024, matrix_units=False),
    "sm_90": Device(processors=132, shared_memory=227 * 1024, matrix_units=False),
    "sm_100": Device(processors=148, shared_memory=227 * 1024, matrix_units=False),
    "gfx942": Device(processors=304, shared_memory=64 * 1024, matrix_units=True),
}
EVERY_TARGET = tuple(DEVICES)
# The GPU for which launches are recorded (aot/recording.py).
RECORDED_TARGET = "sm_90"
# Registers or shared memory are scarcest on these two.
OLD_AND_AMD = ("sm_80", "gfx942")
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def wide(dtype: str) -> str:
    return "fp64" if dtype == "fp64" else "fp32"


def variant(kernel, id: str, pointers: dict, lengths: dict, numbers: tuple, constants: dict, **others) -> dict:
    """One way to compile ``kernel``.

    Args:
        pointers: name -> element type, or None for a missing argument.
        lengths: name -> value of an int64. A multiple of 16 is compiled as such; 0 stands for a value on which the
            kernel does not specialise.
        numbers: the names of float64 arguments.
        constants: name -> value of the constexprs, and ``num_warps``, by default 4.
        others: ``targets``; ``shared_memory``, the most bytes that the variant may take (by default 48 KB, which every
            GPU grants without a request); ``aligned``, the multiples of 16 among the arguments, if not the default.
    """
    given = {name: f"*{dtype}" for name, dtype in pointers.items() if dtype is not None}
    absent = dict.fromkeys(name for name in pointers if name not in given)
    multiples = tuple(name for name, length in lengths.items() if length % 16 == 0 and length > 0)
    return {
        "id": id,
        "kernel": kernel,
        "signature": given | dict.fromkeys(lengths, "i64") | dict.fromkeys(numbers, "fp64"),
        "constexprs": absent | {name: value for name, value in constants.items() if name != "num_warps"},
        "aligned": (*given, *multiples),
        "num_warps": constants.get("num_warps", 4),
        "targets": EVERY_TARGET,
        "shared_memory": 48 * 1024,
    } | others
