"""Variants of kernels/parallel_depth.py: both sweeps with permutations and rotations, up to the widest rows."""

from aot import DEVICES, EVERY_TARGET, OLD_AND_AMD, variant
from lcw_ops.kernels import parallel_depth as kernels


def _variants(width: int, filter: str, dtype: str = "fp32", targets: tuple[str, ...] = EVERY_TARGET) -> list[dict]:
    """Every kernel of both sweeps, with every optional argument."""
    permutes = filter == "permutation"
    arrays = {
        **dict.fromkeys(("states", "initial", "product", "bias", "inputs", "slope", "scaled"), dtype),
        **dict.fromkeys(("alpha", "beta"), dtype),
        **dict.fromkeys(("carries", "decays", "residuals"), "fp64"),
        "filter": "i64" if permutes else "fp64",
        "inverse": "i64" if permutes else None,
        "power": "i32" if permutes else None,
    }
    tile = kernels._choose_tile(width, kernels.WARP_ELEMENTS)
    strides = {"BIAS_STRIDE": width, "ALPHA_STRIDE": 1, "BETA_STRIDE": 1}
    forward = strides | {"ACTIVATION": "tanh", "REVERSE": False, "DERIVATIVE": True, "STAGES": kernels.CARRY_STAGES}
    adjoint = forward | {"ACTIVATION": "identity", "REVERSE": True}
    variants = []
    for name, kernel, absent, flags in (
        ("forward", kernels.chunk_ends_kernel, (), forward),
        ("both", kernels.carry_kernel, (), forward),
        ("forward", kernels.sweep_kernel, ("slope", "scaled"), forward),
        ("adjoint", kernels.sweep_kernel, ("bias", "beta"), adjoint),
        ("both", kernels.activate_kernel, (), forward),
    ):
        if not permutes and kernel is kernels.activate_kernel and dtype == "fp32":
            # This kernel does not depend on the filter, and is compiled with the permutation.
            continue
        own = set(kernel.arg_names)
        variants.append(
            variant(
                kernel,
                f"{name}-{width}-{filter}-{dtype}",
                {array: None if array in absent else kind for array, kind in arrays.items() if array in own},
                {length: 0 for length in ("rows", "steps", "layers", "chunks", "chunk") if length in own},
                (),
                {flag: value for flag, value in flags.items() if flag in own} | {"WIDTH": width} | tile,
                targets=targets,
                shared_memory=min(device.shared_memory for device in DEVICES.values()),
            )
        )
    return variants


VARIANTS = [
    *_variants(64, "permutation"),
    *_variants(64, "rotations"),
    *_variants(kernels.MAX_WIDTH, "permutation", targets=OLD_AND_AMD),
    *_variants(kernels.MAX_WIDTH, "rotations", targets=OLD_AND_AMD),
    *_variants(33, "rotations", targets=("sm_80",)),
    *_variants(kernels.MAX_WIDTH, "rotations", "fp64", targets=("sm_80",)),
]
