"""Fixtures for all tests (seeds, NaN in uninitialised memory, the device of LCW_OPS_TEST_DEVICE), and their marks."""

import os
from pathlib import Path

import pytest
import torch
from support.marks import marks_of

import lcw_ops

# pytest explains a failed assert of these files as it does in a file of tests.
pytest.register_assert_rewrite("support.unit_module_tests", "support.unit_op_tests")

# Without a cache file, measured choices of a matmul neither outlive a test nor reach the processes that tests start.
os.environ["LCW_OPS_CACHE_DIR"] = ""

# Tests of many threads mean it, whatever number of processors the machine has.
os.environ["LCW_OPS_PROCESSORS"] = "64"

NODES = pytest.StashKey[list[str]]()

DEVICE = torch.device(os.environ.get("LCW_OPS_TEST_DEVICE", "cpu"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: runs in `make test-slow`, not in `make test`")
    config.addinivalue_line("markers", "every_instruction_set: runs again on each slower instruction set of the CPU")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of support/marks.py, before -m and -k select."""
    folder = Path(__file__).parent
    for item in items:
        node = f"{item.path.relative_to(folder)}::{item.nodeid.partition('::')[2]}"
        for mark in marks_of(node):
            item.add_marker(mark)
        config.stash.setdefault(NODES, []).append(node)


@pytest.fixture
def collected(request) -> list[str]:
    """All tests of this run as "test_x.py::test_y[id]", including those that -m and -k deselect."""
    return request.config.stash[NODES]


@pytest.fixture
def device() -> torch.device:
    """The device on which kernels are tested: that of LCW_OPS_TEST_DEVICE, which ``make gpu`` sets, or else the CPU."""
    return DEVICE


@pytest.fixture
def kernel_under_test(device):
    """orthogonal_filter runs on the compiled kernel of ``device``, or raises instead of running the reference.

    Until a GPU kernel has passed its tests on a generation, it runs there only on request. So these tests request it.
    """
    with lcw_ops.use_backend("cuda" if device.type == "cuda" else "cpp"):
        yield


@pytest.fixture
def made_on_device(device):
    """``device`` is the default device of tensors and modules."""
    with device:
        yield


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """The same random numbers on every run, and NaN in memory that a kernel forgets to write.

    torch fills the memory of ``torch.empty`` and ``new_empty`` only in its deterministic mode. It does so below Python,
    so memory that C++ kernels allocate is poisoned too.
    """
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["own", "torch"])
def every_multiplier(request, monkeypatch):
    """Our matmul or torch's in the CPU layers. Without this fixture the sizes decide, since torch is deterministic."""
    monkeypatch.setenv("LCW_OPS_MATMUL", request.param)
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """For files whose matmuls are so small that waking a second thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
