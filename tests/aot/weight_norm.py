"""Variants of kernels/weight_norm.py: normalised rows and the fused layer."""

from aot import DEVICES, EVERY_TARGET, ITEMSIZE, variant, wide
from lcw_ops.kernels import common
from lcw_ops.kernels import weight_norm as kernels


def _rows(length: int, dtype: str, targets=EVERY_TARGET) -> list[dict]:
    """Variants of the two kernels on rows, forward and backward."""
    launch = common.choose_row_launch(length, ITEMSIZE[dtype])
    launch["FITS"] = length <= launch["LANES"]
    launch["MULTIPLE"] = common.row_multiple(ITEMSIZE[dtype], length)
    lengths = {"count": 0, "length": 0}
    return [
        variant(kernel, f"{length}-{dtype}", dict.fromkeys(pointers, dtype), lengths, (), launch, targets=targets)
        for kernel, pointers in (
            (kernels.normalize_kernel, ("weight", "scale", "output")),
            (kernels.normalize_backward_kernel, ("grad_output", "weight", "scale", "grad_weight", "grad_scale")),
        )
    ]


def _linear(shape: tuple[int, int, int], dtype: str, targets=EVERY_TARGET) -> list[dict]:
    """For each target, the fused product and, if it makes partial sums, the kernel that adds them."""
    rows, units, features = shape
    variants = []
    for target in targets:
        device = DEVICES[target]
        launch = common.choose_fused_launch(rows, units, features, ITEMSIZE[dtype], device)
        splits, chunk = launch.pop("splits"), launch.pop("chunk")
        outputs = dict.fromkeys(("scale", "bias", "output"), dtype)
        outputs |= dict.fromkeys(("products", "squares", "exponents"), wide(dtype) if splits > 1 else None)
        id = f"{rows}x{units}x{features}-{dtype}-{splits}-splits"
        others = {"targets": (target,), "shared_memory": device.shared_memory}
        launch["MULTIPLE"] = common.row_multiple(ITEMSIZE[dtype], features)
        lengths = {"rows": 0, "units": 0, "features": 0, "chunk": chunk}
        pointers = {"x": dtype, "weight": dtype} | outputs
        variants.append(variant(kernels.weight_norm_linear_kernel, id, pointers, lengths, (), launch, **others))
        if splits > 1:
            tile = {"BLOCK_M": launch["BLOCK_M"], "BLOCK_N": common.REDUCE_UNITS}
            lengths = dict.fromkeys(("rows", "units", "splits"), 0)
            kernel = kernels.weight_norm_linear_reduce_kernel
            variants.append(variant(kernel, id, outputs, lengths, (), tile, **others))
    return variants


VARIANTS = [
    *_rows(4096, "fp32"),
    # A row of several steps, with the most warps that a row can have. It is not compiled for AMD: there the masks of
    # eight loads need more scalar registers than exist, and six masks go through vector registers.
    *_rows(16384, "bf16", targets=("sm_90",)),
    *_linear((32, 4096, 4096), "bf16", targets=("sm_90", "gfx942")),
    # Rows that are not aligned: each element has an address and a mask.
    *_linear((64, 4096, 1001), "bf16"),
    # Rows of whole vectors of 16 bytes, whose length is not a multiple of 16.
    *_linear((64, 4096, 1000), "bf16", targets=("sm_90",)),
]
