"""The checks of ``make sanitize`` on a quick build: the mistakes that it must catch, and a selection of the proof."""

import os

import pytest
from sanitize import harness

pytestmark = [
    pytest.mark.skipif(harness.why_not(harness.MEMORY) is not None, reason=str(harness.why_not(harness.MEMORY))),
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another library is loaded first already"),
]

# -O0 compiles three times as fast as -O1, and the calls below take seconds either way.
QUICK = "-O0"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    # These ops would take minutes to compile, and no call below needs them.
    without = ("gradient_activation", "hypersphere", "lcw_linear", "parallel_depth", "weight_norm")
    return harness.build(tmp_path_factory.mktemp("sanitized"), harness.MEMORY, QUICK, without)


REPORTS = [
    "heap-buffer-overflow",
    "heap-use-after-free",
    "signed integer overflow",
    "misaligned address",
    "shift exponent",
]


def test_mistakes_are_caught_and_correct_code_passes(package):
    mistakes = harness.MISTAKES[harness.MEMORY]
    found, reports = harness.make_mistakes(package, harness.MEMORY, [0, *mistakes])
    assert found == {0: 0, **dict.fromkeys(mistakes, harness.CAUGHT)}, reports
    assert [report for report in REPORTS if report not in reports] == []


def test_the_recurrence_under_the_address_sanitizer(package):
    """Any shapes, options, memory layouts and numbers of threads."""
    result = harness.run_tests(package, harness.MEMORY, "any_call")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "1 passed" in result.stdout
