"""Variants of kernels/gradient_activation.py: every kind of activation in every dtype, and both optimizers' steps."""

from aot import variant
from lcw_ops.kernels import gradient_activation as kernels


def _variant(kernel, name: str, dtype: str, arrays: list[str], numbers: list[str], flags: dict, table: bool) -> dict:
    pointers = dict.fromkeys(arrays, dtype) | {"table": "i64" if table else dtype}
    num_warps = kernels.NUM_WARPS
    if kernel is kernels.adamw_step_kernel:
        pointers["corrections"] = "fp64"
        num_warps = kernels.ADAMW_WARPS
    return variant(
        kernel,
        f"{name}-{dtype}{'-table' * table}",
        pointers,
        {"numel": 0, "blocks": 0},
        tuple(numbers),
        flags | {"TABLE": table, "ALIGNED": table, "BLOCK": kernels.BLOCK, "num_warps": num_warps},
        aligned=("table",) if table else tuple(arrays),
    )


def _activation(kind: str, dtype: str, table: bool = False) -> dict:
    kernel = kernels.gradient_activation_kernel
    return _variant(kernel, kind, dtype, ["gradient"], ["alpha", "beta"], {"KIND": kind}, table)


def _sgd(dtype: str, table: bool, on_momentum: bool) -> dict:
    numbers = ["lr", "momentum", "undamped", "weight_decay", "alpha", "beta"]
    flags = {
        "KIND": "log" if on_momentum else "arctan",
        "HAS_BUFFER": True,
        "NESTEROV": True,
        "MAXIMIZE": True,
        "IS_FIRST": False,
        "ON_MOMENTUM": on_momentum,
    }
    name = "momentum" if on_momentum else "gradient"
    return _variant(kernels.sgd_step_kernel, name, dtype, ["param", "gradient", "buffer"], numbers, flags, table)


def _adamw(kind: str, dtype: str, table: bool) -> dict:
    arrays = ["param", "gradient", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    numbers = ["kept", "added", "beta2", "added_sq", "eps", "alpha", "beta"]
    flags = {"KIND": kind, "AMSGRAD": True, "MAXIMIZE": True}
    return _variant(kernels.adamw_step_kernel, kind, dtype, arrays, numbers, flags, table)


VARIANTS = [
    *(_activation(kind, dtype) for kind in ("arctan", "tanh", "log") for dtype in ("fp32", "bf16", "fp16", "fp64")),
    _activation("arctan", "fp32", table=True),
    _sgd("fp32", False, True),
    _sgd("bf16", True, False),
    _adamw("arctan", "fp32", True),
    _adamw("tanh", "bf16", True),
    _adamw("log", "fp64", False),
]
