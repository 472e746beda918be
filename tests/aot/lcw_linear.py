"""Variants of kernels/lcw_linear.py: the kernels on rows, and the layer's product in one kernel or in partial sums."""

from aot import DEVICES, ITEMSIZE, variant, wide
from lcw_ops.kernels import common
from lcw_ops.kernels import lcw_linear as kernels

PARTIAL = ("products", "weight_sums", "x_sums")


def _rows(kernel, id: str, length: int, dtype: str, constants: dict) -> dict:
    launch = kernels._row_launch(length, ITEMSIZE[dtype])
    if kernel is kernels.lcw_rows_kernel:
        pointers, numbers = ("rows", "output"), ("inner", "outer")
    else:
        pointers, numbers = ("rows", "means"), ("inverse_length",)
    constants |= {"MULTIPLE": common.row_multiple(ITEMSIZE[dtype], length)}
    lengths = {"count": 0, "length": 0}
    id = f"{id}-{length}-{dtype}"
    return variant(kernel, id, dict.fromkeys(pointers, dtype), lengths, numbers, launch | constants)


def _linear(id: str, shape: tuple[int, int, int], dtype: str, basis: bool = False, bias: bool = True) -> list[dict]:
    """For each target, the kernel that writes the result, or those that write partial sums and add them.

    Rows that start at any 2 bytes have the kernel that shifts x too.
    """
    samples, units, features = shape
    columns, itemsize = features - basis, ITEMSIZE[dtype]
    multiple = common.row_multiple(itemsize, columns, features)
    variants = []
    for target, device in DEVICES.items():
        launch = kernels.choose_launch(samples, units, columns, multiple, itemsize, device)
        splits, chunk, starts = launch.pop("splits"), launch.pop("chunk"), launch["STARTS"]
        pointers = dict.fromkeys(("x", "weight", "output"), dtype) | {
            "bias": dtype if bias else None,
            "means": dtype if itemsize >= 4 else None,
            **dict.fromkeys(PARTIAL, wide(dtype) if splits > 1 else None),
        }
        lengths = dict.fromkeys(("rows", "units", "columns", "features"), 0)
        stride = {"stride": kernels.SHIFT_GROUP if starts else 0}
        name = f"{id}-{samples}x{units}x{features}-{dtype}{'-basis' if basis else ''}-{splits}-splits"
        numbers, others = ("inner", "outer"), {"targets": (target,), "shared_memory": device.shared_memory}
        flags = {"BASIS": basis, "MULTIPLE": multiple}
        kernel, constants = kernels.lcw_linear_kernel, launch | flags
        shifted = {"shifted": dtype if starts else None}
        lengths_of_product = lengths | stride | {"chunk": chunk}
        variants.append(variant(kernel, name, pointers | shifted, lengths_of_product, numbers, constants, **others))
        if splits > 1:
            kernel = kernels.lcw_linear_reduce_kernel
            constants = {"BLOCK_M": launch["BLOCK_M"], "BLOCK_N": kernels.REDUCE_UNITS} | flags
            variants.append(variant(kernel, name, pointers, lengths | {"splits": 0}, numbers, constants, **others))
        if starts:
            pointers = dict.fromkeys(("x", "weight", "shifted"), dtype)
            lengths = dict.fromkeys(("rows", "columns", "features"), 0) | stride
            constants = {"BLOCK": kernels.SHIFT_COLUMNS}
            variants.append(variant(kernels.lcw_shift_kernel, name, pointers, lengths, (), constants, **others))
    return variants


VARIANTS = [
    *(
        _rows(kernels.lcw_rows_kernel, kind, length, dtype, {"KIND": kind})
        for kind, length, dtype in (
            ("centre", 27, "fp32"),
            ("centre", 4096, "bf16"),
            ("centre", 1000, "bf16"),
            ("centre", 4608, "fp32"),
            ("embed", 1023, "fp32"),
            ("embed", 8191, "fp64"),
            ("project", 1024, "fp16"),
            ("project", 8192, "fp32"),
        )
    ),
    *(
        _rows(kernels.lcw_means_kernel, "means", length, dtype, {})
        for length, dtype in ((1024, "fp32"), (16384, "fp64"))
    ),
    *_linear("plain", (32, 4096, 4096), "bf16", bias=False),
    *_linear("plain", (64, 16384, 4096), "fp16"),
    *_linear("split", (64, 1024, 1024), "bf16"),
    *_linear("shifted", (8, 4096, 1024), "fp16", basis=True),
    *_linear("shifted", (64, 4096, 4096), "bf16", basis=True),
    # Loads of 8 bytes, and many of them.
    *_linear("plain", (64, 4096, 1004), "bf16"),
    *_linear("plain", (32, 16384, 4096), "fp32"),
    *_linear("split", (8, 1024, 1024), "fp32"),
    *_linear("split", (64, 1024, 1024), "fp32", basis=True),
    *_linear("split", (16, 512, 512), "fp64", basis=True),
]
