"""Variants of kernels/orthogonal_filter.py: widths 64, 100 and 128, with every kind of filter."""

from aot import DEVICES, EVERY_TARGET, ITEMSIZE, OLD_AND_AMD, variant
from lcw_ops.kernels import orthogonal_filter as kernels

FORWARD, BACKWARD = kernels.orthogonal_filter_kernel, kernels.orthogonal_filter_backward_kernel


def _variants(
    id: str,
    kernel,
    width: int,
    rows: int = 128,
    filter: str = "shared",
    dtype: str = "fp32",
    per_layer: bool = True,
    everything: bool = False,
    allow_tf32: bool = False,
    targets: tuple[str, ...] = EVERY_TARGET,
) -> list[dict]:
    """One variant per target, because each target has its own tile. ``everything`` adds every optional argument."""
    permutes = filter == "permutation"
    optional = dtype if everything else None
    pointers = dict.fromkeys(("transposed_weight", "bias", "alpha", "beta"), dtype) | {
        "transposed_filter": None if permutes else dtype,
        **dict.fromkeys(("permutation", "inverse"), "i64" if permutes else None),
        "inputs": dtype if not per_layer else optional,
    }
    flags = {
        "WEIGHT_STRIDE": width * width if per_layer else 0,
        "BIAS_STRIDE": width if per_layer else 0,
        "FILTER_STRIDE": width * width if filter == "per_layer" else 0,
        "ALPHA_STRIDE": int(everything),
        "BETA_STRIDE": int(everything),
        "PERMUTES": permutes,
        "ACTIVATION": "tanh",
        "WIDTH": width,
    }
    if kernel is FORWARD:
        pointers |= dict.fromkeys(("h0", "output", "checkpoints"), dtype)
        flags["RETURN_STATES"] = everything
        lengths = dict.fromkeys(("rows", "steps", "segment"), 0)
    else:
        pointers |= dict.fromkeys(("checkpoint", "weight", "gradient", "states", "activated", "grad_pre"), dtype)
        pointers["filter"] = pointers["transposed_filter"]
        pointers |= dict.fromkeys(("grad_output", "grad_states"), optional)
        pointers |= dict.fromkeys(("alpha_products", "beta_products"), "fp64" if everything else None)
        lengths = dict.fromkeys(("rows", "count"), 0)
    read = per_layer + (filter == "per_layer")
    variants = []
    for target in targets:
        device, kept = DEVICES[target], 2 - permutes - read
        launch = kernels.choose_launch(width, ITEMSIZE[dtype], rows, read, kept, allow_tf32, device)
        others = {"targets": (target,), "shared_memory": device.shared_memory}
        variants.append(variant(kernel, id, pointers, lengths, (), flags | launch, **others))
    return variants


VARIANTS = [
    *_variants("64", FORWARD, 64),
    *_variants("64-tf32x3", FORWARD, 64, 4096, allow_tf32=True, targets=("sm_90",)),
    *_variants("64-fp64", FORWARD, 64, dtype="fp64", targets=OLD_AND_AMD),
    *_variants(
        "100-permutation-everything",
        FORWARD,
        100,
        filter="permutation",
        everything=True,
        targets=OLD_AND_AMD,
    ),
    *_variants("128-everything", FORWARD, 128, filter="per_layer", everything=True, targets=OLD_AND_AMD),
    *_variants("64", BACKWARD, 64),
    *_variants("64-everything-4096-rows", BACKWARD, 64, 4096, "per_layer", everything=True, targets=OLD_AND_AMD),
    *_variants("64-tf32x3", BACKWARD, 64, 4096, allow_tf32=True, targets=("sm_80", "sm_90")),
    *_variants("64-fp64", BACKWARD, 64, dtype="fp64", everything=True, targets=OLD_AND_AMD),
    *_variants("100-permutation", BACKWARD, 100, filter="permutation"),
    *_variants("128-shared", FORWARD, 128, 64, per_layer=False, targets=("sm_80", "sm_90")),
    *_variants("128", BACKWARD, 128),
    *_variants("128-everything-4096-rows", BACKWARD, 128, 4096, "per_layer", everything=True),
]
