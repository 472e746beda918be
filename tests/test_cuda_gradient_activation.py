"""The kernels of csrc/cuda/gradient_activation.cu, on a GPU or on the emulator that test_cuda_emulated.py starts."""

import math
import os

import pytest
import torch
from support.gradient_activation_kernels import (
    ACTIVATION,
    ADAMW,
    SGD,
    AdamWCase,
    GradientActivationKernels,
    Ops,
    SgdCase,
    gradients,
)

DEVICE = torch.device(os.environ.get("LCW_OPS_TEST_DEVICE", "cpu"))
EMULATED = os.environ.get("LCW_OPS_EMULATED_LIBRARY")
if EMULATED:
    torch.ops.load_library(EMULATED)
elif DEVICE.type != "cuda":
    pytest.skip("no GPU requested; test_cuda_emulated.py starts a process that needs none", allow_module_level=True)

namespace = torch.ops.lcw_ops
OPS = Ops(namespace.gradient_activation_.cuda, namespace.activated_sgd_step_.cuda, namespace.activated_adamw_step_.cuda)

on_gpu = pytest.mark.skipif(bool(EMULATED), reason="the emulator has no streams, no graphs, and too little memory")


@pytest.fixture
def counters_on_device(monkeypatch):
    """The emulated GPU shares the CPU's memory, so a variable says that the counters are on the GPU."""
    monkeypatch.setenv("LCW_OPS_EMULATED_STEPS_ON_GPU", "1")


class TestCuda(GradientActivationKernels):
    ops = OPS
    # In ulp: CUDA's own functions err by at most 2. Four roundings add half an ulp each, or a whole one where the
    # result is just below a power of 2.
    most_ulp = 4.0


def test_more_tensors_than_a_launch_takes(device):
    """The function, SGD's step and AdamW's step each take several launches."""
    tensors = [torch.full((3,), float(i), device=device) for i in range(600)]
    OPS.activate(tensors, "log", 1.0, 1.0)
    for i, tensor in enumerate(tensors):
        torch.testing.assert_close(tensor, torch.full((3,), math.log1p(i)))
    SgdCase([2] * 300, torch.float32, device).run(OPS).check()
    AdamWCase([2] * 200, torch.float32, device, amsgrad=True).run(OPS).check()


def test_any_order_of_dimensions(device):
    """Dense tensors, transposed or channels last, give the same memory, element for element."""
    for view in (lambda t: t.view(30, 40).t(), lambda t: t.view(2, 10, 6, 10).permute(0, 3, 1, 2)):
        case, plain = (SgdCase((1200,), torch.float32, device, behind=(1, 1, 1)) for _ in range(2))
        for name in ("params", "grads", "buffers"):
            getattr(plain, name)[0].copy_(getattr(case, name)[0])
        plain.run(OPS)
        lists = [[view(tensor) for tensor in tensors] for tensors in (case.params, case.grads, case.buffers)]
        OPS.sgd_step(*lists, *SGD.values(), *ACTIVATION.values())
        assert torch.equal(case.params[0], plain.params[0])
        assert torch.equal(case.buffers[0], plain.buffers[0])


def arguments(device, **lists):
    """The lists of AdamW's step with amsgrad for two parameters. ``lists``: functions that change them, by name."""
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    own = {name: [torch.ones(4, 3, device=device), torch.ones(5, device=device)] for name in names}
    own["state_steps"] = [torch.tensor(1.0), torch.tensor(1.0)]
    own |= {name: change(own[name]) for name, change in lists.items()}
    return own


def transposed(tensors):
    return [torch.ones(3, 4, device=tensors[0].device).t(), tensors[1]]


BAD_LISTS = {
    "too few": ({"grads": lambda tensors: tensors[:1]}, r"grads has 1 tensors; expected 2"),
    "another dtype": ({"exp_avgs": lambda tensors: [tensors[0], tensors[1].double()]}, r"exp_avgs\[1\] differs from"),
    "another shape": ({"grads": lambda tensors: [tensors[0], tensors[0]]}, r"grads\[1\] differs from"),
    "other strides": ({"exp_avg_sqs": transposed}, r"exp_avg_sqs\[0\] differs from"),
    "integers": ({"params": lambda tensors: [tensors[0].int(), tensors[1]]}, "a tensor is not float32"),
    "gaps": ({"params": lambda tensors: [tensors[0], torch.ones(10)[::2].to(tensors[0])]}, None),
    "overlapping": ({"params": lambda tensors: [tensors[0], tensors[1][:1].expand(5)]}, "has gaps or overlaps"),
    "no maxima": ({"max_exp_avg_sqs": lambda tensors: []}, "max_exp_avg_sqs has 0 tensors; expected 2"),
    "integer counters": ({"state_steps": lambda steps: [step.long() for step in steps]}, "single float32 numbers"),
    "counters of two": ({"state_steps": lambda steps: [steps[0], torch.ones(2)]}, "single float32 numbers"),
}


