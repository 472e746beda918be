"""Variants of kernels/hypersphere.py: directions, the fused layer, and the passes around the vendor's matmul."""

import triton

from aot import DEVICES, EVERY_TARGET, ITEMSIZE, variant, wide
from lcw_ops.kernels import common
from lcw_ops.kernels import hypersphere as kernels


def _rows(length: int, dtype: str, count: int = 4096, targets=EVERY_TARGET) -> list[dict]:
    """Variants of the two kernels on rows, forward and backward."""
    launch = common.choose_row_launch(length, ITEMSIZE[dtype])
    blocks = {"BLOCKS": triton.next_power_of_2(triton.cdiv(length, launch["LANES"]))}
    multiple = {"MULTIPLE": common.row_multiple(ITEMSIZE[dtype], length)}
    direction_launch = kernels._direction_launch(count, length, ITEMSIZE[dtype], DEVICES["sm_90"])
    return [
        variant(
            kernel,
            f"{length}-{dtype}",
            dict.fromkeys(pointers, dtype),
            {"count": 0} | lengths,
            (),
            constants,
            targets=targets,
        )
        for kernel, pointers, lengths, constants in (
            (kernels.direction_kernel, ("angles", "output"), {"length": 0}, direction_launch | multiple),
            (
                kernels.direction_backward_kernel,
                ("grad_direction", "angles", "grad_angles"),
                {"columns": length - 1},
                blocks | launch,
            ),
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
        outputs = dict.fromkeys(("radius", "location", "output", "kept"), dtype)
        outputs |= dict.fromkeys(("products", "sines"), wide(dtype) if splits > 1 else None)
        id = f"{rows}x{units}x{features}-{dtype}-{splits}-splits"
        others = {"targets": (target,), "shared_memory": device.shared_memory}
        launch["MULTIPLE"] = common.row_multiple(ITEMSIZE[dtype], features)
        lengths = {"rows": 0, "units": 0, "features": 0, "chunk": chunk}
        pointers = {"x": dtype, "angles": dtype} | outputs
        constants = {"RELU": True} | launch
        variants.append(variant(kernels.gmp_linear_kernel, id, pointers, lengths, (), constants, **others))
        if splits > 1:
            constants = {"RELU": True, "BLOCK_M": launch["BLOCK_M"], "BLOCK_N": common.REDUCE_UNITS}
            lengths = dict.fromkeys(("rows", "units", "splits"), 0)
            variants.append(variant(kernels.gmp_linear_reduce_kernel, id, outputs, lengths, (), constants, **others))
    return variants


def _pointwise(dtype: str, relu: bool) -> list[dict]:
    """The passes around the vendor's matmuls, with every optional argument."""
    lengths = {"rows": 0, "units": 4096}
    scaled = dict.fromkeys(("product", "scale", "output", "kept"), dtype)
    summed = dict.fromkeys(("grad_output", "activated", "radius", "grad_pre"), dtype)
    summed |= dict.fromkeys(("radius_sums", "location_sums"), wide(dtype))
    wide_tile, narrow_tile = ({"RELU": relu} | kernels._pointwise_launch(units) for units in (4096, 64))
    return [
        variant(kernels.scale_kernel, dtype, scaled, lengths, (), wide_tile),
        variant(kernels.sum_gradients_kernel, dtype, summed, lengths | {"chunk": 64}, (), narrow_tile),
    ]


VARIANTS = [
    *_rows(4096, "fp32"),
    *_rows(2048, "fp64", targets=("sm_90",)),
    # A row of several steps, with the most warps that a row can have. It is not compiled for AMD: there the masks of
    # eight loads need more scalar registers than exist, and six masks go through vector registers.
    *_rows(16384, "bf16", count=64, targets=("sm_90",)),
    *_linear((32, 4096, 4096), "bf16"),
    *_linear((16, 4096, 4096), "fp32", targets=("sm_90",)),
    *_pointwise("fp32", True),
]
