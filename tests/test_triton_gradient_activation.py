"""The Triton kernels of activated gradients over lists and inside steps.

Without a GPU they run in Triton's interpreter (see support/triton_process.py).
"""

import itertools

import pytest
import torch
from support.gradient_activation_kernels import ACTIVATION, GradientActivationKernels, Ops, SgdCase, gradients
from support.triton_process import DEVICE_TYPE, import_kernels

from lcw_ops.ops.gradient_activation import NAME

kernels = import_kernels("gradient_activation", NAME)
OPS = Ops(kernels.gradient_activation_many, kernels.sgd_step, kernels.adamw_step)

# In the interpreter both branches of a selection are computed, and the one that is not taken may divide by 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def counters_on_device():
    """Leave the step counters where they are: the Triton kernels take them on any device."""


class TestTriton(GradientActivationKernels):
    ops = OPS
    # A CUDA card divides and exponentiates approximately in float32.
    most_ulp = {"cpu": 4.0, "cuda": 6.0}[DEVICE_TYPE]
    many, many_steps = 60, 12


@pytest.fixture
def launches(monkeypatch):
    """The grid and the arguments of every launch of the activation's kernel."""
    made = []
    kernel = kernels.gradient_activation_kernel

    class Recorded:
        def __getitem__(self, grid):
            def launch(*arguments, **settings):
                made.append((grid, arguments, settings))
                kernel[grid](*arguments, **settings)

            return launch

    monkeypatch.setattr(kernels, "gradient_activation_kernel", Recorded())
    return made


def test_one_launch_for_a_flat_buffer(device, launches):
    flat = gradients(9000).to(device, torch.float32)
    wanted = 0.1 * torch.atan(20 * flat)
    parts = flat.split([1, 2, 3] * 1500)
    OPS.activate([*parts[::2], *parts[1::2]], *ACTIVATION.values())
    torch.testing.assert_close(flat, wanted)
    assert len(launches) == 1
    assert launches[0][2]["TABLE"] is False


def test_a_launch_for_tensors_of_like_size(device, launches):
    """Tensors with gaps between them are passed in a table. Small ones do not get as many programs as a large one."""
    sizes = [5] * 10 + [1025] * 10 + [20_000]
    storage = gradients(sum(sizes) + len(sizes)).to(device, torch.float32)
    starts = itertools.accumulate((size + 1 for size in sizes), initial=0)
    tensors = [storage[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    wanted = [0.1 * torch.atan(20 * tensor) for tensor in tensors]
    OPS.activate(tensors, *ACTIVATION.values())
    for tensor, expected in zip(tensors, wanted, strict=True):
        torch.testing.assert_close(tensor, expected)
    assert all(settings["TABLE"] for _, _, settings in launches)
    assert sum(grid[0] for grid, _, _ in launches) == 10 * 1 + 10 * 2 + 20


def test_runs_are_neighbours_in_every_list(device):
    """A run of neighbours needs neighbours in all lists. Here the parameters are, but the gradients are not."""
    flat = torch.ones(60, device=device)
    params = list(flat.split(20))
    assert kernels._find_runs([params], [2, 0, 1], None) == [(0, 60)]
    grads = [torch.ones(20, device=device) for _ in params]
    assert len(kernels._find_runs([params, grads], [0, 1, 2], None)) == 3
    assert kernels._find_runs([params], [0, 1, 2], [1.0, 1.0, 2.0]) == [(0, 40), (2, 20)]
    assert kernels._find_runs([params], [0, 2], None) == [(0, 20), (2, 20)]


@pytest.mark.skipif(DEVICE_TYPE != "cuda", reason="CUDA graphs need a GPU")
def test_recorded_in_a_cuda_graph(device):
    """A recorded launch has no table, whatever the number of tensors."""
    case = SgdCase([30] * 12, torch.float32, device)
    before = [[tensor.clone() for tensor in tensors] for tensors in (case.params, case.buffers)]
    case.run(OPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(OPS)
    for current, wanted in zip((case.params, case.buffers), before, strict=True):
        for one, other in zip(current, wanted, strict=True):
            one.copy_(other)
    graph.replay()
    case.check()
