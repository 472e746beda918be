"""Bank conflicts in the recurrence's loops over the layers, from the PTX of variants compiled without a GPU."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter (TRITON_INTERPRET=1) compiles nothing", allow_module_level=True)

from aot import orthogonal_filter
from aot.bank_conflicts import accesses
from aot.compiled import TARGETS, chosen_targets, compile_variant, remembered

# Wavefronts of a layer's reads, of all warps of a block together, in the loops over the layers. A multiprocessor serves
# one wavefront per cycle. Backward has two loops: one recomputes the states and the other carries the gradient.
MOST_READ = {
    ("orthogonal_filter_kernel", "64"): [644],
    ("orthogonal_filter_kernel", "128-shared"): [2312],
    ("orthogonal_filter_backward_kernel", "64"): [668, 792],
    ("orthogonal_filter_backward_kernel", "128"): [2616, 3120],
}
HEAD = "\t.reqntid 32\n\tmov.u32 %r1, %tid.x;\n"


def count(body: str):
    (found,) = accesses(HEAD + body)
    return found.wavefronts, found.ideal


@pytest.mark.parametrize(
    ("shift", "instruction", "expected"),
    [
        (2, "ld.shared.b32 %r9, [%r2+4];", (1, 1)),
        (3, "ld.shared.b32 %r9, [%r2];", (2, 1)),
        (7, "ld.shared.b32 %r9, [%r2];", (32, 1)),
        (4, "ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r2];", (4, 4)),
        # Rows of 256 bytes, as the rows of a matrix of 64 x 64 in float32.
        (8, "ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r2];", (32, 4)),
        (3, "st.shared.v2.b32 [ %r2 + 0 ], {%r9, %r10};", (2, 2)),
        (4, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r9, %r10, %r11, %r12}, [%r2];", (4, 4)),
        (8, "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r2];", (8, 1)),
    ],
)
def test_wavefronts_of_an_access(shift, instruction, expected):
    assert count(f"\tshl.b32 %r2, %r1, {shift};\n\t{instruction}\n") == expected


def test_threads_that_read_the_same_words_are_served_together():
    assert count("\tand.b32 %r2, %r1, 0;\n\tld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r2];\n") == (1, 1)
    # Two rows, 512 bytes apart: they are in the same banks.
    body = "\tshr.u32 %r2, %r1, 4;\n\tmul.lo.s32 %r3, %r2, 512;\n\tld.shared.b32 %r9, [%r3];\n"
    assert count(body) == (2, 1)
    # With a swizzle they are in different ones.
    body = "\tshr.u32 %r2, %r1, 4;\n\tmad.lo.s32 %r3, %r2, 512, 0;\n\tsetp.eq.b32 %p1, %r2, 0;\n"
    body += "\tselp.b32 %r4, 0, 16, %p1;\n\txor.b32 %r5, %r3, %r4;\n\tld.shared.b32 %r9, [%r5];\n"
    assert count(body) == (1, 1)


def test_addresses_from_memory_are_unknown():
    body = "\tld.global.b32 %r2, [%rd1];\n\tshl.b32 %r3, %r2, 2;\n\tld.shared.b32 %r9, [%r3];\n"
    assert count(body) == (None, None)


def test_accesses_know_their_innermost_loop():
    body = """
$L__BB0_1:
    st.shared.b32 [%r1], %r9;
$L__BB0_2:
    ld.shared.b32 %r9, [%r1];
    @%p1 bra $L__BB0_2;
    @%p2 bra $L__BB0_1;
    ld.shared.b32 %r9, [%r1];
"""
    found = accesses(HEAD + body)
    assert [(one.loop, one.reads) for one in found] == [(None, False), (0, True), (None, True)]


def loops(variant: dict, target: str) -> list[list[int]]:
    """[wavefronts, wavefronts without conflicts] of the reads in each loop over the layers."""
    found = accesses(compile_variant(variant, TARGETS[target]).asm["ptx"])
    reads = [one for one in found if one.loop is not None and one.reads]
    assert all(one.wavefronts is not None for one in reads)
    sums = [
        [sum(one.wavefronts for one in reads if one.loop == loop), sum(one.ideal for one in reads if one.loop == loop)]
        for loop in sorted({one.loop for one in reads})
    ]
    # The loop over the segments has a few reads of the state.
    return [one for one in sums if one[1] > 100]


@pytest.mark.parametrize("target", [target for target in chosen_targets() if target.startswith("sm_")])
@pytest.mark.parametrize(("kernel", "id"), MOST_READ)
def test_matrices_are_read_without_conflicts(kernel, id, target):
    variants = [
        variant
        for variant in orthogonal_filter.VARIANTS
        if (variant["kernel"].fn.__name__, variant["id"]) == (kernel, id) and target in variant["targets"]
    ]
    if not variants:
        pytest.skip(f"{id} is not compiled for {target}")
    found = remembered(f"conflicts {target} {kernel} {id}", lambda: loops(variants[0], target))
    print(target, kernel, id, found)
    assert len(found) == len(MOST_READ[kernel, id])
    for (wavefronts, ideal), most in zip(found, MOST_READ[kernel, id], strict=True):
        assert wavefronts == ideal
        assert wavefronts <= most
