"""The schedule of the backward pass on the CPU: what threads may rely on, whichever of them is held up."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "support/schedule.cpp"
# segments, groups, slots, pieces of slopes, pieces of gradients
SHAPES = [(1, 1, 1, 0, 0), (1, 2, 8, 3, 5), (7, 1, 1, 0, 4), (9, 3, 2, 2, 0), (12, 2, 8, 0, 8), (20, 5, 3, 4, 7)]


@pytest.fixture(scope="module", params=["", "thread"], ids=["plain", "thread sanitizer"])
def program(request, tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("this machine has no g++")
    path = tmp_path_factory.mktemp("schedule") / "schedule"
    flags = [f"-fsanitize={request.param}"] if request.param else []
    built = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-pthread", *flags, SOURCE, "-o", path], capture_output=True, text=True
    )
    if built.returncode and "cannot find" in built.stderr and request.param:
        pytest.skip("this g++ comes without the thread sanitizer")
    assert not built.returncode, built.stderr
    return path


def run(program, *arguments):
    """Run the program; a thread that waits for ever fails the test."""
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_part_is_done_once_and_in_time(program, threads):
    for shape, in_order, seed in itertools.product(SHAPES, (0, 1), range(2)):
        segments, groups, _, slopes, gradients = shape
        parts = segments * (slopes + groups + gradients)
        # The program leaves the gradients of the second segment and the slopes of the third out.
        parts -= (gradients + slopes) * (segments > 2)
        result = run(program, seed, threads, *shape, in_order, -1)
        assert (result.returncode, result.stdout) == (0, f"{parts} parts\n"), f"{shape}: {result}"


def test_after_an_error_no_thread_waits(program):
    for stop_after in (0, 1, 5, 30):
        result = run(program, 1, 4, 20, 2, 2, 1, 3, 0, stop_after)
        assert result.returncode == 0, result
