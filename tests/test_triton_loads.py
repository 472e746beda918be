"""How wide the loads of rows are that kernels are compiled to, without a GPU, from their PTX.

Alignment is a matter of hints that the compiler may lose: then every result stays right, and every load is of one
number.
"""

import importlib.util
import os
import re
from collections import Counter

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter (TRITON_INTERPRET=1) compiles nothing", allow_module_level=True)

from aot import RECORDED_TARGET
from aot.compiled import remembered
from aot.launching import KERNELS, compiling

UNITS = 4096
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def empty(*shape, dtype, offset=0):
    """A tensor at an address of ``offset`` elements behind a multiple of 16 bytes."""
    size = torch.Size(shape).numel()
    return torch.empty(offset + size, dtype=dtype)[offset:].view(shape)


def lcw(samples, features, dtype, basis=False, offset=0):
    x, weight = empty(samples, features, dtype=dtype), empty(UNITS, features - basis, dtype=dtype, offset=offset)
    KERNELS["lcw_linear"].lcw_linear(x, weight, None, basis)


def weight_norm(samples, features, dtype):
    x, weight, scale = (empty(*shape, dtype=dtype) for shape in ((samples, features), (UNITS, features), (UNITS,)))
    KERNELS["weight_norm"].weight_norm_linear(x, weight, scale, None, True)


def copies(ptx: str) -> dict[str, int]:
    """Bytes of a thread's asynchronous copy, or "load" for a load to registers -> how many of them the loops have."""
    found, labels, lines = Counter(), {}, ptx.splitlines()
    in_loop = set()
    for number, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = number
        elif (jump := re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)) and jump[1] in labels:
            in_loop.update(range(labels[jump[1]], number))
    for number in in_loop:
        if copy := re.search(r"\bcp\.async\.c[ag]\.shared\.global .*, 0x([0-9a-f]+),", lines[number]):
            found[str(int(copy[1], 16))] += 1
        elif "ld.global" in lines[number]:
            found["load"] += 1
    return dict(found)


def copies_of(kernel: str, launch, arguments: tuple, target: str) -> dict[str, int]:
    def compile():
        with compiling(target) as compiled:
            launch(*arguments)
        (found,) = (copies(one.kernel.asm["ptx"]) for one in compiled if one.kernel.name == kernel)
        return found

    return remembered(f"copies {target} {kernel} {launch.__name__} {arguments}", compile)


@pytest.mark.parametrize(
    ("kernel", "launch", "arguments", "widest"),
    [
        ("lcw_linear_kernel", lcw, (32, 4096, BF16), "16"),
        ("lcw_linear_kernel", lcw, (32, 1000, BF16), "16"),
        ("lcw_linear_kernel", lcw, (64, 1004, BF16), "8"),
        ("lcw_linear_kernel", lcw, (32, 1001, BF16), "16"),
        ("lcw_linear_kernel", lcw, (64, 4096, BF16, True), "16"),
        ("lcw_linear_kernel", lcw, (8, 4097, BF16, True), "16"),
        ("lcw_linear_kernel", lcw, (32, 4096, BF16, False, 1), "16"),
        ("lcw_linear_kernel", lcw, (32, 1000, F32), "16"),
        ("lcw_linear_kernel", lcw, (32, 1000, F32, True), "4"),
        ("lcw_linear_kernel", lcw, (16, 1002, F64), "16"),
        ("weight_norm_linear_kernel", weight_norm, (32, 1000, BF16), "16"),
    ],
)
def test_rows_are_copied_in_wide_pieces_ahead_of_their_use(kernel, launch, arguments, widest):
    found = copies_of(kernel, launch, arguments, RECORDED_TARGET)
    print(kernel, launch.__name__, arguments, found)
    assert found.keys() == {widest}


def test_copies_are_counted_in_loops_only():
    ptx = """
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
$L__BB0_1:
    @%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
    @%p2 ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd1 + 0 ];
    @%p3 bra $L__BB0_1;
    ld.global.b32 %r3, [ %rd1 + 0 ];
"""
    assert copies(ptx) == {"16": 1, "4": 1, "load": 1}