# In these cases the caller can mend the tensors, and the try_ ops return False. In the others they raise an error too.
ANSWERED = ("another dtype", "another shape", "other strides", "integers", "gaps", "overlapping")


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists_change_nothing(case, device):
    changes, message = BAD_LISTS[case]
    lists = arguments(device, **changes)
    if case == "gaps":
        lists["params"] = [lists["params"][0], torch.ones(10, device=device)[::2]]
        message = "has gaps or overlaps"
    numbers = (*(ADAMW | {"amsgrad": True}).values(), *ACTIVATION.values())
    with pytest.raises(RuntimeError, match=f"activated_adamw_step_: .*{message}"):
        OPS.adamw_step(*lists.values(), *numbers)
    if case in ANSWERED:
        assert namespace.try_activated_adamw_step_.cuda(*lists.values(), *numbers) is False
    else:
        with pytest.raises(RuntimeError, match=message):
            namespace.try_activated_adamw_step_.cuda(*lists.values(), *numbers)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        assert all((tensor == 1).all() for tensor in lists[name])


def test_the_try_ops_return_true_for_tensors_that_they_take(device):
    tensor, wanted = (torch.full((5,), 0.3, device=device) for _ in range(2))
    OPS.activate([wanted], "tanh", 0.1, 20.0)
    assert namespace.try_gradient_activation_.cuda([tensor], "tanh", 0.1, 20.0) is True
    assert torch.equal(tensor, wanted)
    for on_momentum in (False, True):
        case = SgdCase((5, 3), torch.float32, device, on_momentum=on_momentum)
        case.run(OPS._replace(sgd_step=namespace.try_activated_sgd_step_.cuda)).check()
    AdamWCase((5, 3), torch.float32, device).run(
        OPS._replace(adamw_step=namespace.try_activated_adamw_step_.cuda)
    ).check()


def test_tensors_that_share_memory_change_nothing(device):
    """Two blocks would write the shared memory at once."""
    base = torch.ones(24, device=device)
    for tensors in ([base[:14], base[12:]], [base, base.view(4, 6)]):
        with pytest.raises(RuntimeError, match="two tensors share memory"):
            OPS.activate(tensors, "tanh", 0.1, 20.0)
        assert namespace.try_gradient_activation_.cuda(tensors, "tanh", 0.1, 20.0) is False
    assert namespace.try_gradient_activation_.cuda([base[:12], base[12:12], base[12:]], "tanh", 0.1, 20.0) is True
    wanted = torch.ones(24, device=device)
    OPS.activate([wanted], "tanh", 0.1, 20.0)
    assert torch.equal(base, wanted)


def test_a_bad_kind_changes_nothing(device):
    tensor = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="gradient_activation_: kind is sigmoid; expected arctan, tanh or log"):
        OPS.activate([tensor], "sigmoid", 0.1, 20.0)
    assert (tensor == 1).all()
    with pytest.raises(RuntimeError, match="gradient_activation_: a tensor has gaps"):
        OPS.activate([tensor, torch.ones(6, device=device)[::2]], "tanh", 0.1, 20.0)
    assert (tensor == 1).all()


@on_gpu
def test_recorded_in_a_cuda_graph(device):
    """The graph is replayed on new numbers. The step counters lie on the GPU."""
    tensors = [gradients(100 + i).to(device, torch.float32) for i in range(300)]
    case = AdamWCase([3000] * 100, torch.float32, device, steps_device=device)
    before = [[tensor.clone() for tensor in tensors] for tensors in case.lists]
    new = [tensor + 1 for tensor in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.activate(tensors, "arctan", 0.1, 20.0)
        case.run(OPS)
    for current, wanted in ((tensors, new), *zip(case.lists, before, strict=True)):
        for one, other in zip(current, wanted, strict=True):
            one.copy_(other)
    graph.replay()
    OPS.activate(new, "arctan", 0.1, 20.0)
    assert all(map(torch.equal, tensors, new))
    case.check()


@on_gpu
def test_on_the_current_stream(device):
    tensor = torch.ones(1 << 24, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        tensor.fill_(math.inf)
        OPS.activate([tensor], "tanh", 0.5, 1.0)
    stream.synchronize()
    assert (tensor == 0.5).all()


@on_gpu
def test_more_elements_than_31_bits_count(device):
    size = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 8 * size:
        pytest.skip("too little free memory")
    tensor = torch.zeros(size, dtype=torch.bfloat16, device=device)
    places = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**31 + 1, size - 1], device=device)
    tensor[places] = math.inf
    OPS.activate([tensor], "tanh", 0.5, 20.0)
    assert (tensor[places] == 0.5).all()
    assert tensor.count_nonzero() == len(places)
