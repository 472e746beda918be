"""Activated gradients in whole training loops: with GradScaler and clipping, under DDP and under FSDP2.

Two processes on this machine (gloo) must train to the same parameters as one process, up to rounding. Run as a script,
this file is one of the processes.
"""

import sys

import pytest
import torch
from support.processes import run_ranks
from torch import nn

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import optim

pytestmark = pytest.mark.usefixtures("one_thread")

PROCESSES = 2
# In seconds, several times the time of all cases. A process that still waits for another one then is ended.
TIMEOUT = 120


def train_sgd(params):
    optimizer = torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01)
    lcw_ops.activate_gradients(optimizer, "tanh", 0.2, 10.0)
    return optimizer


OPTIMIZERS = {
    "activate_gradients": train_sgd,
    "SGD": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD on momentum": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, activate="momentum"),
    "AdamW": lambda params: optim.AdamW(params, lr=0.01, amsgrad=True),
}


def make_model():
    # The first layer has 5 rows for 2 processes, and the last layer 1: one process has no part of the last bias.
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def train(model, optimizer, part=slice(None), steps=range(6)):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        samples = torch.randn(8, 6, generator=generator, dtype=torch.float64)[part]
        optimizer.zero_grad()
        model(samples).sub(samples.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


# ---- GradScaler and clipping


def make_scaled(name):
    model = make_model().float()
    return model, OPTIMIZERS[name](model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaling_clipping_and_activation_in_that_order(name):
    """Steps with the scaler equal those by hand without a scale. A step that overflows changes only the scale."""
    model, optimizer = make_scaled(name)
    plain, by_hand = make_scaled(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=2)
    skipped = 0
    samples = torch.randn(8, 6)
    for _ in range(12):
        before = [param.detach().clone() for param in model.parameters()]
        counted = [state["step"].clone() for state in optimizer.state.values() if "step" in state]
        optimizer.zero_grad()
        scaler.scale(1e4 * model(samples).square().mean()).backward()
        scaler.unscale_(optimizer)
        overflow = not all(param.grad.isfinite().all() for param in model.parameters())
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if overflow:
            skipped += 1
            assert scaler.get_scale() == scale / 2
            for param, old in zip(model.parameters(), before, strict=True):
                assert torch.equal(param, old)
            assert counted == [state["step"] for state in optimizer.state.values() if "step" in state]
            continue
        assert norm > 0.5, "nothing was clipped"
        by_hand.zero_grad()
        (1e4 * plain(samples).square().mean()).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        by_hand.step()
        # Scales are powers of two: scaling and unscaling are exact.
        for param, expected in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(param, expected)
    assert 2 <= skipped <= 10, "the scale must be too large at first, and then fit"


@pytest.mark.parametrize("fused", [False, True])
def test_the_scaler_unscales_by_itself_before_a_step_with_the_activation_inside(fused):
    gradient = torch.tensor([3.0, -1e-3, 1e30])
    for kind, options in ((optim.SGD, {"momentum": 0.9}), (optim.AdamW, {})):
        param, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer, by_hand = (kind([one], lr=0.1, **options) for one in (param, other))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        scaler.scale((param * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(param, torch.ones(3)), "an overflow passed"
        assert not any(optimizer.state.values())
        optimizer.zero_grad()
        gradient[2] = 5.0
        scaler.scale((param * gradient).sum()).backward()
        scaler.step(optimizer)
        other.grad = gradient.clone()
        by_hand.step()
        assert torch.equal(param, other)
        gradient[2] = 1e30


def test_an_optimizer_with_activation_inside_equals_one_with_the_hook():
    """The hook rounds once more, when it stores f(g)."""
    inside, outside = make_model(), make_model()
    train(inside, optim.SGD(inside.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01))
    optimizer = torch.optim.SGD(outside.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    lcw_ops.activate_gradients(optimizer)
    train(outside, optimizer)
    for param, expected in zip(inside.parameters(), outside.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-12)


# ---- Two processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The parameters that every process has trained, by kind of distribution and optimizer."""
    return run_ranks(__file__, tmp_path_factory.mktemp("gloo"), [0] * PROCESSES, TIMEOUT)


@pytest.mark.parametrize("way", ["DDP", "FSDP2", "resumed FSDP2"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_train_to_the_parameters_of_one(trained, way, name):
    model = make_model()
    start = [param.detach().clone() for param in model.parameters()]
    train(model, OPTIMIZERS[name](model.parameters()))
    for of_process in trained:
        for param, expected, before in zip(of_process[way][name], model.parameters(), start, strict=True):
            torch.testing.assert_close(param, expected.detach(), rtol=1e-9, atol=1e-9)
            assert not torch.allclose(param, before, rtol=1e-3, atol=1e-3), "nothing was learned"


@pytest.mark.parametrize("layers", ["register_gradient_hook", "assigned"])
def test_post_accumulate_hooks_run_after_fsdp2s_reduction(trained, layers):
    model = make_model()
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    gradients = [param.grad.clone() for param in model.parameters()]
    F.gradient_activation_(gradients)
    for of_process in trained:
        for gradient, expected in zip(of_process[layers], gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_still_to_be_summed_over_processes_are_not_activated_one_by_one(trained, name):
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.tensor([0.2, -6.0, 1.0])
    OPTIMIZERS[name]([param]).step()
    for of_process in trained:
        result = of_process[name, "partial"]
        if name == "activate_gradients":
            assert "still to be summed" in result
        else:
            torch.testing.assert_close(result, param.detach())


def test_an_optimizer_that_is_divided_among_processes_trains_to_the_parameters_of_one(trained):
    """Hooks run around ZeRO's step and around that of the optimizer inside, which has one process's parameters."""
    model = make_model()
    train(model, train_sgd(model.parameters()))
    for of_process in trained:
        for param, expected in zip(of_process["ZeRO"], model.parameters(), strict=True):
            torch.testing.assert_close(param, expected.detach(), rtol=1e-9, atol=1e-9)
        assert "Activate one of the two" in of_process["ZeRO", "inside too"]
        assert "gradient_activation=None" in of_process["ZeRO", "ours inside"]


def test_hooks_stay_with_the_shards_that_a_conversion_makes(trained):
    model = make_model().float().double()
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    gradients = [param.grad.clone() for param in model.parameters()]
    F.gradient_activation_(gradients)
    for of_process in trained:
        for gradient, expected in zip(of_process["converted"], gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_a_module_in_ddp_is_refused_by_register_gradient_hook(trained):
    for of_process in trained:
        assert "Use lcw_ops.activate_gradients" in of_process["refusal"]


class Assigned(nn.Linear):
    """FSDP2 assigns the gathered parameters to a module with a __setattr__ of its own."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in model[::2]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run_process(rank, folder):
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import DTensor, Partial, Replicate

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", PROCESSES), rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    own_half = slice(4 * rank, 4 * rank + 4)
    results = {"DDP": {}, "FSDP2": {}, "resumed FSDP2": {}}
    for name, make_optimizer in OPTIMIZERS.items():
        model = make_model()
        parallel = nn.parallel.DistributedDataParallel(model)
        train(parallel, make_optimizer(model.parameters()), own_half)
        results["DDP"][name] = [param.detach() for param in model.parameters()]

        model = shard(make_model(), mesh)
        optimizer = make_optimizer(model.parameters())
        train(model, optimizer, own_half)
        for param in model.parameters():
            for key, value in optimizer.state[param].items():
                assert key == "step" or isinstance(value, DTensor), f"{key} of {name} is {type(value)}"
        results["FSDP2"][name] = [param.full_tensor().detach() for param in model.parameters()]

        model = shard(make_model(), mesh)
        optimizer = make_optimizer(model.parameters())
        train(model, optimizer, own_half, range(3))
        resumed = make_optimizer(model.parameters())
        set_optimizer_state_dict(model, resumed, get_optimizer_state_dict(model, optimizer))
        train(model, resumed, own_half, range(3, 6))
        results["resumed FSDP2"][name] = [param.full_tensor().detach() for param in model.parameters()]
    try:
        lcw_ops.register_gradient_hook(parallel)
    except ValueError as error:
        results["refusal"] = str(error)
    model = shard(make_model(), mesh)
    lcw_ops.register_gradient_hook(model)
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    results["register_gradient_hook"] = [param.grad.full_tensor() for param in model.parameters()]
    model = make_model()
    for layer in model[::2]:
        layer.__class__ = Assigned
    lcw_ops.register_gradient_hook(shard(model, mesh))
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    results["assigned"] = [param.grad.full_tensor() for param in model.parameters()]

    # Conversion to float32 and back puts new tensors in the place of the shards, twice.
    model = shard(make_model(), mesh)
    lcw_ops.register_gradient_hook(model)
    model.float().double()
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    results["converted"] = [param.grad.full_tensor() for param in model.parameters()]

    model = make_model()
    parallel = nn.parallel.DistributedDataParallel(model)
    divided = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
    handle = lcw_ops.activate_gradients(divided, "tanh", 0.2, 10.0)
    for kind, other in (
        ("inside too", divided.optim),
        ("ours inside", ZeroRedundancyOptimizer(model.parameters(), optim.SGD, lr=0.05)),
    ):
        try:
            lcw_ops.activate_gradients(other)
        except ValueError as error:
            results["ZeRO", kind] = str(error)
    train(parallel, divided, own_half)
    handle.remove()
    results["ZeRO"] = [param.detach() for param in model.parameters()]
    for name, make_optimizer in OPTIMIZERS.items():
        param = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Replicate()]))
        # Tensor parallelism can leave a sum over processes for later.
        param.grad = DTensor.from_local(torch.tensor([0.1, -3.0, float(rank)]), mesh, [Partial()])
        optimizer = make_optimizer([param])
        try:
            optimizer.step()
            results[name, "partial"] = param.to_local().detach()
        except TypeError as error:
            results[name, "partial"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_process(int(sys.argv[1]), sys.argv[2])
