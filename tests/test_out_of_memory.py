"""A thread of the orthogonal filter's CPU kernels that gets no memory: an error, no endless wait, and no wrong result.

Run as a script, this file lets one allocation after the other fail. The test loads an operator new[] for it that fails
on request (tests/support/failing_new.cpp).
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcw_ops.ops import backends

SOURCE = Path(__file__).parent / "support/failing_new.cpp"
STEPS, SEGMENT = 20, 8
# (threads, rows, width, one weight for all steps, known states). In the last three, threads share a row.
CASES = [
    (2, 64, 64, True, True),
    (4, 33, 32, False, False),
    (1, 3, 16, True, False),
    (2, 1, 256, True, False),
    (2, 1, 256, True, True),
    (4, 2, 128, True, False),
]


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another library is loaded first already")
@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs Linux and g++")
def test_a_failed_allocation_ends_the_op(tmp_path):
    reason = backends.missing_reason("orthogonal_filter", "cpp", "cpu")
    if reason is not None:
        pytest.skip(reason)
    library = tmp_path / "failing_new.so"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", SOURCE, "-o", library], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    result = subprocess.run(
        [sys.executable, __file__, library], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]


def main(library: str) -> None:
    failing = ctypes.CDLL(library)
    for threads, rows, width, shared, known in CASES:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        weight = torch.randn(*(() if shared else (STEPS,)), width, width) / width**0.5
        permutation, one = torch.arange(width).roll(1), torch.ones(1)
        h0, options = torch.randn(rows, width), (weight, None, permutation, one, one, None, STEPS, "tanh")
        arguments = (h0, *options, 0 if known else SEGMENT, True)

        def compute(arguments=arguments, options=options, known=known):
            states, checkpoints = torch.ops.lcw_ops.orthogonal_filter.cpp(*arguments)
            checkpoints = states[:-1] if known else checkpoints
            needs = (True, False, True, False, False)
            return states, *torch.ops.lcw_ops.orthogonal_filter_backward.cpp(
                states, checkpoints, *options, SEGMENT, *needs
            )

        expected, errors = compute(), 0
        for count in range(100):
            failing.fail_after(count)
            try:
                results = compute()
            except (RuntimeError, MemoryError):
                errors += 1
                failing.fail_after(-1)
                # Nothing is left behind that the next call could meet.
                results = compute()
            failing.fail_after(-1)
            assert all(map(torch.equal, results, expected)), (threads, rows, width, count)
        assert errors > 0, (threads, rows, width)


if __name__ == "__main__":
    main(sys.argv[1])
