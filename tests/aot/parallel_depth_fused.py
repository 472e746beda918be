"""Variants of kernels/parallel_depth_fused.py: both sweeps at the largest width, with few and with many rows."""

from aot import DEVICES, EVERY_TARGET, variant
from lcw_ops.kernels import parallel_depth_fused as kernels


def _sweep(width: int, rows: int, reverse: bool, tied: bool = False, target: str = "sm_90", **constants) -> dict:
    """fused_sweep_kernel with every optional argument of its direction."""
    launch = kernels.choose_launch(width, rows, DEVICES[target]) | constants
    arrays = dict.fromkeys(("x", "old_x", "starts", "matrix", "bias", "added", "slope", "alpha", "beta"), "fp32")
    arrays |= {"decay": "fp64", "powers": "i32", "index": "i64"}
    arrays |= dict.fromkeys(("bias", "beta") if reverse else ("slope",))
    flags = {
        "MATRIX_STRIDE": 0 if tied else width * width,
        "BIAS_STRIDE": 0 if reverse else width,
        "ALPHA_STRIDE": 1,
        "BETA_STRIDE": 0 if reverse else 1,
        "ACTIVATION": "identity" if reverse else "tanh",
        "REVERSE": reverse,
        "WIDTH": width,
    }
    targets = ("gfx942",) if target == "gfx942" else tuple(name for name in EVERY_TARGET if name != "gfx942")
    name = f"{'adjoint' if reverse else 'forward'}-{width}-{rows}{'-tied' if tied else ''}"
    return variant(
        kernels.fused_sweep_kernel,
        "-".join([name, *map(str, constants.values())]),
        arrays,
        dict.fromkeys(("known", "rows", "steps", "chunk"), 0),
        (),
        flags | launch,
        targets=targets,
        shared_memory=kernels.SHARED_MEMORY,
    )


def _others(width: int) -> list[dict]:
    tile = kernels._choose_tile(width, kernels.MAX_ROWS)
    kinds = dict.fromkeys(("states", "initial", "x", "starts", "old_x", "old_starts", "slope", "scaled"), "fp32")
    kinds |= dict.fromkeys(("decay", "old_decay", "residuals"), "fp64") | {"index": "i64"}
    kinds |= dict.fromkeys(("powers", "inverses"), "i32")
    flags = {"REVERSE": True, "STAGES": kernels.CARRY_STAGES, "LAYERS": kernels.FINISHED_LAYERS, "WIDTH": width} | tile
    variants = []
    for kernel in (kernels.powers_kernel, kernels.fused_carry_kernel, kernels.fused_finish_kernel):
        own = set(kernel.arg_names) | {"num_warps"}
        variants.append(
            variant(
                kernel,
                str(width),
                {name: kind for name, kind in kinds.items() if name in own},
                {name: 0 for name in ("known", "chunks", "rows", "steps", "chunk") if name in own},
                (),
                {name: value for name, value in flags.items() if name in own},
            )
        )
    return variants


VARIANTS = [
    *(_sweep(64, rows, reverse) for rows in (128, 5, 1) for reverse in (False, True)),
    *(_sweep(64, 128, reverse, tied=True) for reverse in (False, True)),
    *(_sweep(width, 128, reverse, PRECISION="tf32x3") for width in (64, 33) for reverse in (False, True)),
    *(_sweep(width, 128, reverse) for width in (33, 17) for reverse in (False, True)),
    *(_sweep(64, 128, reverse, target="gfx942") for reverse in (False, True)),
    *_others(64),
]
